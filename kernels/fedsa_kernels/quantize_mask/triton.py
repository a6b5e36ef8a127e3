"""Fixed point and masks in one kernel: streams of keys are made in registers and never stored.

A program owns a tile of values, 16 for each of its blocks of ChaCha20. It makes the streams first,
while it holds no value. Counts of values that were cut off or not finite are written per program
and added up afterwards: no atomics.

The arithmetic is that of the host in IEEE double precision, so the words are the same. Scaling by
powers of two and the floor are exact; only ``factor · value`` and the fraction of a small negative
number are rounded, and both are rounded once, whether or not a compiler fuses a product with the
difference that follows it.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedsa_kernels.chacha20.triton import BLOCKS, WARPS, in_order, keystream_blocks
from fedsa_kernels.launch import launch


@triton.jit
@no_type_check
def _quantize_mask(
    values, numbers, coins, masks, streams, words, counts,
    count, keys,
    MASKED: tl.constexpr, KEYED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid: (tile of values,). See the module."""
    program = tl.program_id(0)
    number = program.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    place = number[:, None] * 16 + tl.arange(0, 16)[None, :]
    real = place < count
    if KEYED:
        block = number.to(tl.uint32)
        zero = tl.zeros_like(block)
        a0, a1, a2, a3, a4, a5, a6, a7 = zero, zero, zero, zero, zero, zero, zero, zero
        a8, a9, a10, a11, a12, a13, a14, a15 = zero, zero, zero, zero, zero, zero, zero, zero
        for key in range(keys):
            stream = streams + key * 16
            sign = zero + tl.load(stream + 12).to(tl.uint32, bitcast=True)
            x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = keystream_blocks(
                stream, block
            )
            a0, a1, a2, a3 = a0 + sign * x0, a1 + sign * x1, a2 + sign * x2, a3 + sign * x3
            a4, a5, a6, a7 = a4 + sign * x4, a5 + sign * x5, a6 + sign * x6, a7 + sign * x7
            a8, a9, a10, a11 = a8 + sign * x8, a9 + sign * x9, a10 + sign * x10, a11 + sign * x11
            a12, a13 = a12 + sign * x12, a13 + sign * x13
            a14, a15 = a14 + sign * x14, a15 + sign * x15
        mask = in_order(
            a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, BLOCKS
        )
        # Loads are not moved up across this, so values wait in memory while registers are scarce.
        tl.debug_barrier()

    factor, per_step, levels = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)

    scaled = tl.load(values + place, mask=real, other=0.0).to(tl.float64) * factor
    finite = tl.abs(scaled) < float("inf")  # NaN is below nothing
    scaled = tl.where(finite, scaled, 0.0) * per_step
    beyond = tl.abs(scaled) > levels
    scaled = tl.where(beyond, tl.where(scaled > 0, levels, -levels), scaled)
    floor = tl.floor(scaled)
    coin = tl.load(coins + place, mask=real, other=0).to(tl.uint32, bitcast=True)
    up = coin.to(tl.float64) < (scaled - floor) * 4294967296.0
    word = (floor + levels).to(tl.uint32) + up.to(tl.uint32)
    if MASKED:
        word += tl.load(masks + place, mask=real, other=0).to(tl.uint32, bitcast=True)
    if KEYED:
        word += mask
    tl.store(words + place, word.to(tl.int32, bitcast=True), mask=real)
    # Two counts in one sum: a tile has fewer than 2¹⁶ values.
    told = tl.where(finite, tl.where(beyond, 1, 0), 65536)
    tl.store(counts + program, tl.sum(tl.sum(told, axis=1), axis=0))


def quantize_mask(
    values: Tensor, numbers: Tensor, coins: Tensor, masks: Tensor | None, streams: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``reference.quantize_mask``."""
    programs = triton.cdiv(len(values), 16 * BLOCKS)
    words = torch.empty_like(coins)
    counts = torch.empty(programs, dtype=torch.int32, device=values.device)
    if programs:
        launch(
            _quantize_mask, (programs,),
            values, numbers, coins, masks, streams, words, counts, len(values), len(streams),
            MASKED=masks is not None, KEYED=len(streams) > 0, BLOCKS=BLOCKS,
            num_warps=WARPS, num_stages=1,
        )  # fmt: skip
    return words, torch.stack([(counts & 0xFFFF).sum(), (counts >> 16).sum()])
