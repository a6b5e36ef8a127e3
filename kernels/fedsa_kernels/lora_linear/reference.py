"""LoRA linear in plain torch, forward and backward: the truth, and the CPU path.

Order of work: the adapter's product (with bias) is written first and the frozen product is
accumulated onto it (``beta=1``), so that the output is never read back by a pass of its own.
"""

from collections.abc import Sequence

from torch import Tensor

from fedsa_kernels.dropout import dropout_factors
from fedsa_kernels.operands import by_client, onto_bias, per_client, rows_of, scaled


def short_side_first(wide: Tensor) -> bool:
    """Whether a product with a narrow side is better made transposed.

    MKL is faster that way round by more than a copy takes, which the simulator's benchmark shows.
    On a GPU the copy would be a launch more.
    """
    return not wide.is_cuda


def narrow(left: Tensor, right: Tensor, scaling: float = 1.0) -> Tensor:
    """scaling·right·leftᵀ for a left of few rows; on a CPU a view. [*C, m, r]"""
    if short_side_first(right):
        return scaled(left, right.mT, scaling).mT
    return scaled(right, left.mT, scaling)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    p: float,
    keys: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs y and the product xa = dropout(x)·Aᵀ that the backward pass needs.

    Shapes: x [C·m, d_in], weight [d_out, d_in], bias [d_out], A [C, r, d_in], B [C, d_out, r],
    keys [C·m]; y [C·m, d_out], xa [C·m, r].
    """
    clients = A.shape[0]
    factors = dropout_factors(x, keys, p)
    dropped = x if factors is None else x * factors
    xa = narrow(per_client(A), by_client(dropped, clients)).contiguous()
    y = frozen_onto(x, weight, bias, xa, per_client(B), scaling)
    return y, rows_of(xa)


def frozen_onto(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, xa: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """The frozen product, accumulated onto ``bias + scaling·xa·Bᵀ``.

    Shapes: xa and B as ``by_client`` and ``per_client`` give them; the others as in ``forward``.
    """
    y = rows_of(onto_bias(bias, xa, B.mT, scaling))
    return y if weight is None else y.addmm_(x, weight.t())


def outer_grad(dy: Tensor, xa: Tensor, scaling: float) -> Tensor:
    """The gradient of B. dy [*C, m, d_out], xa [*C, m, r]; returns [*C, d_out, r]"""
    if short_side_first(dy):
        return scaled(xa.mT, dy, scaling).mT.contiguous()
    return scaled(dy.mT, xa, scaling)


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, A and B; each is None unless ``needs`` asks for it.

    Shapes: dy [C·m, d_out]; the others as in ``forward``.
    """
    needs_x, needs_a, needs_b = needs
    clients = A.shape[0]
    segments = by_client(dy, clients)
    dB = None
    if needs_b:
        dB = outer_grad(segments, by_client(xa, clients), scaling).view_as(B)
    if not needs_x and not needs_a:
        return None, None, dB
    dxa = narrow(per_client(B).mT, segments, scaling)  # [*C, m, r]
    factors = dropout_factors(x, keys, p)
    dA = None
    if needs_a:
        dropped = x if factors is None else x * factors
        dA = (dxa.mT @ by_client(dropped, clients)).view_as(A)
    dx = None
    if needs_x:
        dx = rows_of(dxa @ per_client(A))
        dx = dx if factors is None else dx.mul_(factors)
        dx = dx if weight is None else dx.addmm_(dy, weight)
    return dx, dA, dB
