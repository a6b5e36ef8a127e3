"""``vera_linear`` on Triton kernels, in the two orders of work of ``lora_linear``.

The gradients of d and b are sums that the kernels of the two wide passes take on their way out, so
nothing of the size of y is kept besides y.
"""

from collections.abc import Sequence

from torch import Tensor

from fedsa_kernels.launch import Dropout
from fedsa_kernels.operands import rows_of, segments
from fedsa_kernels.products.factor_grad import factor_dots
from fedsa_kernels.products.frozen_linear import expand, frozen_linear_onto
from fedsa_kernels.products.shrink import shrink, shrink_with_dots
from fedsa_kernels.tiles import Tiles


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    d: Tensor,
    b: Tensor,
    p: float,
    keys: Tensor | None,
    tiles: Tiles,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """As ``reference.forward``, in the same shapes."""
    clients = d.shape[0]
    xa = shrink(x, _for_all(A.t(), clients), 1.0, tiles.shrink, Dropout.of(keys, p))
    P, scales = _for_all(B, clients), (b, d)
    if fused and weight is not None:
        y = frozen_linear_onto(x, weight, bias, xa, P, 1.0, tiles.frozen, scales)
        return y, rows_of(xa)
    y = expand(xa, P, bias, 1.0, tiles.expand, scales)
    return y if weight is None else y.addmm_(x, weight.t()), rows_of(xa)


def backward(
    dy: Tensor,
    xa: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    d: Tensor,
    b: Tensor,
    p: float,
    keys: Tensor | None,
    needs: Sequence[bool],
    tiles: Tiles,
    fused: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As ``reference.backward``, in the same shapes."""
    needs_x, needs_d, needs_b = needs
    clients = d.shape[0]
    xa = segments(xa, clients)
    db = factor_dots(dy, xa, B.contiguous(), d.contiguous(), tiles.factor) if needs_b else None
    if not needs_x and not needs_d:
        return None, None, db
    dxa, dd = shrink_with_dots(dy, _for_all(B, clients), xa, b, d, tiles.both or tiles.shrink)
    if not needs_x:
        return None, dd, db
    P, dropout = _for_all(A.t(), clients), Dropout.of(keys, p)
    if fused and weight is not None:
        turned = weight.t()
        dx = frozen_linear_onto(dy, turned, None, dxa, P, 1.0, tiles.frozen, dropout=dropout)
    else:
        dx = expand(dxa, P, None, 1.0, tiles.expand, dropout=dropout)
        dx = dx if weight is None else dx.addmm_(dy, weight)
    return dx, dd if needs_d else None, db


def _for_all(matrix: Tensor, clients: int) -> Tensor:
    """The same frozen matrix for every client, without a copy. [C, …]"""
    return matrix.expand(clients, -1, -1)
