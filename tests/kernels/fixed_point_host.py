"""What secure aggregation makes on the host: the bits that ``quantize_mask`` has to have."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedsa_secure.csprng import BLOCK, Block, Keystream
from fedsa_secure.secagg import FixedPoint, Mask, apply_masks

COINS = b"coins".ljust(32, b".")
STREAMS = tuple((bytes([k]) * 32, bool(k % 2)) for k in range(3))


def words_of(key: bytes, count: int) -> Tensor:
    """Words of an AES-256-CTR stream, as int32."""
    stream, block = Keystream(key), Block()
    parts = [stream.words(min(BLOCK, count - k), block).copy() for k in range(0, count, BLOCK)]
    return torch.from_numpy(np.concatenate([np.zeros(0, np.uint32), *parts]).view(np.int32))


def host_words(
    grid: FixedPoint,
    values: Tensor,
    masks: bytes | None = None,
    streams: Sequence[tuple[bytes, bool]] = (),
    factor: float = 1.0,
) -> tuple[Tensor, int]:
    """The words of ``FixedPoint.encode`` and ``apply_masks``, and how many values were clipped.

    Args:
        grid: to round to.
        values: to encode.
        masks: key of an AES-256-CTR stream to add.
        streams: keys of ChaCha20 streams, and whether each is added.
        factor: of all values.
    """
    out = np.zeros(len(values), np.uint32)
    clipped = grid.encode(values.numpy(), Keystream(COINS), out, factor)
    aes = [] if masks is None else [Mask(masks, True)]
    apply_masks(out, [*aes, *(Mask(key, add, "chacha20") for key, add in streams)])
    return torch.from_numpy(out.view(np.int32)), clipped


def awkward_values(grid: FixedPoint, count: int, dtype: torch.dtype) -> Tensor:
    """Values on, between and just beside the grid's steps and ends, and far beyond them."""
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(count, generator=generator, dtype=torch.float64) * grid.range
    end = grid.step * grid.levels
    special = [0.0, -0.0, grid.step, -grid.step, grid.step / 2, -grid.step / 2, end, -end]
    special += [float(np.nextafter(x, side)) for x in (end, -end, 0.0) for side in (-9e9, 9e9)]
    special += [-grid.step * 2.0**-60, 1e30, -1e30, 1e-40, -1e-40, 3.0 * end]
    chosen = torch.tensor(special, dtype=torch.float64)[: count // 2]
    values[: len(chosen)] = chosen
    return values.to(dtype)
