"""Random operands of `lora_linears`, as one case of `lora_linear` for each of its layers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from adapter_cases import D_IN, SCALING, LoraCase, check_near, lora_case
from torch import Tensor

from fedsa_kernels import lora_linears

GROUPED_QUERIES = ((23, 5), (11, 5), (11, 3))
"""d_out and rank of each layer; keys and values are narrower than queries."""


@dataclass(frozen=True)
class LinearsCase:
    """Layers of one x."""

    layers: tuple[LoraCase, ...]

    @property
    def x(self) -> Tensor:
        return self.layers[0].x

    @property
    def trained(self) -> list[Tensor]:
        return [self.x, *(each.A for each in self.layers), *(each.B for each in self.layers)]

    def run(self, **options: Any) -> tuple[Tensor, ...]:
        columns = zip(*((k.weight, k.bias, k.A, k.B) for k in self.layers), strict=True)
        weights, biases, As, Bs = map(list, columns)
        return lora_linears(self.x, weights, biases, As, Bs, SCALING, **options)

    def plain(self) -> tuple[list[Tensor], list[Tensor]]:
        """All y and the gradients of the sum of all y² for x, all A and all B, in float64.

        Every layer by itself; what they give x is added up.
        """
        ys, gradients = zip(*(each.plain() for each in self.layers), strict=True)
        dx, dA, dB = zip(*gradients, strict=True)
        return list(ys), [torch.stack(dx).sum(0), *dA, *dB]


def linears_case(
    *,
    clients: int = 3,
    shape: Sequence[int] = (6, 7),
    bias: Sequence[bool] = (True, False, True),
    dtype: torch.dtype = torch.float64,
    needs: Sequence[bool] | None = None,
    sizes: Sequence[tuple[int, int]] = GROUPED_QUERIES,
    d_in: int = D_IN,
    scale: float = 1.0,
) -> LinearsCase:
    """Random inputs; ``needs`` says which of x, all A and all B want a gradient."""
    needs = needs or [True] * (1 + 2 * len(sizes))
    stream = torch.Generator().manual_seed(2)
    layers: list[LoraCase] = []
    for k, (d_out, rank) in enumerate(sizes):
        own = (needs[0], needs[1 + k], needs[1 + k + len(sizes)])
        case = lora_case(
            clients=clients, shape=shape, bias=bias[k], needs=own, sizes=(d_in, d_out, rank)
        )
        other = {
            name: torch.randn(tensor.shape, generator=stream, dtype=torch.float64).to(dtype) * scale
            for name in ("weight", "bias", "A", "B")
            if (tensor := getattr(case, name)) is not None
        }
        other["A"].requires_grad_(own[1])
        other["B"].requires_grad_(own[2])
        x = layers[0].x if layers else case.x.detach().to(dtype).requires_grad_(own[0])
        layers.append(replace(case, x=x, **other))
    return LinearsCase(tuple(layers))


def loss(ys: Sequence[Tensor]) -> Tensor:
    return torch.stack([y.double().square().sum() for y in ys]).sum()


def check_linears(case: LinearsCase, tolerance: float, **options: Any) -> None:
    """All outputs, and the gradients of what wants one, each in the dtype of its own tensor."""
    expected, gradients = case.plain()
    ys = case.run(**options)
    for y, theirs in zip(ys, expected, strict=True):
        assert y.dtype == case.x.dtype
        check_near(y, theirs, tolerance)
    wanted = [tensor for tensor in case.trained if tensor.requires_grad]
    found = iter(torch.autograd.grad(loss(ys), wanted) if wanted else ())
    for tensor, theirs in zip(case.trained, gradients, strict=True):
        if tensor.requires_grad:
            ours = next(found)
            assert ours.dtype == tensor.dtype
            check_near(ours, theirs, tolerance)
