"""Write adapters in the form that ``peft.PeftModel.from_pretrained`` reads."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, VeraConfig
from safetensors.torch import save
from transformers.pytorch_utils import Conv1D

from fedsa_secure.adapters.attach import AdaptedModel
from fedsa_secure.adapters.layer import AdapterLayer
from fedsa_secure.adapters.peft_reading import MARKER
from fedsa_secure.adapters.pretrained import public_name
from fedsa_secure.adapters.vera import VeRALinear
from fedsa_secure.types import NamedTensors, Role


def peft_state(adapted: AdaptedModel, tensors: NamedTensors) -> NamedTensors:
    """One client's tensors under the names that PEFT gives them in a file.

    A private adapter (FedDPA) and the shared one become one LoRA of rank 2r, which computes the
    same; PEFT has no file for a sum of two.

    Args:
        adapted: the model that the tensors belong to.
        tensors: one client's adapters and head, without client axis; what is missing is at its
            public start.
    """
    full = {name: tensors.get(name, start) for name, start in adapted.initial.items()}
    state = NamedTensors()
    for path, layer in adapted.layers().items():
        for suffix, tensor in _factors(layer, path, full).items():
            state[f"base_model.model.{path}.{suffix}"] = tensor.contiguous()
    if _is_plain_vera(adapted):
        pair = adapted.projections[0]
        state["base_model.vera_A"] = pair.A.contiguous()
        state["base_model.vera_B"] = pair.B.contiguous()
    for name in adapted.names([Role.HEAD]):
        state[f"base_model.model.{name}"] = full[name].contiguous()
    return state


def save_peft_adapter(
    adapted: AdaptedModel, tensors: NamedTensors, folder: Path, base_model: str
) -> None:
    """Write one client's adapter and head as a PEFT folder.

    The head always goes into ``modules_to_save`` by name, since PEFT's automatic choice misses
    some heads. Load it with the base model built for the same number of labels::

        base = AutoModelForSequenceClassification.from_pretrained(base_model, num_labels=n)
        model = PeftModel.from_pretrained(base, folder)

    A file of our own marks the folder as personal: its tensors were trained on one client's rows
    without noise, so they may not be the public start of a private run.

    Args:
        adapted: the model that the tensors belong to.
        tensors: as for ``peft_state``.
        folder: made if it does not exist.
        base_model: what PEFT notes as the base model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # First, so that a crash leaves no adapter without it.
    (folder / MARKER).write_text(json.dumps({"personal": True}) + "\n", encoding="utf-8")
    state = peft_state(adapted, tensors)
    (folder / "adapter_model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
    peft_config(adapted, base_model).save_pretrained(str(folder))


def peft_config(adapted: AdaptedModel, base_model: str) -> PeftConfig:
    """The PEFT configuration of the adapters in a model."""
    settings, layers = adapted.settings, adapted.layers()
    common = {
        "task_type": _task(adapted),
        "base_model_name_or_path": public_name(base_model),
        "inference_mode": True,
        "fan_in_fan_out": any(isinstance(layer.base, Conv1D) for layer in layers.values()),
        "modules_to_save": sorted({n.split(".")[0] for n in adapted.names([Role.HEAD])}) or None,
    }
    config: PeftConfig
    if _is_plain_vera(adapted):
        config = VeraConfig(
            r=settings.rank,
            vera_dropout=settings.dropout,
            d_initial=settings.d_initial,
            projection_prng_key=settings.projection_key,
            save_projection=True,
            **common,
        )
    else:
        rank = settings.rank * (2 if settings.private else 1)
        scaling = 1.0 if settings.kind == "vera" else settings.scaling
        rslora = settings.kind == "rslora"
        config = LoraConfig(
            r=rank,
            lora_alpha=scaling * (rank**0.5 if rslora else rank),
            use_rslora=rslora,
            lora_dropout=settings.dropout,
            **common,
        )
    # By full path, so that no other layer matches. PEFT turns a list into a set when it is given
    # to the constructor, whose order would differ from one process to the next.
    config.target_modules = sorted(layers)
    return config


def _is_plain_vera(adapted: AdaptedModel) -> bool:
    return adapted.settings.kind == "vera" and not adapted.settings.private


def _task(adapted: AdaptedModel) -> str:
    if not adapted.generates:
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if adapted.encoder_decoder else "CAUSAL_LM"


def _factors(layer: AdapterLayer, path: str, tensors: NamedTensors) -> NamedTensors:
    """What a file holds for one layer, by PEFT's names."""
    prefix = f"{path}."
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if isinstance(layer, VeRALinear):
        if not layer.private:
            return {"vera_lambda_d": own["d"], "vera_lambda_b": own["b"]}
        inner, outer = layer.as_lora(own)
        return {"lora_A.weight": inner, "lora_B.weight": outer}
    inner, outer = own["A"], own["B"]
    if "private_A" in own:
        inner = torch.cat([inner, own["private_A"]], 0)
        outer = torch.cat([outer, own["private_B"]], 1)
    return {"lora_A.weight": inner, "lora_B.weight": outer}
