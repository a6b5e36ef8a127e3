"""What masks take at least: one AES-256-CTR stream and one addition per mask, and nothing else.

Each of the two is measured by itself, at its best block size, in buffers that stay in the cache.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedsa_secure.bench.timing import Task, seconds_of
from fedsa_secure.csprng import BLOCK

_BLOCKS = (8192, 16384, 32768, 65536)
_TRIAL, _TRIALS = 2**20, 5

Pass = Callable[[int, int], None]
"""Works off so many values, so many times."""


def threads_for(values: int) -> int:
    """How many threads ``apply_masks`` uses for a vector."""
    return max(1, min(len(os.sched_getaffinity(0)), -(-values // BLOCK)))


class Bound:
    """The least time for masks over a vector, with as many threads as ``apply_masks`` uses.

    Args:
        values: in the vector.
        masks: streams over it.
    """

    def __init__(self, values: int, masks: int) -> None:
        self._threads, self._masks = threads_for(values), masks
        self._part = -(-values // self._threads)

    def tasks(self) -> dict[str, Task]:
        """The streams, and the additions."""
        return {"bound: streams": self._task(_stream), "bound: additions": self._task(_add)}

    def _task(self, make: Callable[[int], Pass]) -> Task:
        block = best_block(make)
        passes = [make(block) for _ in range(self._threads)]
        if self._threads == 1:
            return Task(lambda _: passes[0](self._part, self._masks))
        pool = ThreadPoolExecutor(self._threads)

        def run(_: object) -> None:
            list(pool.map(lambda one: one(self._part, self._masks), passes))

        return Task(run)


@functools.cache
def best_block(make: Callable[[int], Pass]) -> int:
    """The block size with the shortest time on this machine, in words."""
    times = {}
    for block in _BLOCKS:
        one = make(block)
        task = Task(functools.partial(_once, one))
        times[block] = min(seconds_of(task) for _ in range(_TRIALS))
    return min(times, key=lambda block: times[block])


def _once(one: Pass, _: object) -> None:
    one(_TRIAL, 1)


def _stream(block: int) -> Pass:
    """AES-256-CTR into one buffer, over and over."""
    update = Cipher(algorithms.AES(bytes(32)), modes.CTR(bytes(16))).encryptor().update_into
    zeros, buffer = memoryview(bytes(4 * block)), bytearray(4 * block + 15)

    def run(values: int, times: int) -> None:
        whole, rest = divmod(values, block)
        end = zeros[: 4 * rest]
        for _ in range(times):
            for _ in range(whole):
                update(zeros, buffer)
            update(end, buffer)

    return run


def _add(block: int) -> Pass:
    """One cached block added to another, in place."""
    total, summand = np.zeros(block, np.uint32), np.ones(block, np.uint32)

    def run(values: int, times: int) -> None:
        whole, rest = divmod(values, block)
        for _ in range(times):
            for _ in range(whole):
                np.add(total, summand, out=total)
            np.add(total[:rest], summand[:rest], out=total[:rest])

    return run
