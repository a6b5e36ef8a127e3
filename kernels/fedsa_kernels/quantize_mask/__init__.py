"""``quantize_mask``: real numbers to a grid of integers, and masks onto them, in one pass.

Bit for bit what ``FixedPoint.encode`` and ``apply_masks`` of secure aggregation make on the host.

**What is secret.** The values, the factor, the coins where differential privacy rests on them,
masks and keys. All of them are data in device memory and none is a compile-time constant or a
scalar argument, since machine code that is specialised for such is kept on disk. Keys are treated
as in ``fedsa_kernels.chacha20``. Streams of keys exist in registers only: without the keys, what
this op leaves in device memory is the masked vector, and its operands. There is no op of
``torch.library`` here, since profilers and tracers record the arguments of ops.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from fedsa_kernels.chacha20 import pack_stream
from fedsa_kernels.quantize_mask import reference

__all__ = ["quantize_mask"]

_NONCE = bytes(12)


def quantize_mask(
    values: Float[Tensor, " value"],
    step: float,
    levels: int,
    coins: Int32[Tensor, " value"],
    masks: Int32[Tensor, " value"] | None = None,
    *,
    streams: Sequence[tuple[bytes, bool]] = (),
    factor: float = 1.0,
) -> tuple[Int32[Tensor, " value"], int]:
    """Round values to a grid, up or down at random, and put masks onto them modulo 2³².

    With t = factor·value/step, cut off at ±levels, a word is
    ``levels + ⌊t⌋ + [coin < 2³²·(t − ⌊t⌋)] + mask ± streams``. Words are uint32; torch has no
    arithmetic on these, so they are kept as int32 with the same bits.

    Args:
        values: float32 or float64; the device of these decides: the CPU runs the reference, any
            other one the kernel.
        step: size of a step, a power of two between 2⁻¹⁰⁰⁰ and 2¹⁰⁰⁰; the unit of a word.
        levels: steps on either side of zero, below 2³¹.
        coins: one uniform word per value.
        masks: words to add, from a buffer; None for none.
        streams: keys of 32 bytes, and whether the ChaCha20 stream of each, with a nonce of zeros
            and from block 0 on, is added or taken away.
        factor: what every value is multiplied by first, in double precision.

    Returns:
        The words, and how many values lay beyond the grid and were cut off.

    Raises:
        ValueError: if a value times factor is not finite, naming how many; no word is returned.
            Also if the grid is none, a key has another length or an operand another shape.
        KeystreamExhaustedError: if there are more values than a stream has words.

    Guarantee: if one stream is used once and its key is unknown, the words cannot be told from
    uniform ones, whatever the values are. Assumption: that of ``chacha20_words``.

    Source: docs/protocol.md §3 and §10.
    """
    _check_grid(step, levels)
    _check_operands(values, coins, masks)
    numbers = torch.tensor([factor, 1.0 / step, levels], dtype=torch.float64)
    packed = _pack(streams, len(values))
    given = packed.to(values.device)
    try:
        operands = (values, numbers.to(values.device), coins, masks, given)
        if values.device.type == "cpu":
            words, counts = reference.quantize_mask(*operands)
        else:
            from fedsa_kernels.quantize_mask import triton

            words, counts = triton.quantize_mask(*operands)
    finally:
        packed.zero_()
        given.zero_()  # in the device's queue behind the kernel
    beyond, infinite = counts.tolist()
    if infinite:
        raise ValueError(f"{infinite} of the values to be encoded are not finite")
    return words, int(beyond)


def _pack(streams: Sequence[tuple[bytes, bool]], words: int) -> Int32[Tensor, "stream 16"]:
    """Each stream's words of ``pack_stream``, its sign, and three words that fill the line."""
    packed = torch.zeros(len(streams), 16, dtype=torch.int32)
    for line, (key, add) in zip(packed, streams, strict=True):
        if not isinstance(add, bool):  # a sign of -1 would count as true
            raise ValueError(f"whether a stream is added is True or False, not {add!r}")
        words_of_one = pack_stream(key, _NONCE, 0, words)
        line[:12] = words_of_one
        words_of_one.zero_()
        line[12] = 1 if add else -1
    return packed


def _check_grid(step: float, levels: int) -> None:
    if not 2.0**-1000 <= step <= 2.0**1000 or math.frexp(step)[0] != 0.5:
        raise ValueError(f"a step is a power of two between 2⁻¹⁰⁰⁰ and 2¹⁰⁰⁰, not {step}")
    if type(levels) is not int or not 0 < levels < 2**31:
        raise ValueError(f"levels is an int that fits into 32 bits with its sign, not {levels!r}")


def _check_operands(values: Tensor, coins: Tensor, masks: Tensor | None) -> None:
    if values.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"values are float32 or float64, not {values.dtype}")
    for each in (values, coins) if masks is None else (values, coins, masks):
        if each.shape != values.shape or each.dim() != 1 or not each.is_contiguous():
            raise ValueError(f"{tuple(each.shape)} is not one contiguous line of values")
        if each.device != values.device:
            raise ValueError(f"operands on {values.device} and on {each.device}")
    for words in (coins,) if masks is None else (coins, masks):
        if words.dtype != torch.int32:
            raise ValueError(f"coins and masks are words of 32 bits, int32, not {words.dtype}")
