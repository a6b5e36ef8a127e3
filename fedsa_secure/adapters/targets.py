"""Which layers of a model carry adapters, and which are its task head."""

from collections.abc import Collection

from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING,
)
from torch import nn

from fedsa_secure.adapters.layer import linear_sizes
from fedsa_secure.adapters.settings import AdapterSettings
from fedsa_secure.errors import ConfigError, did_you_mean

# Names of the query and value projections, for architectures that PEFT has no default for.
_ATTENTION = (("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("query_key_value",))


def is_generative(model: nn.Module) -> bool:
    """Whether a transformers model writes text. Its output layer belongs to the frozen base."""
    return bool(getattr(model, "can_generate", lambda: False)())


def head_paths(model: nn.Module) -> list[str]:
    """The linear layers of the head: everything that the task class adds to its base model."""
    if is_generative(model):
        return []
    base = getattr(model, "base_model_prefix", "")
    return [
        path
        for path, module in model.named_modules()
        if linear_sizes(module) is not None and path.split(".")[0] != base
    ]


def find_targets(
    model: nn.Module, settings: AdapterSettings, heads: Collection[str]
) -> dict[str, tuple[int, int]]:
    """Paths and (d_in, d_out) of the layers to adapt: paths that end in a target name, as in PEFT.

    An adapter is never put on the head: the head is trained (or frozen) as a whole.

    Raises:
        ConfigError: if a name matches nothing, or something that is not linear.
    """
    candidates = {
        path: module
        for path, module in model.named_modules()
        if path
        and path not in heads
        and (linear_sizes(module) is not None or not list(module.children()))
    }
    names = settings.target_modules or _default_targets(model, settings, candidates)
    for name in names:
        hits = [path for path in candidates if _matches(path, name)]
        if not hits:
            linear = {
                path.split(".")[-1] for path, m in candidates.items() if linear_sizes(m) is not None
            }
            raise ConfigError(
                "target_modules", f"the model has no layer {name!r}", did_you_mean(name, linear)
            )
        for path in hits:
            if linear_sizes(candidates[path]) is None:
                raise ConfigError(
                    "target_modules",
                    f"{path} is a {type(candidates[path]).__name__}, and only linear layers can be "
                    "adapted",
                    "name linear layers only",
                )
    chosen = [path for path in candidates if any(_matches(path, name) for name in names)]
    _check_unshared(model, {id(candidates[path]): path for path in chosen})
    return {path: linear_sizes(candidates[path]) or (0, 0) for path in chosen}


def _check_unshared(model: nn.Module, chosen: dict[int, str]) -> None:
    """An adapter replaces a layer in one place only."""
    for path, module in model.named_modules(remove_duplicate=False):
        first = chosen.get(id(module), path)
        if first != path:
            raise ConfigError(
                "target_modules",
                f"{first} and {path} are one layer in two places",
                "leave it out",
            )


def _matches(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _default_targets(
    model: nn.Module, settings: AdapterSettings, candidates: Collection[str]
) -> tuple[str, ...]:
    """PEFT's choice for this architecture, else its query and value projections."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    known = (
        TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
        if settings.kind == "vera"
        else TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    )
    if kind in known:
        return tuple(known[kind])
    last = {path.split(".")[-1] for path in candidates}
    for names in _ATTENTION:
        if last.issuperset(names):
            return names
    raise ConfigError(
        "target_modules",
        f"there is no default for models of type {kind!r}",
        "name the linear layers to adapt",
    )
