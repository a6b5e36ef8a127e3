"""``lora_linear``: a frozen linear layer with one LoRA adapter per client, as one op."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from fedsa_kernels.dispatch import Choice, kernels_for
from fedsa_kernels.dropout import keys_of_vectors
from fedsa_kernels.eager import either_way, gradients_by_op
from fedsa_kernels.lora_linear import reference
from fedsa_kernels.operands import (
    Gradients,
    in_one_dtype,
    require_factors,
    require_segments,
    require_shapes,
    rows_of,
    without_autocast,
)


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    p: float,
    keys: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    choice = _kernels(x, A, B, backend)
    if choice is None:
        return reference.forward(x, weight, bias, A, B, scaling, p, keys)
    from fedsa_kernels.lora_linear import triton  # not every machine has it

    fused = choice.backend == "fused"
    return triton.forward(x, weight, bias, A, B, scaling, p, keys, choice.tiles, fused)


def _kernels(x: Tensor, A: Tensor, B: Tensor, backend: str | None) -> Choice | None:
    clients, rank, d_in = A.shape
    return kernels_for("lora_linear", x, d_in, B.shape[1], rank, clients, backend)


_forward_op = torch.library.custom_op("fedsa::lora_linear", _forward, mutates_args=())


@_forward_op.register_fake
def _forward_fake(
    x: Tensor, weight: Any, bias: Any, A: Tensor, B: Tensor, *_others: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], B.shape[1]), x.new_empty(x.shape[0], A.shape[1])


@without_autocast
def _gradients(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    p: float,
    keys: Tensor | None,
    backend: str | None,
    needs: list[bool],
) -> Gradients:
    """Gradients of x, A and B; None for those that are not needed."""
    operands = (dy, x, xa, weight, A, B, scaling, p, keys, needs)
    choice = _kernels(x, A, B, backend)
    if choice is None:
        return reference.backward(*operands)
    from fedsa_kernels.lora_linear import triton

    return triton.backward(*operands, choice.tiles, choice.backend == "fused")


def _gradients_fake(
    dy: Tensor, x: Tensor, xa: Tensor, weight: Any, A: Tensor, B: Tensor, *others: Any
) -> list[Tensor]:
    needs = others[-1]
    return [x.new_empty(t.shape) for t, needed in zip((x, A, B), needs, strict=True) if needed]


_gradients_by_op = gradients_by_op("fedsa::lora_linear_backward", _gradients, _gradients_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _bias, A, B, scaling, p, keys, backend = inputs
    ctx.save_for_backward(x, output[1], weight, A, B, keys)
    ctx.scaling, ctx.p, ctx.backend = scaling, p, backend
    ctx.set_materialize_grads(False)


def _backward(
    gradients: Callable[..., Gradients], ctx: Any, dy: Tensor | None, _dxa: Tensor | None
) -> Gradients:
    if dy is None:
        return (None,) * len(ctx.needs_input_grad)
    x, xa, weight, A, B, keys = ctx.saved_tensors
    needed = ctx.needs_input_grad
    needs = [needed[0], needed[3], needed[4]]
    settings = (ctx.scaling, ctx.p, keys, ctx.backend, needs)
    dx, dA, dB = gradients(dy.contiguous(), rows_of(x), xa, weight, A, B, *settings)
    return dx, None, None, dA, dB, None, None, None, None


_forward_op.register_autograd(partial(_backward, _gradients_by_op), setup_context=_setup_context)


_run = either_way(_forward_op, _forward, _setup_context, partial(_backward, _gradients))


def lora_linear(
    x: Float[Tensor, "... d_in"],
    weight: Float[Tensor, "d_out d_in"] | None,
    bias: Float[Tensor, " d_out"] | None,
    A: Float[Tensor, "client r d_in"],
    B: Float[Tensor, "client d_out r"],
    scaling: float,
    *,
    dropout: float = 0.0,
    keys: Int32[Tensor, "..."] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "... d_out"]:
    """Frozen linear layer plus the adapter of the client each row belongs to.

    For the rows of client c: ``y = x·Wᵀ + bias + scaling · dropout(x)·A_cᵀ·B_cᵀ``.

    Args:
        x: client-major: all rows of client 0, then all of client 1, …, in equal segments. Any
            number of leading dimensions; the first one runs over the rows.
        weight: frozen; receives no gradient. None for the adapter's branch alone, where the
            frozen layer has a forward of its own.
        bias: frozen; receives no gradient.
        A: one factor per client.
        B: one factor per client.
        scaling: alpha/r for LoRA, alpha/√r for rsLoRA.
        dropout: probability of dropping an input of the adapter; only where keys are given.
        keys: one dropout key per vector of x (see ``fedsa_kernels.dropout``); None for no dropout.
        backend: "reference", "cublas" or "fused"; by default what is fastest, see
            ``fedsa_kernels.dispatch``.

    Returns:
        y, with the leading dimensions of x.

    Raises:
        ValueError: if the rows of x cannot be split into one equal segment per client, the backend
            cannot run here, the shapes of operands do not fit, naming one, or operands are no
            floating point or on two devices.

    Source: Hu et al., LoRA (ICLR 2022), §4.1.
    """
    x, weight, bias, A, B = in_one_dtype(x, weight, bias, A, B)
    require_factors("lora_linear", x, 3, ("A", A), ("B", B))
    (clients, rank, _), d_in, d_out = A.shape, x.shape[-1], B.shape[1]
    require_shapes(
        "lora_linear",
        ("A", A, (clients, rank, d_in)),
        ("B", B, (clients, d_out, rank)),
        ("weight", weight, (d_out, d_in)),
        ("bias", bias, (d_out,)),
    )
    require_segments(x, clients, "lora_linear")
    of_rows = keys_of_vectors(x, keys, dropout, "lora_linear")
    return _run(x, weight, bias, A, B, scaling, dropout, of_rows, backend)
