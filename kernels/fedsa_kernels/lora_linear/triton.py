"""``lora_linear`` on Triton kernels, in two orders of work.

``cublas``: the adapter's product is written first and torch's own matrix product accumulates the
frozen one onto it. ``fused``: one kernel makes both, or all but the narrow product. Their backward
passes differ in the gradient of x alone. One pass over dy gives the gradient of B and what goes
back through it, where the tiles do not ask for two.
"""

from collections.abc import Sequence

from torch import Tensor

from fedsa_kernels.launch import Dropout
from fedsa_kernels.operands import rows_of, segments
from fedsa_kernels.products.factor_grad import factor_grad
from fedsa_kernels.products.frozen_linear import expand, frozen_linear, frozen_linear_onto
from fedsa_kernels.products.shrink import shrink, shrink_with_factor_grad
from fedsa_kernels.tiles import Tiles


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    p: float,
    keys: Tensor | None,
    tiles: Tiles,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """As ``reference.forward``, in the same shapes."""
    dropout = Dropout.of(keys, p)
    if fused and weight is not None and tiles.fused is not None:
        y, xa = frozen_linear(x, weight, bias, A, B, scaling, tiles.fused, dropout)
        return y, rows_of(xa)
    xa = shrink(x, A.transpose(1, 2), 1.0, tiles.shrink, dropout)
    if fused and weight is not None:
        return frozen_linear_onto(x, weight, bias, xa, B, scaling, tiles.frozen), rows_of(xa)
    y = expand(xa, B, bias, scaling, tiles.expand)
    return y if weight is None else y.addmm_(x, weight.t()), rows_of(xa)


def backward(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    p: float,
    keys: Tensor | None,
    needs: Sequence[bool],
    tiles: Tiles,
    fused: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As ``reference.backward``, in the same shapes."""
    needs_x, needs_a, needs_b = needs
    dropout, xa = Dropout.of(keys, p), segments(xa, A.shape[0])
    if not needs_x and not needs_a:
        return None, None, factor_grad(dy, xa, scaling, tiles.factor) if needs_b else None
    dxa, dB = through(dy, B, xa, scaling, tiles, needs_b)
    dA = factor_grad(x, dxa, 1.0, tiles.factor, dropout, rank_first=True) if needs_a else None
    if not needs_x:
        return None, dA, dB
    P = A.transpose(1, 2)
    if fused and weight is not None:
        turned = weight.t()
        dx = frozen_linear_onto(dy, turned, None, dxa, P, 1.0, tiles.frozen, dropout=dropout)
        return dx, dA, dB
    dx = expand(dxa, P, None, 1.0, tiles.expand, dropout=dropout)
    return dx if weight is None else dx.addmm_(dy, weight), dA, dB


def through(
    dy: Tensor, B: Tensor, xa: Tensor, scaling: float, tiles: Tiles, needs_b: bool
) -> tuple[Tensor, Tensor | None]:
    """What goes back through B, and the gradient of B: by one pass over dy, or by two.

    Shapes: dy [C·m, d_out], B [C, d_out, r], xa [C, m, r]; returns [C, m, r] and [C, d_out, r].
    """
    if needs_b and tiles.both is not None:
        return shrink_with_factor_grad(dy, B, xa, scaling, tiles.both)
    dxa = shrink(dy, B, scaling, tiles.shrink)
    return dxa, factor_grad(dy, xa, scaling, tiles.factor) if needs_b else None
