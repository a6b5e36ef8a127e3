"""Tiny random models of every family, their inputs, and what PEFT makes of them."""

from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
)

from fedsa_secure.adapters import AdaptedModel, peft_config, peft_state
from fedsa_secure.types import NamedTensors

VOCABULARY, PAD, END = 60, 0, 1
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "pad_token_id": PAD,
    "initializer_range": 0.2,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 24,
    "pad_token_id": PAD,
    "bos_token_id": END,
    "eos_token_id": END,
    "initializer_range": 0.2,
}
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "pad_token_id": PAD,
    "bos_token_id": END,
    "eos_token_id": END,
    "initializer_range": 0.2,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 12,  # two heads of 12 are not 32: queries and values are not square
    "num_heads": 2,
    "d_ff": 48,
    "num_layers": 2,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "decoder_start_token_id": PAD,
}


@dataclass(frozen=True)
class Family:
    """One kind of model. The targets include layers that are not square."""

    model: type[nn.Module]
    config: type
    shape: dict
    targets: tuple[str, ...]
    head: list[str] | None = None
    """What PEFT's modules_to_save has to name; its own choice misses some heads."""

    def make(self, seed: int = 0, labels: int = 3) -> nn.Module:
        """The same random model for the same seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.model(self.config(**self.shape, num_labels=labels))
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):  # transformers starts them at zero: hides mistakes
                    nn.init.normal_(parameter, std=0.1)
        return model.eval()

    def inputs(self, rows: int = 6) -> dict[str, Tensor]:
        """Rows of unequal length, each with one end token, as T5's classification head wants."""
        stream = torch.Generator().manual_seed(3)
        lengths = torch.randint(3, 10, (rows, 1), generator=stream)
        places = torch.arange(9)
        ids = torch.randint(2, VOCABULARY, (rows, 9), generator=stream)
        ids = torch.where(places < lengths - 1, ids, torch.where(places < lengths, END, PAD))
        found = {"input_ids": ids, "attention_mask": (places < lengths).long()}
        if self.model is T5ForConditionalGeneration:
            answers = torch.randint(2, VOCABULARY, (rows, 4), generator=stream)
            answers[:, 0] = PAD
            found["decoder_input_ids"] = answers
        return found


_DENSE = ("query", "value", "intermediate.dense")
FAMILIES = {
    "bert": Family(BertForSequenceClassification, BertConfig, _ENCODER, _DENSE, ["classifier"]),
    "roberta": Family(
        RobertaForSequenceClassification, RobertaConfig, _ENCODER, _DENSE, ["classifier"]
    ),
    "gpt2": Family(GPT2LMHeadModel, GPT2Config, _GPT2, ("c_attn", "c_fc")),
    "gpt2-classes": Family(
        GPT2ForSequenceClassification, GPT2Config, _GPT2, ("c_attn",), ["score"]
    ),
    "llama": Family(LlamaForCausalLM, LlamaConfig, _LLAMA, ("q_proj", "v_proj", "down_proj")),
    "llama-classes": Family(
        LlamaForSequenceClassification, LlamaConfig, _LLAMA, ("q_proj", "v_proj"), ["score"]
    ),
    "t5": Family(T5ForConditionalGeneration, T5Config, _T5, ("q", "v", "wi", "wo")),
    "t5-classes": Family(
        T5ForSequenceClassification, T5Config, _T5, ("q", "v"), ["classification_head"]
    ),
}


def random_client(adapted: AdaptedModel, seed: int) -> NamedTensors:
    """Values that are all different from the public start."""
    stream = torch.Generator().manual_seed(seed)
    return {
        name: start + 0.1 * torch.randn(start.shape, generator=stream)
        for name, start in adapted.initial.items()
    }


def with_peft(base: nn.Module, adapted: AdaptedModel, client: NamedTensors) -> PeftModel:
    """A trainable PeftModel with a client's values, not by way of a folder."""
    config = peft_config(adapted, "tiny")
    config.inference_mode, config.base_model_name_or_path = False, None
    model = get_peft_model(base, config)
    result = set_peft_model_state_dict(model, peft_state(adapted, client))
    assert not result.unexpected_keys
    return model.eval()


_FACTORS = {
    ".lora_A.default.weight": ".A",
    ".lora_B.default.weight": ".B",
    ".vera_lambda_d.default": ".d",
    ".vera_lambda_b.default": ".b",
}


def peft_gradients(model: PeftModel) -> dict[str, Tensor]:
    """Gradients under our names."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            ours = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            for theirs, short in _FACTORS.items():
                ours = ours.replace(theirs, short)
            found[ours] = parameter.grad
    return found


def loss(logits: Tensor) -> Tensor:
    """Cross-entropy of labels that take turns over all rows and positions, summed."""
    flat = logits.reshape(-1, logits.shape[-1])
    labels = torch.arange(flat.shape[0]) % flat.shape[1]
    return functional.cross_entropy(flat, labels, reduction="sum") / logits.shape[0]
