"""The keystream of ChaCha20 in plain torch: the truth, and the CPU path."""

import torch
from torch import Tensor

_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
"""The bytes ``expand 32-byte k``. RFC 8439, §2.3."""
_CHUNK = 65536
"""Blocks made at a time: 4 MiB, so that a long stream needs little more memory than itself."""


def words(stream: Tensor, count: int) -> Tensor:
    """The first words of a stream.

    Shapes: stream int32 [12] (see ``pack_stream``); result int32 [count].
    """
    found = torch.empty(count, dtype=torch.int32, device=stream.device)
    for first in range(0, count, 16 * _CHUNK):
        part = found[first : first + 16 * _CHUNK]
        part.copy_(blocks(stream, first // 16, -(-len(part) // 16)).flatten()[: len(part)])
    return found


def blocks(stream: Tensor, first: int, count: int) -> Tensor:
    """Blocks of a stream, one after the other. RFC 8439, §2.3.

    Args:
        stream: key, counter and nonce. [12]
        first: blocks to skip.
        count: of the blocks.

    Shapes: result int32 [count, 16].
    """
    # The counter's bits are read as int32, and so are those of the sum: it wraps to what it is.
    numbers = torch.arange(first, first + count, dtype=torch.int64, device=stream.device)
    counters = (numbers + stream[8]).to(torch.int32)
    rest = stream[9:].expand(count, 3)
    start = [
        torch.tensor(_CONSTANTS, dtype=torch.int32, device=stream.device).expand(count, 4),
        stream[:4].expand(count, 4),
        stream[4:8].expand(count, 4),
        torch.cat([counters[:, None], rest], dim=1),
    ]
    rows = tuple(start)
    for _ in range(10):
        rows = _turned(_quarter_rounds(*rows), -1)  # columns; now diagonals stand in columns
        rows = _turned(_quarter_rounds(*rows), 1)
    return torch.cat([a + b for a, b in zip(rows, start, strict=True)], dim=1)


_Rows = tuple[Tensor, ...]


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> _Rows:
    """RFC 8439, §2.1, on the four columns at once. Additions wrap in int32.

    Shapes: [count, 4], the rows of the state.
    """
    a = a + b
    d = _rotated(d ^ a, 16)
    c = c + d
    b = _rotated(b ^ c, 12)
    a = a + b
    d = _rotated(d ^ a, 8)
    c = c + d
    return a, _rotated(b ^ c, 7), c, d


def _rotated(x: Tensor, bits: int) -> Tensor:
    """To the left. torch shifts int32 arithmetically: what comes in at the left is masked out."""
    return (x << bits) | ((x >> (32 - bits)) & ((1 << bits) - 1))


def _turned(rows: _Rows, by: int) -> _Rows:
    """Row i moved by i places."""
    return tuple(row.roll(i * by, dims=1) for i, row in enumerate(rows))
