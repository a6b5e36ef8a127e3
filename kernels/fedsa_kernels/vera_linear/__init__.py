"""``vera_linear``: a frozen linear layer with one VeRA adapter per client, as one op."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from fedsa_kernels.dispatch import Choice, kernels_for
from fedsa_kernels.dropout import keys_of_vectors
from fedsa_kernels.eager import either_way, gradients_by_op
from fedsa_kernels.operands import (
    Gradients,
    in_one_dtype,
    require_factors,
    require_segments,
    require_shapes,
    without_autocast,
)
from fedsa_kernels.vera_linear import reference


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    d: Tensor,
    b: Tensor,
    p: float,
    keys: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    choice = _kernels(x, A, b, d, backend)
    if choice is None:
        return reference.forward(x, weight, bias, A, B, d, b, p, keys)
    from fedsa_kernels.vera_linear import triton  # not every machine has it

    fused = choice.backend == "fused"
    return triton.forward(x, weight, bias, A, B, d, b, p, keys, choice.tiles, fused)


def _kernels(x: Tensor, A: Tensor, b: Tensor, d: Tensor, backend: str | None) -> Choice | None:
    clients, rank = d.shape
    return kernels_for("vera_linear", x, A.shape[1], b.shape[1], rank, clients, backend)


_forward_op = torch.library.custom_op("fedsa::vera_linear", _forward, mutates_args=())


@_forward_op.register_fake
def _forward_fake(
    x: Tensor, weight: Any, bias: Any, A: Any, B: Any, d: Tensor, b: Tensor, *_others: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], b.shape[1]), x.new_empty(x.shape[0], d.shape[1])


@without_autocast
def _gradients(
    dy: Tensor,
    xa: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    d: Tensor,
    b: Tensor,
    p: float,
    keys: Tensor | None,
    backend: str | None,
    needs: list[bool],
) -> Gradients:
    """Gradients of x, d and b; None for those that are not needed."""
    operands = (dy, xa, weight, A, B, d, b, p, keys, needs)
    choice = _kernels(dy, A, b, d, backend)
    if choice is None:
        return reference.backward(*operands)
    from fedsa_kernels.vera_linear import triton

    return triton.backward(*operands, choice.tiles, choice.backend == "fused")


def _gradients_fake(
    dy: Tensor, xa: Any, weight: Any, A: Tensor, B: Any, d: Tensor, b: Tensor, *others: Any
) -> list[Tensor]:
    needs = others[-1]
    shapes = ((dy.shape[0], A.shape[1]), d.shape, b.shape)
    return [dy.new_empty(shape) for shape, need in zip(shapes, needs, strict=True) if need]


_gradients_by_op = gradients_by_op("fedsa::vera_linear_backward", _gradients, _gradients_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _x, weight, _bias, A, B, d, b, p, keys, backend = inputs
    ctx.save_for_backward(output[1], weight, A, B, d, b, keys)
    ctx.p, ctx.backend = p, backend
    ctx.set_materialize_grads(False)


def _backward(
    gradients: Callable[..., Gradients], ctx: Any, dy: Tensor | None, _dxa: Tensor | None
) -> Gradients:
    if dy is None:
        return (None,) * len(ctx.needs_input_grad)
    xa, weight, A, B, d, b, keys = ctx.saved_tensors
    needed = ctx.needs_input_grad
    needs = [needed[0], needed[5], needed[6]]
    settings = (ctx.p, keys, ctx.backend, needs)
    dx, dd, db = gradients(dy.contiguous(), xa, weight, A, B, d, b, *settings)
    return dx, None, None, None, None, dd, db, None, None, None


_forward_op.register_autograd(partial(_backward, _gradients_by_op), setup_context=_setup_context)


_run = either_way(_forward_op, _forward, _setup_context, partial(_backward, _gradients))


def vera_linear(
    x: Float[Tensor, "... d_in"],
    weight: Float[Tensor, "d_out d_in"] | None,
    bias: Float[Tensor, " d_out"] | None,
    A: Float[Tensor, "r d_in"],
    B: Float[Tensor, "d_out r"],
    d: Float[Tensor, "client r"],
    b: Float[Tensor, "client d_out"],
    *,
    dropout: float = 0.0,
    keys: Int32[Tensor, "..."] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "... d_out"]:
    """Frozen linear layer plus the VeRA adapter of the client each row belongs to.

    For the rows of client c: ``y = x·Wᵀ + bias + b_c ∘ ((d_c ∘ (dropout(x)·Aᵀ))·Bᵀ)``.

    Args:
        x: client-major: all rows of client 0, then all of client 1, …, in equal segments. Any
            number of leading dimensions; the first one runs over the rows.
        weight: frozen; receives no gradient. None for the adapter's branch alone, where the
            frozen layer has a forward of its own.
        bias: frozen; receives no gradient.
        A: frozen and random, the same for all clients; receives no gradient.
        B: frozen and random, the same for all clients; receives no gradient.
        d: scales the r inner values; one vector per client.
        b: scales the outputs; one vector per client.
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

    Source: Kopiczko et al., VeRA (ICLR 2024), §3.1, equation 2.
    """
    x, weight, bias, A, B, d, b = in_one_dtype(x, weight, bias, A, B, d, b)
    d, b = d.contiguous(), b.contiguous()
    require_factors("vera_linear", x, 2, ("d", d), ("b", b))
    clients, rank = d.shape
    d_in, d_out = x.shape[-1], b.shape[1]
    require_shapes(
        "vera_linear",
        ("A", A, (rank, d_in)),
        ("B", B, (d_out, rank)),
        ("b", b, (clients, d_out)),
        ("weight", weight, (d_out, d_in)),
        ("bias", bias, (d_out,)),
    )
    require_segments(x, clients, "vera_linear")
    of_rows = keys_of_vectors(x, keys, dropout, "vera_linear")
    return _run(x, weight, bias, A, B, d, b, dropout, of_rows, backend)
