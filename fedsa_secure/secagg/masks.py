"""Masks: sums of keystreams modulo 2³², at the speed of memory. docs/protocol.md §3, §8."""

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedsa_secure.csprng import BLOCK, Block, ChaCha20Keystream, Keystream, MaskGenerator

UInt32Array = NDArray[np.uint32]


class Mask(NamedTuple):
    """One stream to add, or to take away.

    Args:
        key: 32 bytes, derived for this generator.
        add: whether it is added.
        generator: what makes the stream.
    """

    key: bytes
    add: bool
    generator: MaskGenerator = "aes-256-ctr"

    def __repr__(self) -> str:
        return f"Mask(add={self.add}, generator={self.generator!r})"


def apply_masks(vector: UInt32Array, masks: Sequence[Mask], threads: int | None = None) -> None:
    """Add streams to a vector in place, modulo 2³².

    The vector is worked off in blocks, and all streams pass over a block while it is in the cache:
    memory is read and written once, however many masks there are. Nothing but the blocks is
    allocated.

    Args:
        vector: contiguous uint32. [value]
        masks: keys and signs.
        threads: how many share the work; by default one per core that this process may use.
    """
    threads = threads or _cores()
    blocks = -(-len(vector) // BLOCK)
    threads = min(threads, blocks)
    if threads <= 1:
        _apply(vector, masks, 0)
        return
    starts = [BLOCK * (blocks * part // threads) for part in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        parts = [
            pool.submit(_apply, vector[start:end], masks, start)
            for start, end in itertools.pairwise(starts)
        ]
    for part in parts:
        part.result()  # raises what the thread raised: a part without masks must not leave


def _cores() -> int:
    """Cores that this process may use; all of them where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _apply(vector: UInt32Array, masks: Sequence[Mask], start: int) -> None:
    block = Block()
    streams = [(_stream(mask, start).words, np.add if mask.add else np.subtract) for mask in masks]
    for first in range(0, len(vector), BLOCK):
        part = vector[first : first + BLOCK]
        for words, combine in streams:
            combine(part, words(len(part), block), out=part)


def _stream(mask: Mask, start: int) -> Keystream | ChaCha20Keystream:
    if mask.generator == "aes-256-ctr":
        return Keystream(mask.key, start)
    if mask.generator == "chacha20":
        return ChaCha20Keystream(mask.key, start)
    raise ValueError(f"no generator of masks is called {mask.generator!r}")
