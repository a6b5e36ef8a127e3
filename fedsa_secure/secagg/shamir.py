"""Secret sharing: any t shares give the secret, fewer tell nothing. docs/protocol.md §4."""

import functools
import itertools
import math
import secrets
from collections.abc import Mapping, Sequence

from fedsa_secure.errors import BadShare

PRIME = 2**255 - 19
SECRET_BYTES = 32
_LONG = 1 << 400


def new_secret() -> bytes:
    """A uniform element of the field, as 32 bytes, little endian. Good as an X25519 key, too."""
    return secrets.randbelow(PRIME).to_bytes(SECRET_BYTES, "little")


def share_secret(secret: bytes, threshold: int, holders: Sequence[int]) -> dict[int, bytes]:
    """One share per holder (Shamir 1979).

    Args:
        secret: below the prime, as ``new_secret`` makes them.
        threshold: shares that are needed, t.
        holders: client numbers.

    Guarantee: t − 1 shares are independent of the secret. The arithmetic is not constant in time.
    """
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    coefficients.append(_element(secret))
    return {holder: _evaluate(coefficients, holder + 1) for holder in holders}


def rebuild_secret(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, from exactly ``threshold`` of the shares: those of the smallest holders.

    Args:
        shares: by holder; at least ``threshold`` of them.
        threshold: as it was when they were made.

    Raises:
        BadShare: if a share is no element of the field.
    """
    holders = tuple(sorted(shares)[:threshold])
    weights = _weights_at_zero(holders)
    total = sum(w * _element(shares[h]) for w, h in zip(weights, holders, strict=True))
    return (total % PRIME).to_bytes(SECRET_BYTES, "little")


def _evaluate(coefficients: Sequence[int], point: int) -> bytes:
    """Horner's rule; the highest coefficient comes first."""
    value = 0
    for coefficient in coefficients:
        value = value * point + coefficient
        if value > _LONG:  # points are small, so most steps need no division
            value %= PRIME
    return (value % PRIME).to_bytes(SECRET_BYTES, "little")


@functools.lru_cache(maxsize=8)
def _weights_at_zero(holders: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights; a server needs those of one set of holders for every client."""
    points = [holder + 1 for holder in holders]
    # Differences of client numbers are small: plain products beat products in the field.
    denominators = [
        x * math.prod([other - x for other in points if other != x]) % PRIME for x in points
    ]
    everything = math.prod(points) % PRIME
    return tuple(everything * inverse % PRIME for inverse in _inverses(denominators))


def _inverses(elements: Sequence[int]) -> list[int]:
    """All at the price of one: the inverse of their product, and products (Montgomery 1987)."""
    products = list(itertools.accumulate(elements, lambda a, b: a * b % PRIME, initial=1))
    inverse, found = pow(products[-1], -1, PRIME), []
    for element, before in zip(reversed(elements), reversed(products[:-1]), strict=True):
        found.append(inverse * before % PRIME)
        inverse = inverse * element % PRIME
    return found[::-1]


def _element(share: bytes) -> int:
    value = int.from_bytes(share, "little")
    if len(share) != SECRET_BYTES or value >= PRIME:
        raise BadShare("a share is no element of the field; its holder or its owner is faulty")
    return value
