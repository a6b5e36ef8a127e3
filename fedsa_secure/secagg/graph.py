"""Who shares masks and secrets with whom. docs/protocol.md §5."""

import functools
from collections.abc import Sequence

from fedsa_secure.csprng import BLOCK, Block, Keystream
from fedsa_secure.secagg.derivation import kdf
from fedsa_secure.secagg.terms import Thresholds


def neighbours(
    client: int, cohort: Sequence[int], thresholds: Thresholds, sid: bytes, round_number: int
) -> frozenset[int]:
    """The neighbours of a client in a round, without itself.

    Args:
        client: one of the cohort.
        cohort: everybody invited, in order of number.
        thresholds: k.
        sid: session id; the circle is drawn from it.
        round_number: every round has a circle of its own.
    """
    if thresholds.complete:
        return frozenset(cohort) - {client}
    circle = _circle(tuple(cohort), kdf(sid, b"", "graph", round_number))
    place, half = circle.index(client), thresholds.neighbours // 2
    around = (place + step for step in range(-half, half + 1) if step)
    return frozenset(circle[index % len(circle)] for index in around)


@functools.lru_cache(maxsize=8)
def _circle(cohort: tuple[int, ...], seed: bytes) -> tuple[int, ...]:
    """Fisher–Yates with unbiased indices from the stream of the seed."""
    stream, block = Keystream(seed), Block()
    words = iter(())
    circle = list(cohort)
    for last in range(len(circle) - 1, 0, -1):
        count = last + 1
        limit = 2**32 // count * count
        while True:
            word = next(words, None)
            if word is None:
                words = iter(stream.words(BLOCK, block).tolist())
            elif word < limit:
                break
        chosen = word % count
        circle[last], circle[chosen] = circle[chosen], circle[last]
    return tuple(circle)
