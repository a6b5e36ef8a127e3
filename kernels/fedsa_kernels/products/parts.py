"""``add_parts``: what several programs wrote side by side, summed in a fixed order.

One launch instead of torch's two, of a sum in float32 and a rounding; no atomics, so two runs agree
bit for bit.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedsa_kernels.launch import launch

_PARTS, _VALUES = 32, 64
"""That a program holds at once."""


@triton.jit(do_not_specialize=["parts"])  # batches differ in it
@no_type_check
def _add_parts(
    source, whole, values, parts, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """Grid: (block of values, group). See the module."""
    value, group = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V), tl.program_id(1)
    inside = value < values
    total = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        place = (group * parts + part).to(tl.int64) * values
        found = tl.load(
            source + place[:, None] + value[None, :],
            mask=(part[:, None] < parts) & inside[None, :],
            other=0.0,
        )
        total += tl.sum(found, axis=0)
    place = group.to(tl.int64) * values
    tl.store(whole + place + value, total.to(whole.dtype.element_ty), mask=inside)


def add_parts(source: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the second dimension.

    Shapes: source [group, part, …] contiguous, in float32; returns [group, …] in ``dtype``.
    """
    groups, parts, *shape = source.shape
    whole = source.new_empty(groups, *shape, dtype=dtype)
    values = whole[0].numel()
    launch(
        _add_parts, (triton.cdiv(values, _VALUES), groups),
        source, whole, values, parts,
        BLOCK_P=_PARTS, BLOCK_V=_VALUES, num_warps=4, num_stages=2,
    )  # fmt: skip
    return whole
