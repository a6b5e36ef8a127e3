"""Fixed point and masks in plain torch: the truth, and the CPU path."""

import torch
from torch import Tensor

from fedsa_kernels.chacha20 import reference as chacha20


def quantize_mask(
    values: Tensor, numbers: Tensor, coins: Tensor, masks: Tensor | None, streams: Tensor
) -> tuple[Tensor, Tensor]:
    """Words, and how many values were beyond the grid and how many not finite.

    Shapes: values [n]; numbers float64 [3]: factor, 1/step, levels; coins and masks int32 [n];
    streams int32 [k, 16]: key, counter, nonce, sign. Results int32 [n] and int64 [2].
    """
    factor, per_step, levels = numbers.unbind()
    scaled = values.double() * factor
    infinite = ~scaled.isfinite()
    scaled = torch.where(infinite, 0.0, scaled) * per_step  # a power of two: nothing is rounded
    beyond = scaled.abs() > levels
    scaled = scaled.clamp(-levels, levels)
    floor = scaled.floor()
    up = (coins.long() & 0xFFFFFFFF).double() < (scaled - floor) * 2.0**32
    words = (floor + levels + up).long()
    if masks is not None:
        words += masks
    for stream in streams:
        words += stream[12] * chacha20.words(stream[:12], len(values)).long()
    # Sums of so few words do not leave 64 bits, and the lower 32 are kept.
    return words.to(torch.int32), torch.stack([beyond.sum(), infinite.sum()])
