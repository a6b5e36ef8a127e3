"""Integer noise whose sums are known: the Skellam distribution, from a table.

The difference of two independent Poisson variables of mean v/2 has mean 0, variance v and
P(n) = exp(−v) Iₙ(v). Sums of independent Skellam variables are Skellam variables again, and their
variances add: this is why the noise of many clients can be made by each of them alone.
"""

import math
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

SMALLEST_VARIANCE = 2.0**20
LARGEST_VARIANCE = 2.0**34
DEVIATIONS = 12
"""The table ends at this many standard deviations."""
RELATIVE_ERROR = 2.0**-44
TAIL = 3e-21
"""Probability beyond 9.5 standard deviations, at most; in the table and in truth."""
"""Bound on |p′ / p − 1| of the table's probabilities p′ within 9.5 standard deviations."""

_BITS = 127
_SPARE_BITS = 160
_LOW = 2**64 - 1


class SkellamTable:
    """Draws Skellam variables of one variance by the inverse of the distribution function.

    A draw takes 128 uniform bits: a sign, and 127 bits that are compared with thresholds of the
    distribution of the magnitude.

    How near it is to the ideal: within 9.5 standard deviations every probability p′ of the table
    has |p′ / p − 1| < ``RELATIVE_ERROR`` = 2⁻⁴⁴; all that lies beyond has a probability below
    3·10⁻²¹ in the table and in truth. So N draws cost at most 2N·2⁻⁴⁴ of ε and
    (1 + e^ε)·N·3·10⁻²¹ of δ, for a million values, ten clients and a hundred rounds 1.2·10⁻⁴ of ε
    and, at ε = 8, 10⁻⁸ of δ. The total variation distance of a draw is below 2⁻⁴⁴ as well.

    Args:
        variance: from 2²⁰ to 2³⁴.

    Raises:
        ValueError: if the variance is outside of this range.
    """

    __slots__ = ("_high", "_low", "largest", "variance")

    def __init__(self, variance: float) -> None:
        if not SMALLEST_VARIANCE <= variance <= LARGEST_VARIANCE:
            raise ValueError(f"the variance of a table is from 2^20 to 2^34, not {variance}")
        self.variance = variance
        self.largest = largest_draw(variance)
        """No draw has a larger magnitude."""
        probabilities = skellam_probabilities(variance, self.largest)
        probabilities[1:] *= 2  # of a magnitude: both signs
        # Exact integers: sums of floats would lose the bits of small probabilities near one.
        weights = [int(weight) for weight in np.ldexp(probabilities, _SPARE_BITS).tolist()]
        sums = list(accumulate(weights))
        thresholds = [(part << _BITS) // sums[-1] for part in sums]
        self._high = np.array([threshold >> 64 for threshold in thresholds], dtype=np.uint64)
        self._low = np.array([threshold & _LOW for threshold in thresholds], dtype=np.uint64)

    def draw(self, words: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Turn uniform words into Skellam variables.

        Args:
            words: four for each draw. [4 · draw]

        Returns:
            One integer for every four words. [draw]
        """
        halves = words.view("<u8").reshape(-1, 2)
        high, low = halves[:, 0] >> np.uint64(1), halves[:, 1]
        sizes = np.searchsorted(self._high, high)  # the first threshold that may be above
        for draw in np.flatnonzero(self._high[sizes] == high):  # less than one draw in 10^12
            while self._high[sizes[draw]] == high[draw] and self._low[sizes[draw]] <= low[draw]:
                sizes[draw] += 1
        signs = 1 - 2 * (halves[:, 0] & np.uint64(1)).astype(np.int64)
        return sizes * signs


@lru_cache(maxsize=4)
def skellam_table(variance: float) -> SkellamTable:
    """The table of a variance, made once: it takes about half a second and 15 MB."""
    return SkellamTable(variance)


def largest_draw(variance: float) -> int:
    """The magnitude at which the table of a variance ends."""
    return math.ceil(DEVIATIONS * math.sqrt(variance))


def skellam_probabilities(variance: float, largest: int) -> NDArray[np.float64]:
    """exp(−v) Iₙ(v) for n = 0 … ``largest``, by Debye's expansion (DLMF 10.41.3) for v ≥ 2²⁰.

    With R = √(n² + v²) and p = n/R, in a form that does not divide by n: exp(R − v − n arsinh(n/v))
    / √(2πR) · (1 + (3 − 5p²) / 24R + (81 − 462p² + 385p⁴) / 1152R² + O(R⁻³)). The rest is below
    2⁻⁵³; rounding the exponent is what is left of the error. ``scipy.special.ive`` is off
    by 3·10⁻¹¹ at v = 2²⁸ and gives no number beyond 2³⁰.

    Args:
        variance: v, at least 2²⁰.
        largest: last n.

    Returns:
        Probability of n, which is that of −n too. [largest + 1]
    """
    n = np.arange(largest + 1, dtype=np.float64)
    radius = np.hypot(n, variance)
    exponent = n * n / (radius + variance) - n * np.arcsinh(n / variance)
    p = (n / radius) ** 2
    series = 1 + (3 - 5 * p) / (24 * radius)
    series += (81 - 462 * p + 385 * p * p) / (1152 * radius * radius)
    probabilities: NDArray[np.float64] = np.exp(exponent) * series / np.sqrt(2 * np.pi * radius)
    return probabilities
