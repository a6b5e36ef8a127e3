"""Put adapters and grouped heads into a transformers model, and move clients in and out of it."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int32
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from fedsa_secure.adapters.context import BatchContext
from fedsa_secure.adapters.head import GroupedLinear
from fedsa_secure.adapters.lora import LoRALinear, LoRASettings
from fedsa_secure.errors import ConfigError, did_you_mean
from fedsa_secure.types import NamedTensors, Role

_FINGERPRINT_VALUES = 64


@dataclass(frozen=True)
class _Slot:
    """Where a parameter lives: its module, its attribute and its role."""

    module: nn.Module
    attribute: str
    role: Role


class AdaptedModel:
    """A frozen base model that carries the adapters and heads of C clients at once.

    The rows of a batch are client-major in equal segments; one pass over the frozen base serves
    all C clients. C = 1 is a deployed client, C > 1 the simulator: the code is the same.

    Built by ``attach``; the base model's own dropout is off for good.
    """

    def __init__(
        self,
        model: nn.Module,
        context: BatchContext,
        slots: dict[str, _Slot],
        settings: LoRASettings,
        initial: NamedTensors,
    ) -> None:
        self.model = model
        self.settings = settings
        self._context = context
        self._slots = slots
        self.fingerprint = _fingerprint(model, initial)
        self.initial: NamedTensors = initial
        """The public starting values of all adapter and head tensors, without client axis."""

    @property
    def clients(self) -> int:
        """C, the number of clients that are loaded."""
        return self._context.clients

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    def names(self, roles: Collection[Role]) -> list[str]:
        """Names of the parameters with one of these roles, in the model's order."""
        return [name for name, slot in self._slots.items() if slot.role in roles]

    def parameters(self, roles: Collection[Role]) -> dict[str, nn.Parameter]:
        """The stacked parameters with one of these roles. Each [client, …]"""
        return {
            name: getattr(slot.module, slot.attribute)
            for name, slot in self._slots.items()
            if slot.role in roles
        }

    def load(self, clients: Sequence[NamedTensors], trained: Collection[Role]) -> None:
        """Take these clients in, one per segment.

        Args:
            clients: tensors without client axis; what a client lacks is at its public start.
            trained: roles that are to receive gradients.
        """
        self._context.clients = len(clients)
        for name, slot in self._slots.items():
            old = getattr(slot.module, slot.attribute)
            stacked = torch.stack([tensors.get(name, self.initial[name]) for tensors in clients])
            new = nn.Parameter(stacked.to(old.device, old.dtype), slot.role in trained)
            setattr(slot.module, slot.attribute, new)

    def unload(self, roles: Collection[Role]) -> list[NamedTensors]:
        """Copies of every client's own tensors with one of these roles, on the host."""
        stacked = {name: p.detach().cpu().unbind() for name, p in self.parameters(roles).items()}
        # A slice would keep the memory of the whole stack alive, hence the clones.
        return [
            {name: slices[c].clone() for name, slices in stacked.items()}
            for c in range(self.clients)
        ]

    def __call__(
        self,
        inputs: dict[str, Int[Tensor, "row token"]],
        keys: Int32[Tensor, "row token"] | None = None,
    ) -> Float[Tensor, "row label"]:
        """Logits of a client-major batch.

        Args:
            inputs: what the model's tokenizer made: input_ids, attention_mask, ….
            keys: dropout keys of the tokens while training, else None.
        """
        self._context.rows = inputs["input_ids"].shape[0]
        self._context.keys = keys
        logits: Tensor = self.model(**inputs).logits
        return logits


def attach(model: nn.Module, settings: LoRASettings, seed: int) -> AdaptedModel:
    """Freeze a transformers model and give it adapters and a grouped head.

    Args:
        model: a model with a task head, such as ``BertForSequenceClassification``; changed in
            place.
        settings: the shape of the adapters.
        seed: root of the public start of A.

    Raises:
        ConfigError: if a target module does not exist or is not a linear layer.
    """
    model.requires_grad_(False).eval()
    head_paths = _head_paths(model)
    targets = _find_targets(model, settings, head_paths)
    context, slots, initial = BatchContext(), dict[str, _Slot](), NamedTensors()

    def register(path: str, module: nn.Module, attribute: str, role: Role, start: Tensor) -> None:
        name = f"{path}.{attribute}"
        slots[name] = _Slot(module, attribute, role)
        initial[name] = start.detach().cpu().clone()

    for path in targets:
        lora = LoRALinear(_linear(model, path), settings, path, context)
        model.set_submodule(path, lora)
        register(path, lora, "A", Role.A, lora.start(seed))
        register(path, lora, "B", Role.B, lora.B[0])
    for path in head_paths:
        grouped = GroupedLinear(_linear(model, path), context)
        model.set_submodule(path, grouped)
        register(path, grouped, "weight", Role.HEAD, grouped.weight[0])
        if grouped.bias is not None:
            register(path, grouped, "bias", Role.HEAD, grouped.bias[0])
    adapted = AdaptedModel(model, context, slots, settings, initial)
    adapted.load([{}], trained=())
    return adapted


def _fingerprint(model: nn.Module, initial: NamedTensors) -> str:
    """A digest of the base model and the public start: names, shapes, and some values of each.

    Not all values: it is there to notice another model, not a forged one, and has to be quick for
    billions of parameters.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in [*model.named_parameters(), *initial.items()]:
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _FINGERPRINT_VALUES)].cpu().double()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


def _head_paths(model: nn.Module) -> list[str]:
    """The linear layers of the head: everything that the task class adds to its base model."""
    base = getattr(model, "base_model_prefix", "")
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.split(".")[0] != base
    ]


def _find_targets(
    model: nn.Module, settings: LoRASettings, head_paths: Collection[str]
) -> list[str]:
    """Paths of the layers to adapt: those whose path ends in one of the target names, as in PEFT.

    An adapter is never put on the head: the head is trained (or frozen) as a whole.
    """
    names = settings.target_modules or _default_targets(model)
    candidates = {
        path: module
        for path, module in model.named_modules()
        if path and path not in head_paths and not list(module.children())
    }
    for name in names:
        hits = [path for path in candidates if _matches(path, name)]
        if not hits:
            linear = {
                path.split(".")[-1] for path, m in candidates.items() if isinstance(m, nn.Linear)
            }
            raise ConfigError(
                "target_modules", f"the model has no layer {name!r}", did_you_mean(name, linear)
            )
        for path in hits:
            if type(candidates[path]) is not nn.Linear:
                raise ConfigError(
                    "target_modules",
                    f"{path} is a {type(candidates[path]).__name__}, and only nn.Linear can be "
                    "adapted",
                    "name linear layers only",
                )
    return [path for path in candidates if any(_matches(path, name) for name in names)]


def _linear(model: nn.Module, path: str) -> nn.Linear:
    module = model.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{path} is a {type(module).__name__}")
    return module


def _matches(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _default_targets(model: nn.Module) -> tuple[str, ...]:
    """PEFT's choice for this architecture."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    found = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    if found is None:
        raise ConfigError(
            "target_modules",
            f"there is no default for models of type {kind!r}",
            "name the linear layers to adapt",
        )
    return tuple(found)
