"""Put adapters and grouped heads into a transformers model, and move clients in and out of it."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from fedsa_secure.adapters.context import BatchContext
from fedsa_secure.adapters.head import GroupedLinear
from fedsa_secure.adapters.layer import AdapterLayer, is_plain, linear_sizes
from fedsa_secure.adapters.lora import LoRALinear
from fedsa_secure.adapters.peft_reading import PeftAdapter
from fedsa_secure.adapters.settings import AdapterSettings
from fedsa_secure.adapters.siblings import Siblings, find_siblings
from fedsa_secure.adapters.targets import find_targets, head_paths, is_generative
from fedsa_secure.adapters.vera import Projections, VeRALinear, private_key
from fedsa_secure.errors import AdapterError, ConfigError
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
        settings: AdapterSettings,
        initial: NamedTensors,
        projections: tuple[Projections, ...] = (),
        siblings: Sequence[Siblings] = (),
    ) -> None:
        self.model: Any = model
        self.settings = settings
        self.projections = projections
        """VeRA's frozen factors; the second pair is that of private adapters."""
        self.half_precision = False
        """Whether products are made in bfloat16 under autocast; what is trained is not."""
        self._forward: Callable[..., Any] = model
        # Most decoders can leave out the output layer where nothing is to be predicted.
        self._picks_positions = "logits_to_keep" in signature(type(model).forward).parameters
        self._keeps_cache = "use_cache" in signature(type(model).forward).parameters
        self._context = context
        self._slots = slots
        self._unwatched = list(siblings)
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
        return torch.device(next(self.model.parameters()).device)

    @property
    def generates(self) -> bool:
        """Whether the model writes text; such a model has no head."""
        return is_generative(self.model)

    @property
    def encoder_decoder(self) -> bool:
        """Whether prompt and answer go into the model apart."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    @property
    def decoder_start_token(self) -> int | None:
        """First token of the decoder of an encoder-decoder model that writes.

        Raises:
            ConfigError: if the model does not say.
        """
        if not (self.generates and self.encoder_decoder):
            return None
        start = self.model.config.decoder_start_token_id
        if start is None:
            raise ConfigError(
                "model", "it has no decoder_start_token_id", "set it in the model's configuration"
            )
        return int(start)

    def layers(self) -> dict[str, AdapterLayer]:
        """The adapted layers by path."""
        found = dict(self.model.named_modules())
        return {p: m for p, m in found.items() if isinstance(m, AdapterLayer)}

    def compile(self, **options: Any) -> None:
        """Let ``torch.compile`` make the forward and backward passes from now on.

        Args:
            options: passed on to ``torch.compile``.
        """
        self._forward = torch.compile(self.model, **options)

    def checkpoint_gradients(self) -> None:
        """Keep only the inputs of the model's layers and compute the rest again in the backward.

        The switch of transformers acts in training mode only, which would turn the base model's
        dropout on. Other batches may pass before the backward pass; clients may not be loaded.

        Raises:
            ConfigError: if the model has no layers that transformers marks for this.
        """
        layers = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise ConfigError(
                "gradient_checkpointing",
                f"a {type(self.model).__name__} has no layers marked for it",
                "set gradient_checkpointing=False",
            )
        for layer in layers:
            layer.forward = partial(_run_twice, layer.forward, self._context)

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
        self._context.loads += 1
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
        inputs: dict[str, Int[Tensor, "row _"]],
        keys: Int32[Tensor, " row"] | None = None,
        positions: Int[Tensor, " kept"] | None = None,
    ) -> Float[Tensor, "row *token out"]:
        """Logits of a client-major batch: of the classes, or of the tokens at each position.

        Args:
            inputs: what the model's tokenizer made: input_ids, attention_mask, ….
            keys: dropout keys of the rows while training, else None.
            positions: for generation the only positions that are asked for; None for all.

        Raises:
            AdapterError: if the rows do not split into one segment per client.
        """
        rows = inputs["input_ids"].shape[0]
        if rows % self.clients:
            raise AdapterError(f"{rows} rows do not split into segments of {self.clients} clients")
        self._context.rows, self._context.keys = rows, keys
        options: dict[str, Any] = {"use_cache": False} if self._keeps_cache else {}
        if positions is not None and self._picks_positions:
            options["logits_to_keep"] = positions
        self._watch_siblings(inputs)
        with self._autocast():
            logits: Tensor = self._forward(**inputs, **options).logits
        # Losses and scores are computed in full precision.
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if positions is None or self._picks_positions else logits[:, positions]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half_precision)

    def _watch_siblings(self, inputs: dict[str, Int[Tensor, "row _"]]) -> None:
        """Before anything is computed, see who shares an x: by a pass of one row per client.

        All real passes are then made alike. Else a run that was resumed would make its first one
        otherwise than the run that was not interrupted, and they would differ by rounding.
        """
        if not self._unwatched:
            return
        context = self._context
        rows, keys, clients = context.rows, context.keys, context.clients
        context.rows, context.keys = clients, None
        step = max(1, rows // clients)
        some = {name: values[::step][:clients] for name, values in inputs.items()}
        start = self.decoder_start_token
        if start is not None and "decoder_input_ids" not in some:
            some["decoder_input_ids"] = some["input_ids"].new_full((clients, 1), start)
        options: dict[str, Any] = {"use_cache": False} if self._keeps_cache else {}
        if self._picks_positions:
            options["logits_to_keep"] = 1
        with torch.no_grad(), self._autocast(), ExitStack() as stack:
            for siblings in self._unwatched:
                stack.enter_context(siblings.watched())
            self.model(**some, **options)
        context.rows, context.keys, self._unwatched = rows, keys, []

    @torch.no_grad()
    def generate(
        self, inputs: dict[str, Int[Tensor, "row token"]], config: GenerationConfig
    ) -> Int[Tensor, "row new"]:
        """Token ids that the model writes after prompts that are padded on the left.

        Args:
            inputs: input_ids and attention_mask of the prompts.
            config: how to decode.

        Raises:
            AdapterError: if more than one client is loaded.
        """
        if self.clients != 1:
            raise AdapterError("one client at a time can generate")
        self._context.rows, self._context.keys = inputs["input_ids"].shape[0], None
        self._watch_siblings(inputs)
        with self._autocast():
            written: Tensor = self.model.generate(**inputs, generation_config=config)
        return written if self.encoder_decoder else written[:, inputs["input_ids"].shape[1] :]


def attach(
    model: nn.Module, settings: AdapterSettings, seed: int, start: PeftAdapter | None = None
) -> AdaptedModel:
    """Freeze a transformers model and give it adapters and a grouped head.

    Args:
        model: a model with a task head, such as ``BertForSequenceClassification``, or one that
            generates; changed in place.
        settings: the shape of the adapters.
        seed: root of the public start.
        start: an adapter that was trained before, whose values are the public start; its settings
            have to be those given.

    Raises:
        ConfigError: if a target module does not exist or is not a linear layer, or the start does
            not fit the model.
        AdapterError: if the head is quantised.
    """
    model.requires_grad_(False).eval()
    for module in model.modules():
        # On some CPUs bitsandbytes repacks a 4-bit weight in its first pass without gradients,
        # and a later pass with gradients goes wrong without a word.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - not in the stubs
    heads = {path: _plain_linear(model, path) for path in head_paths(model)}
    if start is not None:
        start.find_layers({p for p, m in model.named_modules() if linear_sizes(m)} - heads.keys())
    targets = find_targets(model, settings, heads)
    projections = _projections(settings, targets.values(), start)
    context, slots, initial = BatchContext(), dict[str, _Slot](), NamedTensors()

    def register(path: str, module: nn.Module, attribute: str, role: Role, value: Tensor) -> None:
        name = f"{path}.{attribute}"
        slots[name] = _Slot(module, attribute, role)
        initial[name] = value.detach().cpu().clone()

    for path in targets:
        base = model.get_submodule(path)
        layer: AdapterLayer = (
            VeRALinear(base, settings, path, context, projections)
            if settings.kind == "vera"
            else LoRALinear(base, settings, path, context)
        )
        model.set_submodule(path, layer)
        for attribute, (role, value) in layer.starts(seed).items():
            register(path, layer, attribute, role, value)
    for path, linear in heads.items():
        grouped = GroupedLinear(linear, context)
        model.set_submodule(path, grouped)
        register(path, grouped, "weight", Role.HEAD, grouped.weight[0])
        if grouped.bias is not None:
            register(path, grouped, "bias", Role.HEAD, grouped.bias[0])
    if start is not None:
        initial |= start.fitting(initial)
    siblings = find_siblings(model)
    adapted = AdaptedModel(model, context, slots, settings, initial, projections, siblings)
    adapted.load([{}], trained=())
    return adapted


def _run_twice(
    forward: Callable[..., Any], context: BatchContext, *args: Any, **options: Any
) -> Any:
    """Under gradient checkpointing: the backward pass makes everything again for its own batch."""
    # Nothing in it draws at random: the base's dropout is off, ours comes from keys.
    keep: Any = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if torch.compiler.is_compiling():  # what the batch is, is a part of the graph
        return keep(forward, *args, **options)
    then = replace(context)

    def run(*args: Any, **options: Any) -> Any:
        with context.as_it_was(then):
            return forward(*args, **options)

    return keep(run, *args, **options)


def _projections(
    settings: AdapterSettings, sizes: Collection[tuple[int, int]], start: PeftAdapter | None
) -> tuple[Projections, ...]:
    """VeRA's frozen factors: those of the start if it brings them, and a pair for private ones."""
    if settings.kind != "vera":
        return ()
    key, rank = settings.projection_key, settings.rank
    pairs = [Projections.draw(key, rank, sizes)]
    if start is not None:
        pairs[0] = start.wide_enough(pairs[0])
    if settings.private:
        pairs.append(Projections.draw(private_key(key), rank, sizes))
    return tuple(pairs)


def _fingerprint(model: nn.Module, initial: NamedTensors) -> str:
    """A digest of the base model and the public start: names, shapes, and some values of each.

    Not all values: it is there to notice another model, not a forged one, and has to be quick for
    billions of parameters.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in [*model.named_parameters(), *model.named_buffers(), *initial.items()]:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if type(tensor) in (Tensor, nn.Parameter):  # packed weights of other libraries have no view
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // _FINGERPRINT_VALUES)].cpu().double()
            digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def _plain_linear(model: nn.Module, path: str) -> nn.Linear:
    """A layer of the head, whose weight every client gets a copy of."""
    module = model.get_submodule(path)
    if not isinstance(module, nn.Linear) or not is_plain(module.weight):
        raise AdapterError(
            f"{path} belongs to the head, which is trained, and is quantised; quantise the model "
            "without it"
        )
    return module
