"""VeRA linear in plain torch, forward and backward: the truth, and the CPU path.

The vectors are folded into the small factors (``diag(b)·B`` is [d_out, r]), so that nothing of the
size of the output is made besides the output itself.
"""

from collections.abc import Sequence

from torch import Tensor

from fedsa_kernels.dropout import dropout_factors
from fedsa_kernels.operands import by_client, onto_bias, per_client, rows_of, segments


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
) -> tuple[Tensor, Tensor]:
    """Outputs y and the product xa = dropout(x)·Aᵀ that the backward pass needs.

    Shapes: x [C·m, d_in], weight [d_out, d_in], bias [d_out], A [r, d_in], B [d_out, r], d [C, r],
    b [C, d_out], keys [C·m]; y [C·m, d_out], xa [C·m, r].
    """
    factors = dropout_factors(x, keys, p)
    xa = (x if factors is None else x * factors) @ A.t()
    inner = per_client(segments(xa, len(d)) * d[:, None])  # [*C, m, r]
    y = rows_of(onto_bias(bias, inner, _scaled(B, b).mT, 1.0))
    return y if weight is None else y.addmm_(x, weight.t()), xa


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, d and b; each is None unless ``needs`` asks for it.

    Shapes: dy [C·m, d_out]; the others as in ``forward``.
    """
    needs_x, needs_d, needs_b = needs
    clients, scale = d.shape[0], d[:, None]
    own, narrow = by_client(dy, clients), segments(xa, clients)
    db = None
    if needs_b:  # the diagonal of dyᵀ·(inner·Bᵀ), without the product of that size
        db = ((own.mT @ per_client(narrow * scale)) * B).sum(-1).view(b.shape)
    if not needs_x and not needs_d:
        return None, None, db
    dinner = (own @ _scaled(B, b)).view(narrow.shape)
    dd = (dinner * narrow).sum(1) if needs_d else None
    if not needs_x:
        return None, dd, db
    dx = rows_of(dinner * scale) @ A
    factors = dropout_factors(dx, keys, p)
    dx = dx if factors is None else dx.mul_(factors)
    return dx if weight is None else dx.addmm_(dy, weight), dd, db


def _scaled(B: Tensor, b: Tensor) -> Tensor:
    """diag(b_c)·B for every client. [*C, d_out, r]"""
    return per_client(b[:, :, None] * B)
