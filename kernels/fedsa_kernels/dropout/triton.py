"""The bits of ``fedsa_kernels.dropout`` made inside a kernel: the same words, never stored."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _spread(x):
    """The last two rounds of the mixing of ``fedsa_kernels.dropout``, without the last shift."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    return (x ^ (x >> 15)) * 0x846CA68B


@triton.jit
@no_type_check
def keep_tile(keys, columns, threshold):
    """Which elements of a tile survive dropout, as ``keep_mask`` says. [row, column]

    Args:
        keys: one int32 key per row of the tile.
        columns: the number of the feature in each column of the tile, as int32.
        threshold: int32 below which a word drops its element, see ``drop_threshold``.
    """
    words = _spread(columns.to(tl.uint32, bitcast=True) + 0x3C6EF372)
    words = words ^ (words >> 16)
    x = (keys.to(tl.uint32, bitcast=True)[:, None] ^ words[None, :]) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x.to(tl.int32, bitcast=True) >= threshold
