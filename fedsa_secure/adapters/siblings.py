"""Layers of one module that take the same x, computed together."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedsa_kernels import lora_linears
from fedsa_kernels.dispatch import together_pays
from fedsa_kernels.lora_linears import LARGEST_RANK
from fedsa_kernels.operands import product_dtype
from fedsa_kernels.tables import Problem
from fedsa_secure.adapters.layer import is_hooked, plain_weights
from fedsa_secure.adapters.lora import LoRALinear

Run = tuple[LoRALinear, ...]
"""Layers that are called one after the other with the same x, in this order."""


class Siblings:
    """The LoRA layers of one module, such as the projections of an attention.

    Queries, keys and values are made of one x, as are the two inner projections of a gated MLP. The
    first of such layers that is called makes the outputs of all in one pass over x
    (``lora_linears``), and each of the others hands its own out when it is called with that x.

    Which layers share an x is seen once and for all, not guessed from names: in cross-attention, or
    with the output projection among the siblings, equal widths say nothing. What is seen does not
    change later: under gradient checkpointing a layer has to be run again as it was run.

    Layers are computed alone

    - until their calls were watched, and outside of a call of their module;
    - under ``torch.compile``, which cannot see through what is kept from call to call;
    - while adapters drop inputs: each drops other ones, and there is no x to share;
    - while a hook is on one of them, as in private training: hooks may give each an x of its own;
    - under inference mode, whose tensors do not count their changes;
    - on a device for which nothing was measured, or on which layers are faster one by one.

    Guarantee: an output that is handed out is what its layer makes of this very x. It is made and
    taken within one call of the module, with neither x nor a weight or factor replaced or changed
    in place in between (as far as torch counts changes), under the same autocast and gradient mode.
    Where that is not so the layer is computed anew. The backward pass of all is one step: after
    that of one output alone, another's needs ``retain_graph``.

    Args:
        module: the parent; its forward pass is wrapped.
        layers: its LoRA layers.
    """

    def __init__(self, module: nn.Module, layers: Sequence[LoRALinear]) -> None:
        self._context = layers[0].context
        self._runs: list[Run] | None = None
        self._inside = False
        self._watching = False
        self._calls: list[tuple[LoRALinear, Tensor]] = []
        self._made: _Made | None = None
        for layer in layers:
            layer.shared = self.output
        # No closure: a copy of the model has to call its own module.
        module.forward = partial(self._pass, module.forward)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """See in what passes through the model now which layers share an x."""
        self._runs, self._watching = None, True
        try:
            yield
        finally:
            self._watching = False

    def output(self, layer: LoRALinear, x: Tensor) -> Tensor | None:
        """What the layer makes of x, or None if it has to do so alone."""
        if torch.compiler.is_compiling() or not self._inside:
            return None
        if self._watching:
            self._calls.append((layer, x))
            return None
        made, self._made = self._made, None
        if made is None or not made.is_for(layer, x):
            run = next((run for run in self._runs or () if run[0] is layer), None)
            if run is None or not self._may_share(run, x):
                return None
            made = _Made.by(run, x)
        y = made.outputs.pop(layer)
        self._made = made if made.outputs else None
        return y

    def _pass(self, forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """One call of the module."""
        if torch.compiler.is_compiling():
            return forward(*args, **options)
        self._inside, self._made, self._calls = True, None, []
        try:
            result = forward(*args, **options)
            if self._watching:
                found = _find_runs(self._calls)
                # A module that is passed more than once has to behave in the same way each time.
                known = found if self._runs is None else self._runs
                self._runs = [run for run in known if run in found]
            return result
        finally:
            self._inside, self._made, self._calls = False, None, []

    def _may_share(self, run: Run, x: Tensor) -> bool:
        context = self._context
        return not (
            (context.clients > 1 and x.shape[0] != context.rows)  # the layer says so itself
            or (context.keys is not None and any(layer.dropout > 0.0 for layer in run))
            or x.is_inference()
            or any(_stands_alone(layer) for layer in run)
            or not self._pays(run, x)
        )

    def _pays(self, run: Run, x: Tensor) -> bool:
        """Whether one op is faster here than one for each layer."""
        rank, d_out = sum(each.total_rank for each in run), sum(each.d_out for each in run)
        rows, d_in = x.numel() // x.shape[-1], x.shape[-1]
        sizes = (rows, d_in, d_out, rank, self._context.clients)
        return together_pays(Problem("lora_linears", product_dtype(x), *sizes), x.device)


@dataclass(eq=False)
class _Made:
    """Outputs that wait for their layers.

    Args:
        x: what they were made of.
        outputs: of the layers that were not called yet.
        changes: what each output depends on, see ``_changes``.
        scaling: of all of them.
        mode: of torch, in which they were made.
    """

    x: Tensor
    outputs: dict[LoRALinear, Tensor]
    changes: dict[LoRALinear, list[tuple[Tensor, tuple[int, bool]]]]
    scaling: float
    mode: tuple[bool, torch.dtype]

    @classmethod
    def by(cls, run: Run, x: Tensor) -> "_Made":
        """Compute all layers of a run."""
        frozen = [plain_weights(layer.base) for layer in run]
        factors = [layer.factors() for layer in run]
        ys = lora_linears(
            x,
            [weight for weight, _ in frozen if weight is not None],
            [bias for _, bias in frozen],
            [A for A, _ in factors],
            [B for _, B in factors],
            run[0].scaling,
        )
        changes = {layer: _changes(layer, x) for layer in run}
        outputs = dict(zip(run, ys, strict=True))
        return cls(x, outputs, changes, run[0].scaling, _mode(x))

    def is_for(self, layer: LoRALinear, x: Tensor) -> bool:
        """Whether what waits here is what the layer would make of x."""
        if x is not self.x or layer not in self.outputs or _mode(x) != self.mode:
            return False
        if layer.scaling != self.scaling or _stands_alone(layer):
            return False
        before, now = self.changes[layer], _changes(layer, x)
        return len(before) == len(now) and all(
            new is old and state == known
            for (new, state), (old, known) in zip(now, before, strict=True)
        )


def find_siblings(model: nn.Module) -> list[Siblings]:
    """The modules of a model with more than one LoRA layer right below them."""
    found = []
    for module in list(model.modules()):
        layers = [child for child in module.children() if isinstance(child, LoRALinear)]
        if len(layers) > 1:
            found.append(Siblings(module, layers))
    return found


def _find_runs(calls: Sequence[tuple[LoRALinear, Tensor]]) -> list[Run]:
    """Layers that are called once, one after the other, with the same x.

    They also need the same scaling, dtype and device, and together no more rank than one pass
    takes.
    """
    layers = [layer for layer, _ in calls]
    runs: list[Run] = []
    before: Tensor | None = None
    for layer, x in calls:
        longer = (*runs[-1], layer) if x is before else (layer,)
        alike = {(each.scaling, each.A.dtype, each.A.device) for each in longer}
        rank = sum(each.total_rank for each in longer)
        if len(longer) > 1 and len(alike) == 1 and rank <= LARGEST_RANK:
            runs[-1] = longer
        else:
            runs.append((layer,))
        before = x
    return [run for run in runs if len(run) > 1 and all(layers.count(each) == 1 for each in run)]


def _stands_alone(layer: LoRALinear) -> bool:
    """Whether something is to happen around its calls, or its base has to be called."""
    return is_hooked(layer) or plain_weights(layer.base)[0] is None


def _changes(layer: LoRALinear, x: Tensor) -> list[tuple[Tensor, tuple[int, bool]]]:
    """All tensors that an output depends on, how often each was changed, and if it is trained."""
    frozen = (layer.weight, layer.bias)
    tensors = [x, *layer.parameters(recurse=False), *(t for t in frozen if t is not None)]
    return [(t, (0 if t.is_inference() else t._version, t.requires_grad)) for t in tensors]


def _mode(x: Tensor) -> tuple[bool, torch.dtype]:
    return torch.is_grad_enabled(), product_dtype(x)
