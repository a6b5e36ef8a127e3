"""LoRA linear in plain torch, forward and backward: the truth, and the CPU path.

Order of work: the adapter's product (with bias) is written first and the frozen product is
accumulated onto it (``beta=1``), so that the output is never read back by a pass of its own.
"""

import torch
from torch import Tensor

from fedsa_kernels.dropout import keep_mask


def _dropped(x: Tensor, keys: Tensor | None, p: float) -> Tensor:
    """X with dropout, from regenerated bits. [client·token, d]"""
    if keys is None or p == 0.0:
        return x
    return (x * keep_mask(keys, x.shape[-1], p)).mul_(1.0 / (1.0 - p))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    p: float,
    keys: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs y and the product xa = dropout(x)·Aᵀ that the backward pass needs.

    Shapes: x [C·m, d_in], weight [d_out, d_in], bias [d_out], A [C, r, d_in], B [C, d_out, r],
    keys [C·m]; y [C·m, d_out], xa [C, m, r].
    """
    clients, rank, d_in = A.shape
    dropped = _dropped(x, keys, p)
    if clients == 1:  # mm is faster than a batch of one
        xa = dropped @ A[0].t()
        y = (
            torch.mm(xa, B[0].t()).mul_(scaling)
            if bias is None
            else torch.addmm(bias, xa, B[0].t(), alpha=scaling)
        )
        xa = xa.view(1, -1, rank)
    else:
        xa = torch.bmm(dropped.view(clients, -1, d_in), A.transpose(1, 2))
        y = (
            torch.bmm(xa, B.transpose(1, 2)).mul_(scaling)
            if bias is None
            else torch.baddbmm(bias, xa, B.transpose(1, 2), alpha=scaling)
        ).view(x.shape[0], -1)
    return y.addmm_(x, weight.t()), xa


def backward(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    p: float,
    keys: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, A and B; each is None unless ``needs`` asks for it.

    Shapes: dy [C·m, d_out]; the others as in ``forward``.
    """
    needs_x, needs_a, needs_b = needs
    clients, _, d_in = A.shape
    dy_c = dy.view(clients, -1, dy.shape[-1])
    dB = torch.bmm(dy_c.transpose(1, 2), xa).mul_(scaling) if needs_b else None
    if not needs_x and not needs_a:
        return None, None, dB
    dxa = torch.bmm(dy_c, B).mul_(scaling)  # [C, m, r]
    dA = None
    if needs_a:
        dropped = _dropped(x, keys, p).view(clients, -1, d_in)
        dA = torch.bmm(dxa.transpose(1, 2), dropped)
    dx = None
    if needs_x:
        dx = _dropped(torch.bmm(dxa, A).view(-1, d_in), keys, p).addmm_(dy, weight)
    return dx, dA, dB
