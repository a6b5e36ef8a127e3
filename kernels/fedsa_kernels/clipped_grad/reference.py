"""Per-record gradients in plain torch: the truth, and the CPU path."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def wide_dtype(*operands: Tensor) -> torch.dtype:
    """What gradients, norms and sums are made in: float32 at least."""
    double = any(operand.dtype == torch.float64 for operand in operands)
    return torch.float64 if double else torch.float32


def factored(gradients: Tensor, shape: Sequence[int]) -> bool:
    """Whether these are factors side by side; a gradient itself is k wide and never m + k."""
    return len(shape) == 2 and gradients.shape[-1] == sum(shape)


def keeps_factors(left: Tensor, right: Tensor) -> bool:
    """Whether left [n, t, m] and right [n, t, k] are smaller than the gradient [n, m, k]."""
    _, tokens, m = left.shape
    k = right.shape[2]
    return tokens * (m + k) < m * k


def sample_grad(left: Tensor, right: Tensor, whole: bool) -> Tensor:
    """Shapes: left [n, t, m], right [n, t, k]; result [n, m, k] or [n, t, m + k]."""
    dtype = wide_dtype(left, right)
    left, right = left.to(dtype), right.to(dtype)
    if not whole and keeps_factors(left, right):
        return torch.cat([left, right], dim=2)
    if left.shape[2] > right.shape[2]:  # MKL is faster with the short dimension first
        return torch.bmm(right.transpose(1, 2), left).transpose(1, 2).contiguous()
    return torch.bmm(left.transpose(1, 2), right)


def sample_grad_with_norms(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """As ``sample_grad``, with its squared norms [n]."""
    gradients = sample_grad(left, right, whole=False)
    return gradients, squared_norms(gradients, (left.shape[2], right.shape[2]))


def squared_norms(gradients: Tensor, shape: Sequence[int]) -> Tensor:
    """Shapes: gradients [n, …]; result [n]."""
    wide = gradients.to(wide_dtype(gradients))
    if not factored(gradients, shape):
        return wide.reshape(len(wide), math.prod(shape)).square().sum(1)
    left, right = torch.split(wide.double(), list(shape), dim=2)
    # ‖Σ l_t r_tᵀ‖² = Σ_tt' (l_t·l_t')(r_t·r_t'). Terms may cancel, and then the product in single
    # precision that is summed later has a rounding error above its norm: it is added here.
    gram = torch.bmm(left, left.transpose(1, 2)) * torch.bmm(right, right.transpose(1, 2))
    error = torch.finfo(gradients.dtype).eps * left.shape[1]
    rounding = error * left.flatten(1).norm(dim=1) * right.flatten(1).norm(dim=1)
    norms = gram.sum((1, 2)).clamp(min=0).sqrt() + rounding
    squares: Tensor = norms.square().to(wide.dtype)
    return squares


def clipped_sum(gradients: Tensor, factors: Tensor, shape: Sequence[int]) -> Tensor:
    """Shapes: gradients [C·n, …], factors [C, n]; result [C, *shape].

    Nothing here is a float32 matrix product. A switch of the whole process, which any thread may
    set, lets torch round the operands of those to TF32 or bfloat16, and then a record would count
    for more than its norm says. Float64 is not touched by it.
    """
    clients, own = factors.shape
    wide = gradients.to(wide_dtype(gradients))
    weights = factors.to(wide.dtype).flatten()
    left_out = (weights == 0).nonzero().squeeze(1)  # 0 times infinity would not be 0
    if not factored(gradients, shape):
        flat = wide.reshape(len(wide), math.prod(shape))
        weighted = (flat * weights[:, None]).index_fill_(0, left_out, 0.0)
        total = weighted.view(clients, own, *shape).sum(1)
    else:
        counted = wide.double().index_fill(0, left_out, 0.0)
        left, right = torch.split(counted, list(shape), dim=2)
        vectors = own * left.shape[1]
        left = (left * weights[:, None, None]).reshape(clients, vectors, shape[0])
        total = torch.bmm(left.transpose(1, 2), right.reshape(clients, vectors, shape[1]))
    return total.to(gradients.dtype)
