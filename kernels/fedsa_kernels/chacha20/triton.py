"""The keystream of ChaCha20 in a kernel: a program makes many blocks at once, in registers.

The 16 words of a block's state are 16 vectors with one place per block, so a quarter round is plain
arithmetic on vectors: no thread needs another's word, and no shared memory is read.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedsa_kernels.launch import launch

BLOCKS = 128
"""Blocks of 64 bytes that a program makes; one per thread where a warp has 32."""
WARPS = 4


@triton.jit
@no_type_check
def _turn(x, bits: tl.constexpr):
    return (x << bits) | (x >> (32 - bits))


@triton.jit
@no_type_check
def _quarter(a, b, c, d):
    """RFC 8439, §2.1."""
    a += b
    d = _turn(d ^ a, 16)
    c += d
    b = _turn(b ^ c, 12)
    a += b
    d = _turn(d ^ a, 8)
    c += d
    b = _turn(b ^ c, 7)
    return a, b, c, d


@triton.jit
@no_type_check
def _word(stream, place: tl.constexpr, like):
    """One word of the stream's state, for every block."""
    return tl.zeros_like(like) + tl.load(stream + place).to(tl.uint32, bitcast=True)


@triton.jit
@no_type_check
def keystream_blocks(stream, number):
    """Blocks of a stream: 16 vectors, the words of each block in order. RFC 8439, §2.3.

    Args:
        stream: 12 words: key, counter, nonce.
        number: of each block, counted from the stream's counter, as uint32. [block]
    """
    c0 = tl.zeros_like(number) + 0x61707865
    c1 = tl.zeros_like(number) + 0x3320646E
    c2 = tl.zeros_like(number) + 0x79622D32
    c3 = tl.zeros_like(number) + 0x6B206574
    k0, k1 = _word(stream, 0, number), _word(stream, 1, number)
    k2, k3 = _word(stream, 2, number), _word(stream, 3, number)
    k4, k5 = _word(stream, 4, number), _word(stream, 5, number)
    k6, k7 = _word(stream, 6, number), _word(stream, 7, number)
    count = _word(stream, 8, number) + number
    n0, n1, n2 = _word(stream, 9, number), _word(stream, 10, number), _word(stream, 11, number)
    x0, x1, x2, x3, x4, x5, x6, x7 = c0, c1, c2, c3, k0, k1, k2, k3
    x8, x9, x10, x11, x12, x13, x14, x15 = k4, k5, k6, k7, count, n0, n1, n2
    for _ in range(10):
        x0, x4, x8, x12 = _quarter(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
    return (
        x0 + c0, x1 + c1, x2 + c2, x3 + c3, x4 + k0, x5 + k1, x6 + k2, x7 + k3,
        x8 + k4, x9 + k5, x10 + k6, x11 + k7, x12 + count, x13 + n0, x14 + n1, x15 + n2,
    )  # fmt: skip


@triton.jit
@no_type_check
def in_order(
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15, BLOCKS: tl.constexpr
):
    """The 16 vectors of ``keystream_blocks`` as one tile, in the order of the stream. [block, 16]

    Each join adds a bit to the place of a word, the highest first.
    """
    a0, a1, a2, a3 = tl.join(x0, x8), tl.join(x1, x9), tl.join(x2, x10), tl.join(x3, x11)
    a4, a5, a6, a7 = tl.join(x4, x12), tl.join(x5, x13), tl.join(x6, x14), tl.join(x7, x15)
    b0, b1, b2, b3 = tl.join(a0, a4), tl.join(a1, a5), tl.join(a2, a6), tl.join(a3, a7)
    whole = tl.join(tl.join(b0, b2), tl.join(b1, b3))
    return tl.reshape(whole, (BLOCKS, 16))


@triton.jit
@no_type_check
def _words(stream, out, count, BLOCKS: tl.constexpr):
    """Grid: (block of blocks,)."""
    number = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = keystream_blocks(
        stream, number.to(tl.uint32)
    )
    tile = in_order(
        x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15, BLOCKS
    )  # fmt: skip
    place = number[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + place, tile.to(tl.int32, bitcast=True), mask=place < count)


def words(stream: Tensor, count: int) -> Tensor:
    """As ``reference.words``."""
    out = torch.empty(count, dtype=torch.int32, device=stream.device)
    if count:
        launch(
            _words, (triton.cdiv(count, 16 * BLOCKS),), stream, out, count,
            BLOCKS=BLOCKS, num_warps=WARPS, num_stages=1,
        )  # fmt: skip
    return out
