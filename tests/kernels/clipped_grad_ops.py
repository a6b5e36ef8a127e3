"""The ops of `clipped_grad` under the rules of torch.library, whatever they run on."""

import torch
from torch import Tensor


def random(*sizes: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(3)).to(dtype)


def check_ops(tokens: int, m: int, k: int, *, dtype: torch.dtype, backend: str | None) -> None:
    """Schema, shapes, dtypes, strides and symbolic sizes of all four, also for inputs with gaps."""
    ops, shape, rows = torch.ops.fedsa, [m, k], 2
    factors = torch.tensor([[1.0], [0.0]])
    left = random(rows, 2 * tokens, m, dtype=dtype)[:, ::2]
    right = random(rows, tokens, k, dtype=dtype)
    for whole in (False, True):
        torch.library.opcheck(ops.sample_grad.default, (left, right, whole, backend))
    torch.library.opcheck(ops.sample_grad_with_norms.default, (left, right, backend))
    kept = ops.sample_grad(left, right, False, backend).to(dtype)
    for gradients in (kept, random(rows, k, m, dtype=dtype).transpose(1, 2)):
        torch.library.opcheck(ops.squared_norms.default, (gradients, shape, backend))
        torch.library.opcheck(ops.clipped_sum.default, (gradients, factors, shape, backend))
