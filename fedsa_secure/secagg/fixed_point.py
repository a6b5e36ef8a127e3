"""Real numbers on a grid of integers, so that their sum can be masked. docs/protocol.md §10."""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedsa_secure.csprng import BLOCK, Block, Keystream
from fedsa_secure.secagg.derivation import kdf
from fedsa_secure.secagg.masks import UInt32Array

_MODULUS = 2**32


@dataclass(frozen=True)
class FixedPoint:
    """A grid of 2L + 1 steps around zero for one of ``clients`` summands.

    Args:
        clients: most summands of a sum, n.
        range: a magnitude that is not clipped; a public value. The grid ends at L·step, which is at
            least the range and less than twice it.

    Raises:
        ValueError: if the range is no positive finite number, or n summands leave no grid.

    Guarantee: n · (2^q − 1) < 2³², so no sum of n encoded values wraps.
    """

    clients: int
    range: float
    levels: int = field(init=False)
    """L: steps on either side of zero."""
    step: float = field(init=False)
    """Size of a step, a power of two; the unit of an encoded value."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.range) and self.range > 0):
            raise ValueError(f"the range of a grid has to be positive and finite, not {self.range}")
        bits = bits_per_value(self.clients)
        if bits < 2 or self.clients * (2**bits - 1) >= _MODULUS:
            raise ValueError(f"a sum of {self.clients} values leaves no grid in 32 bits")
        levels = 2 ** (bits - 1) - 1
        step = 2.0 ** math.ceil(math.log2(self.range / levels))
        if step * levels < self.range:  # log2 rounds
            step *= 2
        object.__setattr__(self, "levels", levels)
        object.__setattr__(self, "step", step)

    def encode(
        self,
        values: NDArray[np.floating],
        coins: Keystream,
        out: UInt32Array,
        factor: float = 1.0,
    ) -> int:
        """Round values to the grid, up or down at random so that the mean is right.

        Args:
            values: finite. [value]
            coins: one word is taken per value.
            out: where the result goes: integers from 0 to 2L. [value]
            factor: what every value is multiplied by first, in double precision: a product of
                single precision would be off by more than a step.

        Returns:
            How many values lay beyond the grid and were clipped.

        Raises:
            ValueError: if a value is not finite.
        """
        block, clipped = Block(), 0
        for first in range(0, len(values), BLOCK):
            part = slice(first, first + BLOCK)
            clipped += self._encode(values[part], coins, block, out[part], factor)
        return clipped

    def _encode(
        self,
        values: NDArray[np.floating],
        coins: Keystream,
        block: Block,
        out: UInt32Array,
        factor: float,
    ) -> int:
        scaled = values.astype(np.float64)
        scaled *= factor
        if not np.isfinite(scaled).all():
            raise ValueError("a value to be encoded is not finite")
        with np.errstate(over="ignore"):  # what overflows lies beyond the grid, and counts so
            scaled /= self.step
        beyond = int(np.count_nonzero(np.abs(scaled) > self.levels))
        if beyond:
            np.clip(scaled, -self.levels, self.levels, out=scaled)
        floor = np.floor(scaled)
        scaled -= floor  # the fraction, in [0, 1]; exact but for fractions within 2⁻⁵³ of 1
        scaled *= _MODULUS
        floor += self.levels
        floor += coins.words(len(out), block) < scaled
        out[:] = floor
        return beyond

    def decode(self, total: UInt32Array, clients: int) -> NDArray[np.float64]:
        """The sum of the values, from the sum of their encodings.

        Args:
            total: sum over ``clients`` encoded vectors. [value]
            clients: how many.
        """
        return (total.astype(np.float64) - float(clients * self.levels)) * self.step


def bits_per_value(clients: int) -> int:
    """q: the largest number of bits with n · (2^q − 1) < 2³², at most 32."""
    return ((_MODULUS - 1) // clients + 1).bit_length() - 1


def integer_cap(clients: int) -> int:
    """The largest integer of which n may be summed without wrapping."""
    return (_MODULUS - 1) // clients


def rounding_key(seed: int, client: int, round_number: int) -> bytes:
    """The key of a client's rounding coins in a round.

    They are a function of public numbers: coins have to be fair, and independent of the data, but
    need not be secret as long as no differential privacy is claimed.
    """
    return kdf(seed.to_bytes(8, "little"), b"", "rounding coins", client, round_number)
