"""LoRA modules with a leading client axis, attached to transformers models; PEFT in and out."""

from fedsa_secure.adapters.attach import AdaptedModel, attach
from fedsa_secure.adapters.context import BatchContext
from fedsa_secure.adapters.head import GroupedLinear
from fedsa_secure.adapters.lora import LoRALinear, LoRASettings
from fedsa_secure.adapters.peft import peft_config, peft_state, save_peft_adapter
from fedsa_secure.adapters.pretrained import load_pretrained

__all__ = [
    "AdaptedModel",
    "BatchContext",
    "GroupedLinear",
    "LoRALinear",
    "LoRASettings",
    "attach",
    "load_pretrained",
    "peft_config",
    "peft_state",
    "save_peft_adapter",
]
