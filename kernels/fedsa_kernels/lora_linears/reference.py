"""Several LoRA linears of one x in plain torch: the truth, and the CPU path.

The order of work is that of ``lora_linear``: whatever is narrow first, the frozen products
accumulated onto it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsa_kernels.lora_linear.reference import frozen_onto, narrow, outer_grad
from fedsa_kernels.operands import by_client, per_client, rows_of


def parts(xa: Tensor, Bs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The columns of xa that belong to each layer, as views. Each [*C, m, r_i]"""
    return torch.split(xa, [B.shape[2] for B in Bs], -1)


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    A: Tensor,
    Bs: Sequence[Tensor],
    scaling: float,
) -> tuple[list[Tensor], Tensor]:
    """Outputs y_i and the product xa = x·Aᵀ of all of them, which the backward pass needs.

    Shapes: x [C·m, d_in], weights [d_out_i, d_in], biases [d_out_i], A [C, Σr, d_in], Bs
    [C, d_out_i, r_i]; y_i [C·m, d_out_i], xa [C·m, Σr].
    """
    clients = A.shape[0]
    xa = narrow(per_client(A), by_client(x, clients)).contiguous()
    layers = zip(weights, biases, parts(xa, Bs), map(per_client, Bs), strict=True)
    ys = [frozen_onto(x, *layer, scaling) for layer in layers]
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
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of x, A and all B; each is None unless ``needs`` asks for it, in that order.

    Shapes: dys [C·m, d_out_i]; the others as in ``forward``.
    """
    needs_x, needs_a, *needs_b = needs
    clients = A.shape[0]
    segments = [by_client(dy, clients) for dy in dys]
    layers = zip(segments, parts(by_client(xa, clients), Bs), Bs, needs_b, strict=True)
    dBs = [
        outer_grad(dy, part, scaling).view_as(B) if needed else None
        for dy, part, B, needed in layers
    ]
    if not needs_x and not needs_a:
        return None, None, dBs
    pairs = zip(Bs, segments, strict=True)
    products = [narrow(per_client(B).mT, dy, scaling) for B, dy in pairs]
    dxa = torch.cat(products, -1)  # [*C, m, Σr]
    dA = (dxa.mT @ by_client(x, clients)).view_as(A) if needs_a else None
    if not needs_x:
        return None, dA, dBs
    dx = rows_of(dxa @ per_client(A))
    for dy, weight in zip(dys, weights, strict=True):
        dx.addmm_(dy, weight)
    return dx, dA, dBs
