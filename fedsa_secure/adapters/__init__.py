"""Adapters with a leading client axis, attached to transformers models; PEFT in and out."""

from fedsa_secure.adapters.attach import AdaptedModel, attach
from fedsa_secure.adapters.context import BatchContext
from fedsa_secure.adapters.head import GroupedLinear
from fedsa_secure.adapters.layer import AdapterLayer
from fedsa_secure.adapters.lora import LoRALinear
from fedsa_secure.adapters.merge import merged_weights
from fedsa_secure.adapters.peft import peft_config, peft_state, save_peft_adapter
from fedsa_secure.adapters.peft_reading import PeftAdapter, read_peft_adapter
from fedsa_secure.adapters.pretrained import load_pretrained, load_tokenizer
from fedsa_secure.adapters.settings import AdapterSettings
from fedsa_secure.adapters.siblings import Siblings
from fedsa_secure.adapters.vera import Projections, VeRALinear

__all__ = [
    "AdaptedModel",
    "AdapterLayer",
    "AdapterSettings",
    "BatchContext",
    "GroupedLinear",
    "LoRALinear",
    "PeftAdapter",
    "Projections",
    "Siblings",
    "VeRALinear",
    "attach",
    "load_pretrained",
    "load_tokenizer",
    "merged_weights",
    "peft_config",
    "peft_state",
    "read_peft_adapter",
    "save_peft_adapter",
]
