"""``lora_linears``: frozen linear layers of one x with a LoRA adapter each, as one op."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fedsa_kernels.dispatch import Choice, kernels_for
from fedsa_kernels.eager import gradients_by_op, refuse_a_second
from fedsa_kernels.lora_linears import reference
from fedsa_kernels.operands import (
    Gradients,
    in_one_dtype,
    require_factors,
    require_segments,
    require_shapes,
    rows_of,
    without_autocast,
)

LARGEST_RANK = 256
"""Of all adapters together: what a kernel holds of a row grows with it."""


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    A: Tensor,
    Bs: Sequence[Tensor],
    scaling: float,
    backend: str | None,
) -> tuple[list[Tensor], Tensor]:
    """A bias without elements stands for none: autograd knows lists of tensors only."""
    given = [bias if bias.numel() else None for bias in biases]
    choice = _kernels(x, A, Bs, backend)
    if choice is None:
        return reference.forward(x, weights, given, A, Bs, scaling)
    from fedsa_kernels.lora_linears import triton  # not every machine has it

    fused = choice.backend == "fused"
    return triton.forward(x, weights, given, A, Bs, scaling, choice.tiles, fused)


def _kernels(x: Tensor, A: Tensor, Bs: Sequence[Tensor], backend: str | None) -> Choice | None:
    clients, rank, d_in = A.shape
    d_out = sum(B.shape[1] for B in Bs)
    return kernels_for("lora_linears", x, d_in, d_out, rank, clients, backend)


_forward_op = torch.library.custom_op("fedsa::lora_linears", _forward, mutates_args=())


@_forward_op.register_fake
def _forward_fake(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    A: Tensor,
    Bs: Sequence[Tensor],
    scaling: float,
    backend: str | None,
) -> tuple[list[Tensor], Tensor]:
    ys = [x.new_empty(x.shape[0], B.shape[1]) for B in Bs]
    return ys, x.new_empty(x.shape[0], A.shape[1])


@without_autocast
def _gradients(
    dys: Sequence[Tensor],
    x: Tensor,
    xa: Tensor,
    weights: Sequence[Tensor],
    A: Tensor,
    Bs: Sequence[Tensor],
    scaling: float,
    backend: str | None,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of x, A and all B; None for those that are not needed."""
    operands = (dys, x, xa, weights, A, Bs, scaling, needs)
    choice = _kernels(x, A, Bs, backend)
    if choice is None:
        dx, dA, dBs = reference.backward(*operands)
    else:
        from fedsa_kernels.lora_linears import triton

        dx, dA, dBs = triton.backward(*operands, choice.tiles, choice.backend == "fused")
    return dx, dA, *dBs


def _gradients_fake(
    dys: Sequence[Tensor],
    x: Tensor,
    xa: Tensor,
    weights: Sequence[Tensor],
    A: Tensor,
    Bs: Sequence[Tensor],
    scaling: float,
    backend: str | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    trained = zip((x, A, *Bs), needs, strict=True)
    return [x.new_empty(tensor.shape) for tensor, needed in trained if needed]


_gradients_by_op = gradients_by_op("fedsa::lora_linears_backward", _gradients, _gradients_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Tensor]) -> None:
    x, weights, _biases, A, Bs, scaling, backend = inputs
    ctx.save_for_backward(x, output[1], A, *weights, *Bs)
    ctx.scaling, ctx.backend = scaling, backend


def _backward(
    gradients: Callable[..., Gradients], ctx: Any, dys: Sequence[Tensor], needs: list[bool]
) -> Gradients:
    """Gradients of x, A and all B."""
    x, xa, A, *rest = ctx.saved_tensors
    weights, Bs = rest[: len(dys)], rest[len(dys) :]
    dense = [dy.contiguous() for dy in dys]
    return gradients(dense, rows_of(x), xa, weights, A, Bs, ctx.scaling, ctx.backend, needs)


def _backward_op(ctx: Any, dys: list[Tensor], _dxa: Tensor) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad
    needs = [needed[0], needed[3], *needed[4]]
    dx, dA, *dBs = _backward(_gradients_by_op, ctx, dys, needs)
    none = [None] * len(dys)
    return dx, none, none, dA, dBs, None, None


_forward_op.register_autograd(_backward_op, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The same without torch.library, see ``lora_linear``; no lists, which this class ignores."""

    @staticmethod
    def forward(
        ctx: Any, scaling: float, backend: str | None, x: Tensor, A: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(others) // 3
        weights, biases, Bs = others[:count], others[count : 2 * count], others[2 * count :]
        settings = (weights, biases, A, Bs, scaling, backend)
        ys, xa = _forward(rows_of(x), *settings)
        _setup_context(ctx, (x, *settings), (ys, xa))
        # Without ``data`` they may be views, which nobody may change in place.
        return tuple(y.view(*x.shape[:-1], y.shape[1]).data for y in ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        refuse_a_second()
        needed = ctx.needs_input_grad
        frozen = [None] * (2 * len(dys))
        needs = [*needed[2:4], *needed[4 + len(frozen) :]]
        rows = [rows_of(dy) for dy in dys]
        dx, dA, *dBs = _backward(_gradients, ctx, rows, needs)
        dx = dx if dx is None else dx.view(*dys[0].shape[:-1], dx.shape[1])
        return None, None, dx, dA, *frozen, *dBs


def lora_linears(
    x: Float[Tensor, "... d_in"],
    weights: Sequence[Float[Tensor, "_ d_in"]],
    biases: Sequence[Float[Tensor, " _"] | None],
    As: Sequence[Float[Tensor, "client _ d_in"]],
    Bs: Sequence[Float[Tensor, "client _ _"]],
    scaling: float,
    *,
    backend: str | None = None,
) -> tuple[Float[Tensor, "... _"], ...]:
    """Several ``lora_linear`` of one x: one pass over x for all A, and one gradient of x.

    For the rows of client c: ``y_i = x·W_iᵀ + bias_i + scaling · x·A_icᵀ·B_icᵀ``. The gradient of x
    is accumulated in one place, where separate layers make one each and add them up.

    There is no dropout: every adapter drops other elements of x, so it has no x to share.

    Args:
        x: client-major, as in ``lora_linear``.
        weights: frozen, of one layer each; they receive no gradient.
        biases: frozen, or None; likewise.
        As: one factor per client, of rank r_i; together at most ``LARGEST_RANK``.
        Bs: one factor per client. Each [client, d_out_i, r_i]
        scaling: alpha/r for LoRA, alpha/√r for rsLoRA; that of all layers.
        backend: "reference", "cublas" or "fused"; by default what is fastest, see
            ``fedsa_kernels.dispatch``.

    Returns:
        y_i of each layer, with the leading dimensions of x.

    Raises:
        ValueError: if the rows of x cannot be split into one equal segment per client, the ranks
            are too large together, there are no layers, the shapes of operands do not fit, naming
            one, these are no floating point or on two devices, or the backend cannot run here.

    Source: Hu et al., LoRA (ICLR 2022), §4.1.
    """
    _require_shapes(x, weights, biases, As, Bs)
    x, A, *rest = in_one_dtype(x, _side_by_side(As), *weights, *biases, *Bs)
    if A.shape[1] > LARGEST_RANK:
        raise ValueError(f"lora_linears: ranks of {A.shape[1]} together, over {LARGEST_RANK}")
    require_segments(x, A.shape[0], "lora_linears")
    count, none = len(weights), x.new_empty(0)
    frozen, outer = rest[:count], rest[2 * count :]
    added = [none if bias is None else bias for bias in rest[count : 2 * count]]
    if torch.compiler.is_compiling():
        ys = _forward_op(rows_of(x), frozen, added, A, outer, scaling, backend)[0]
        return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)
    eager: Any = _Eager.apply
    found: tuple[Tensor, ...] = eager(scaling, backend, x, A, *frozen, *added, *outer)
    return found


@without_autocast  # under which torch joins no numbers but float32 and its own
def _side_by_side(As: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(As), 1)


def _require_shapes(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
) -> None:
    if not len(weights) == len(biases) == len(As) == len(Bs):
        counts = [len(each) for each in (weights, biases, As, Bs)]
        raise ValueError(f"lora_linears: {counts} weights, biases, As and Bs")
    if not weights:
        raise ValueError("lora_linears: there are no layers")
    for k, (weight, bias, A, B) in enumerate(zip(weights, biases, As, Bs, strict=True)):
        if weight is None:
            raise ValueError(f"lora_linears: weights[{k}] is missing")
        require_factors("lora_linears", x, 3, (f"As[{k}]", A), (f"Bs[{k}]", B))
        clients, rank, d_in, d_out = As[0].shape[0], A.shape[1], x.shape[-1], B.shape[1]
        require_shapes(
            "lora_linears",
            (f"As[{k}]", A, (clients, rank, d_in)),
            (f"Bs[{k}]", B, (clients, d_out, rank)),
            (f"weights[{k}]", weight, (d_out, d_in)),
            (f"biases[{k}]", bias, (d_out,)),
        )
