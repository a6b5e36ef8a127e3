"""``lora_linears`` on Triton kernels: x is read once for all A, and once for their gradients.

The orders of work are those of ``lora_linear``. The gradient of x starts as one product of rank Σr;
the frozen products are accumulated onto it, with ``fused`` all but the first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsa_kernels.lora_linear.triton import through
from fedsa_kernels.lora_linears.reference import parts
from fedsa_kernels.operands import rows_of, segments
from fedsa_kernels.products.factor_grad import factor_grad
from fedsa_kernels.products.frozen_linear import expand, frozen_linear_onto
from fedsa_kernels.products.shrink import shrink
from fedsa_kernels.tiles import Tiles


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    A: Tensor,
    Bs: Sequence[Tensor],
    scaling: float,
    tiles: Tiles,
    fused: bool,
) -> tuple[list[Tensor], Tensor]:
    """As ``reference.forward``, in the same shapes."""
    xa = shrink(x, A.transpose(1, 2), 1.0, tiles.shrink)
    ys = []
    for weight, bias, part, B in zip(weights, biases, parts(xa, Bs), Bs, strict=True):
        if fused:
            ys.append(frozen_linear_onto(x, weight, bias, part, B, scaling, tiles.frozen))
        else:
            ys.append(expand(part, B, bias, scaling, tiles.expand).addmm_(x, weight.t()))
    return ys, rows_of(xa)


def backward(
    dys: Sequence[Tensor],
    x: Tensor,
    xa: Tensor,
    weights: Sequence[Tensor],
    A: Tensor,
    Bs: Sequence[Tensor],
    scaling: float,
    needs: Sequence[bool],
    tiles: Tiles,
    fused: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """As ``reference.backward``, in the same shapes."""
    needs_x, needs_a, *needs_b = needs
    xa = segments(xa, A.shape[0])
    dBs: list[Tensor | None] = [None] * len(Bs)
    narrow = []
    for k, (dy, part, B) in enumerate(zip(dys, parts(xa, Bs), Bs, strict=True)):
        if not needs_x and not needs_a:
            dBs[k] = factor_grad(dy, part, scaling, tiles.factor) if needs_b[k] else None
        else:
            found, dBs[k] = through(dy, B, part, scaling, tiles, needs_b[k])
            narrow.append(found)
    if not narrow:
        return None, None, dBs
    dxa = torch.cat(narrow, 2)
    dA = factor_grad(x, dxa, 1.0, tiles.factor, rank_first=True) if needs_a else None
    if not needs_x:
        return None, dA, dBs
    left = list(zip(dys, weights, strict=True))
    P = A.transpose(1, 2)
    if fused:
        dy, weight = left.pop(0)
        dx = frozen_linear_onto(dy, weight.t(), None, dxa, P, 1.0, tiles.frozen)
    else:
        dx = expand(dxa, P, None, 1.0, tiles.expand)
    for dy, weight in left:
        dx.addmm_(dy, weight)
    return dx, dA, dBs
