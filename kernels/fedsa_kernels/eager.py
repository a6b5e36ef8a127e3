"""Both ways into an op: through ``torch.library``, and in eager mode past it.

Its way into Python and back takes longer than a small layer (docs/decisions, 17).
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from fedsa_kernels.operands import Gradients, rows_of


def refuse_a_second() -> None:
    """In a backward pass: refuse to be a part of a graph for second derivatives.

    The narrow products are kept as numbers, so one would miss terms without a word. Gradients are
    recorded in a backward pass only where a second derivative may follow.

    Raises:
        RuntimeError: under ``create_graph=True``.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "an adapter's layer is differentiable once: its backward pass cannot run under "
            "create_graph=True"
        )


def gradients_by_op(
    name: str, gradients: Callable[..., Gradients], fake: Callable[..., list[Tensor]]
) -> Callable[..., Gradients]:
    """A backward pass through an op of ``torch.library``, whose results have no gaps.

    Args:
        name: of the op that is registered.
        gradients: the last operand says, for each gradient, whether it is needed.
        fake: likewise, of the needed ones their shapes alone.
    """

    @wraps(gradients)
    def needed(*operands: Any) -> list[Tensor]:
        return [each for each in gradients(*operands) if each is not None]

    declared = signature(gradients).replace(return_annotation=list[Tensor])
    needed.__signature__ = declared  # type: ignore[attr-defined]
    op = torch.library.custom_op(name, needed, mutates_args=())
    op.register_fake(fake)

    def run(*operands: Any) -> Gradients:
        found = iter(op(*operands))
        return tuple(next(found) if need else None for need in operands[-1])

    return run


def either_way(
    op: Callable[..., tuple[Tensor, Tensor]],
    forward: Callable[..., tuple[Tensor, Tensor]],
    setup_context: Callable[..., None],
    backward: Callable[..., Gradients],
) -> Callable[..., Tensor]:
    """The first output of an op, differentiable once, for an x of any number of dimensions.

    Args:
        op: registered with ``torch.library``, which ``torch.compile`` needs.
        forward: what it runs; gives the output and what the backward pass needs of it. The first
            operand is x, as a matrix.
        setup_context: as ``torch.library.register_autograd`` takes it; given x as it is.
        backward: likewise, of the gradients of both outputs.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, *others: Any) -> Tensor:
            # Shapes change in here, where autograd does not follow.
            output = forward(rows_of(x), *others)
            # Torch's own way to set up binds the signature every time.
            setup_context(ctx, (x, *others), output)
            ctx.shape, y = x.shape, output[0]
            # Without ``data`` it may be a view, which nobody may change in place.
            return (y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])).data

        @staticmethod
        def backward(ctx: Any, dy: Tensor | None) -> Gradients:
            if dy is None:
                return (None,) * len(ctx.needs_input_grad)
            refuse_a_second()
            dx, *others = backward(ctx, rows_of(dy), None)
            if dx is not None and len(ctx.shape) != 2:
                dx = dx.view(ctx.shape)
            return dx, *others

    def run(x: Tensor, *others: Any) -> Tensor:
        if torch.compiler.is_compiling():
            y = op(rows_of(x), *others)[0]
            return y.view(*x.shape[:-1], y.shape[1])
        found: Tensor = Eager.apply(x, *others)  # type: ignore[no-untyped-call]
        return found

    return run
