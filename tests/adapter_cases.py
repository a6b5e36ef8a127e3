"""Random operands of the two adapter ops, and what these should make of them in float64."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsa_kernels import keep_mask, lora_linear, vera_linear

D_IN, D_OUT, RANK, SCALING, P = 37, 23, 5, 1.7, 0.3
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}
"""Largest error over the largest expected value."""


@dataclass(frozen=True)
class LoraCase:
    """Operands of ``lora_linear``."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    A: Tensor
    B: Tensor
    keys: Tensor | None = None

    @property
    def trained(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.A, self.B

    def run(self, op: Callable[..., Tensor] = lora_linear, **options: Any) -> Tensor:
        p = 0.0 if self.keys is None else P
        inputs = (self.x, self.weight, self.bias, self.A, self.B, SCALING)
        return op(*inputs, dropout=p, keys=self.keys, **options)

    def check_ops(self, backend: str | None = None, needs: Sequence[bool] = (True,) * 3) -> None:
        """The op and its backward pass under the rules of torch.library. x [row, d_in]"""
        factors, settings = (self.A, self.B), (SCALING, P, self.keys, backend)
        forward = (self.x, self.weight, self.bias, *factors, *settings)
        torch.library.opcheck(torch.ops.fedsa.lora_linear.default, forward)
        y, xa = (t.detach() for t in torch.ops.fedsa.lora_linear(*forward))
        x, A, B = (t.detach() for t in self.trained)
        backward = (y, x, xa, self.weight, A, B, *settings, list(needs))
        torch.library.opcheck(torch.ops.fedsa.lora_linear_backward.default, backward)

    def plain(self) -> tuple[Tensor, list[Tensor]]:
        """y and the gradients of sum(y²) for x, A, B, from the formula, client by client."""
        x, A, B = (t.detach().double().requires_grad_() for t in self.trained)
        updates = [SCALING * B[c] @ A[c] for c in range(len(A))]
        return _plain(self, x, updates, (x, A, B))


@dataclass(frozen=True)
class VeraCase:
    """Operands of ``vera_linear``."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    A: Tensor
    B: Tensor
    d: Tensor
    b: Tensor
    keys: Tensor | None = None

    @property
    def trained(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.d, self.b

    def run(self, op: Callable[..., Tensor] = vera_linear, **options: Any) -> Tensor:
        p = 0.0 if self.keys is None else P
        inputs = (self.x, self.weight, self.bias, self.A, self.B, self.d, self.b)
        return op(*inputs, dropout=p, keys=self.keys, **options)

    def check_ops(self, backend: str | None = None, needs: Sequence[bool] = (True,) * 3) -> None:
        """The op and its backward pass under the rules of torch.library. x [row, d_in]"""
        frozen, vectors, settings = (self.A, self.B), (self.d, self.b), (P, self.keys, backend)
        forward = (self.x, self.weight, self.bias, *frozen, *vectors, *settings)
        torch.library.opcheck(torch.ops.fedsa.vera_linear.default, forward)
        y, xa = (t.detach() for t in torch.ops.fedsa.vera_linear(*forward))
        backward = (y, xa, self.weight, *frozen, *(t.detach() for t in vectors), *settings)
        torch.library.opcheck(
            torch.ops.fedsa.vera_linear_backward.default, (*backward, list(needs))
        )

    def plain(self) -> tuple[Tensor, list[Tensor]]:
        """y and the gradients of sum(y²) for x, d, b, from the formula, client by client."""
        x, d, b = (t.detach().double().requires_grad_() for t in self.trained)
        A, B = self.A.double(), self.B.double()
        updates = [torch.diag(b[c]) @ B @ torch.diag(d[c]) @ A for c in range(len(d))]
        return _plain(self, x, updates, (x, d, b))


Case = LoraCase | VeraCase


def _plain(
    case: Case, x: Tensor, updates: Sequence[Tensor], trained: tuple[Tensor, ...]
) -> tuple[Tensor, list[Tensor]]:
    flat = x.reshape(-1, x.shape[-1])
    dropped = flat
    if case.keys is not None:
        dropped = flat * keep_mask(case.keys.reshape(-1), x.shape[-1], P) / (1 - P)
    bias = 0.0 if case.bias is None else case.bias.double()
    size = len(flat) // len(updates)
    segments = []
    for c, update in enumerate(updates):
        rows = slice(c * size, (c + 1) * size)
        frozen = 0.0 if case.weight is None else flat[rows] @ case.weight.double().T
        segments.append(frozen + bias + dropped[rows] @ update.T)
    y = torch.cat(segments).reshape(*x.shape[:-1], updates[0].shape[0])
    return y.detach(), list(torch.autograd.grad(y.square().sum(), trained))


class _Stream:
    """Draws in float64, given in the dtype that is asked for."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._generator, self._dtype = torch.Generator().manual_seed(1), dtype

    def draw(self, *sizes: int, needed: bool = False) -> Tensor:
        values = torch.randn(*sizes, generator=self._generator, dtype=torch.float64)
        return values.to(self._dtype).requires_grad_(needed)

    def keys(self, shape: Sequence[int]) -> Tensor:
        words = (-(2**31), 2**31, tuple(shape))
        return torch.randint(*words, generator=self._generator, dtype=torch.int32)


def lora_case(
    *,
    clients: int = 3,
    shape: Sequence[int] = (6, 7),
    weight: bool = True,
    bias: bool = True,
    dropout: bool = False,
    dtype: torch.dtype = torch.float64,
    needs: Sequence[bool] = (True, True, True),
    sizes: tuple[int, int, int] = (D_IN, D_OUT, RANK),
) -> LoraCase:
    """Random inputs; ``needs`` says which of x, A and B want a gradient."""
    (d_in, d_out, rank), stream = sizes, _Stream(dtype)
    keys = stream.keys(shape)
    return LoraCase(
        x=stream.draw(*shape, d_in, needed=needs[0]),
        weight=stream.draw(d_out, d_in) if weight else None,
        bias=stream.draw(d_out) if bias else None,
        A=stream.draw(clients, rank, d_in, needed=needs[1]),
        B=stream.draw(clients, d_out, rank, needed=needs[2]),
        keys=keys if dropout else None,
    )


def vera_case(
    *,
    clients: int = 3,
    shape: Sequence[int] = (6, 7),
    weight: bool = True,
    bias: bool = True,
    dropout: bool = False,
    dtype: torch.dtype = torch.float64,
    needs: Sequence[bool] = (True, True, True),
    sizes: tuple[int, int, int] = (D_IN, D_OUT, RANK),
) -> VeraCase:
    """Random inputs; ``needs`` says which of x, d and b want a gradient."""
    (d_in, d_out, rank), stream = sizes, _Stream(dtype)
    keys = stream.keys(shape)
    return VeraCase(
        x=stream.draw(*shape, d_in, needed=needs[0]),
        weight=stream.draw(d_out, d_in) if weight else None,
        bias=stream.draw(d_out) if bias else None,
        A=stream.draw(rank, d_in),
        B=stream.draw(d_out, rank),
        d=stream.draw(clients, rank, needed=needs[1]),
        b=stream.draw(clients, d_out, needed=needs[2]),
        keys=keys if dropout else None,
    )


def check_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest error within tolerance times the largest expected value."""
    assert actual.shape == expected.shape
    error = (actual.detach().double() - expected).abs().max()
    assert error <= tolerance * expected.abs().max()


def check_equal_to_plain(case: Case, tolerance: float, **options: Any) -> None:
    """Output and all gradients, each gradient in the dtype of its own tensor."""
    expected, gradients = case.plain()
    y = case.run(**options)
    check_near(y, expected, tolerance)
    actual = torch.autograd.grad(y.double().square().sum(), case.trained)
    for ours, theirs, tensor in zip(actual, gradients, case.trained, strict=True):
        assert ours.dtype == tensor.dtype
        check_near(ours, theirs, tolerance)


def check_no_rows(make: Callable[..., Case], backend: str | None) -> None:
    """Nothing in, nothing out, and gradients of zero, as from nn.Linear."""
    case = make(shape=(0, 7), dropout=True)
    y = case.run(backend=backend)
    assert y.shape == (0, 7, D_OUT)
    for gradient, tensor in zip(
        torch.autograd.grad(y.sum(), case.trained), case.trained, strict=True
    ):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def check_second_derivative_is_refused(case: Case) -> None:
    """xa is kept as a number, so a second derivative would miss terms without a word.

    Of a sum as well, where nothing that the backward pass is given wants a gradient.
    """
    for of in (torch.Tensor.sum, lambda y: y.square().sum()):
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(of(case.run()), [case.x], create_graph=True)
