"""An adapter that PEFT wrote, as the public start of a run."""

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from peft import LoraConfig, PeftConfig, VeraConfig
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor

from fedsa_secure.adapters.settings import AdapterSettings
from fedsa_secure.adapters.vera import Projections
from fedsa_secure.config import AdapterKind
from fedsa_secure.errors import ConfigError
from fedsa_secure.types import NamedTensors

MARKER = "fedsa_secure.json"
"""File beside an adapter that says whether it is one client's own."""
_PREFIX = "base_model.model."
_FACTORS = {
    ".lora_A.weight": ".A",
    ".lora_B.weight": ".B",
    ".vera_lambda_d": ".d",
    ".vera_lambda_b": ".b",
}
# Fields that say nothing about what the adapter computes, or that are read below.
_NEUTRAL = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
    *("revision", "task_type", "r", "target_modules", "exclude_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "fan_in_fan_out", "runtime_config"),
    *("lora_alpha", "lora_dropout", "use_rslora", "loftq_config", "init_lora_weights"),
    *("vera_dropout", "d_initial", "projection_prng_key", "save_projection", "init_weights"),
}
# Starts of LoRA that leave the base model's weights alone; the others (PiSSA, …) change them.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class PeftAdapter:
    """What a PEFT folder holds, in our terms.

    Args:
        source: hub id or folder, for errors.
        settings: the shape of the adapter; its targets are the full paths of its layers.
        tensors: A and B (or d and b) of its layers and the head, by our names.
        projections: VeRA's frozen factors, if they were saved.
        personal: whether it is one client's own, trained without noise, as its marker says. What
            comes from a hub is public and has none.
    """

    source: str
    settings: AdapterSettings
    tensors: NamedTensors
    projections: Projections | None
    personal: bool = False

    def fitting(self, initial: NamedTensors) -> NamedTensors:
        """Its tensors in the dtype of a model's own start.

        Raises:
            ConfigError: if a tensor has no place in the model, or another shape there.
        """
        for name, tensor in self.tensors.items():
            if name not in initial:
                raise self._refused(f"it has {name}, which the model has not")
            if tensor.shape != initial[name].shape:
                raise self._refused(
                    f"{name} has shape {tuple(tensor.shape)} where the model needs "
                    f"{tuple(initial[name].shape)}"
                )
        return {name: tensor.to(initial[name]) for name, tensor in self.tensors.items()}

    def find_layers(self, paths: Collection[str]) -> None:
        """Check that a model has the layers that are adapted.

        Args:
            paths: its linear layers besides the head.

        Raises:
            ConfigError: if one is missing.
        """
        for path in self.settings.target_modules or ():
            if path not in paths:
                raise self._refused(f"it adapts {path}, which is no layer of the base model")

    def wide_enough(self, drawn: Projections) -> Projections:
        """Its frozen factors if it brings any, else those that were drawn for the model.

        Raises:
            ConfigError: if they are smaller than the model needs.
        """
        own = self.projections
        if own is None:
            return drawn
        for name, mine, needed in (("vera_A", own.A, drawn.A), ("vera_B", own.B, drawn.B)):
            if any(m < n for m, n in zip(mine.shape, needed.shape, strict=True)):
                raise self._refused(
                    f"{name} has shape {tuple(mine.shape)} where the model needs "
                    f"{tuple(needed.shape)}"
                )
        return own

    def _refused(self, problem: str) -> ConfigError:
        return ConfigError(
            "initial_adapter",
            f"{self.source}: {problem}",
            "give an adapter of this base model and task",
        )


def read_peft_adapter(source: str) -> PeftAdapter:
    """Read an adapter from a hub id or a folder.

    Raises:
        ConfigError: if there is none, or it uses a feature that has no counterpart here; the error
            names the feature.
    """
    try:
        config = PeftConfig.from_pretrained(source)
        weights = load_peft_weights(source, device="cpu")
    except (
        *(OSError, ValueError, LookupError, TypeError, RuntimeError, EOFError),
        *(SafetensorError, UnpicklingError),
    ) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            "initial_adapter",
            f"cannot read {source!r}: {reason}",
            "give a hub id or a folder with adapter_config.json and adapter_model.safetensors",
        ) from error
    _refuse_unknown_features(source, config)
    tensors, projections = NamedTensors(), dict[str, Tensor]()
    for key, value in weights.items():
        if key in ("base_model.vera_A", "base_model.vera_B"):
            projections[key[-1]] = value
            continue
        tensors[_our_name(source, key)] = value
    inner = {n.rpartition(".")[0] for n in tensors if n.endswith((".A", ".d"))}
    outer = {n.rpartition(".")[0] for n in tensors if n.endswith((".B", ".b"))}
    layers = sorted(inner | outer)
    if not layers:
        raise ConfigError("initial_adapter", f"{source} adapts no layer", "give another adapter")
    for half in sorted(inner ^ outer):
        raise ConfigError("initial_adapter", f"{source} holds only one of two factors of {half}")
    pair = Projections(projections["A"], projections["B"]) if len(projections) == 2 else None
    settings = _settings(config, tuple(layers))
    return PeftAdapter(source, settings, tensors, pair, _is_personal(source))


def _is_personal(source: str) -> bool:
    """What the marker says; one that cannot be read counts as yes."""
    marker = Path(source) / MARKER
    if not marker.exists():
        return False
    try:
        found = json.loads(marker.read_bytes())
    except (OSError, ValueError):
        return True
    return not (isinstance(found, dict) and found.get("personal") is False)


def _settings(config: Any, layers: tuple[str, ...]) -> AdapterSettings:
    if isinstance(config, VeraConfig):
        return AdapterSettings(
            kind="vera",
            rank=config.r,
            dropout=float(config.vera_dropout),
            target_modules=layers,
            d_initial=float(config.d_initial),
            projection_key=config.projection_prng_key,
        )
    kind: AdapterKind = "rslora" if config.use_rslora else "lora"
    return AdapterSettings(
        kind=kind,
        rank=config.r,
        alpha=float(config.lora_alpha),
        dropout=float(config.lora_dropout),
        target_modules=layers,
    )


def _our_name(source: str, key: str) -> str:
    name = key.removeprefix(_PREFIX)
    for theirs, ours in _FACTORS.items():
        if name.endswith(theirs):
            return name.removesuffix(theirs) + ours
    if "lora_" in name or "vera_" in name:
        raise ConfigError(
            "initial_adapter", f"{source} holds {key!r}, which has no counterpart here"
        )
    return name  # a module to save: the head, or something that fitting() will refuse


def _refuse_unknown_features(source: str, config: Any) -> None:
    """Every field of the configuration that is not understood has to be at its default."""
    if not isinstance(config, LoraConfig | VeraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ConfigError(
            "initial_adapter", f"{source} is of PEFT type {kind}", "only LORA and VERA are known"
        )
    start = getattr(config, "init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise _unsupported(source, "init_lora_weights", start)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in _NEUTRAL or not value:
            continue
        default = (
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
        )
        if value != default:
            raise _unsupported(source, field.name, value)


def _unsupported(source: str, feature: str, value: object) -> ConfigError:
    return ConfigError(
        "initial_adapter",
        f"{source} uses PEFT's {feature}={value!r}, which has no counterpart here",
        "merge that adapter into its base model, or give one without it",
    )
