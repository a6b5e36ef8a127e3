"""Ops outside of ``torch.compile``, without ``torch.library``.

Its way into Python and back takes longer than a small layer (docs/decisions, 17).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Gradients = tuple[Tensor | None, ...]


def eager(
    forward: Callable[..., tuple[Tensor, Tensor]],
    setup_context: Callable[..., None],
    backward: Callable[..., Gradients],
) -> Callable[..., Tensor]:
    """The first output of an op, differentiable once.

    Args:
        forward: gives the output and what the backward pass needs of it.
        setup_context: as ``torch.library.register_autograd`` takes it.
        backward: likewise, of the gradients of both outputs.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            output = forward(*inputs)
            setup_context(ctx, inputs, output)  # torch's own way binds the signature every time
            return output[0]

        @staticmethod
        @once_differentiable  # xa is kept as a number: a second derivative would miss a term
        def backward(ctx: Any, *gradients: Tensor | None) -> Gradients:
            return backward(ctx, *gradients, None)

    apply: Any = Eager.apply
    return apply  # type: ignore[no-any-return]
