"""Noise for whole clients that they make together: each adds a share, the server sees the sum.

A client clips its whole update to the norm C, rounds it to a grid of step γ and adds Skellam noise,
which is integer; secure aggregation then shows the server the sum of the clients only. Agarwal,
Kairouz, Liu, "The Skellam Mechanism", NeurIPS 2021, §3; the same idea with another distribution is
Kairouz, Liu, Steinke, "The Distributed Discrete Gaussian Mechanism", ICML 2021.

Sensitivity. The neighbour of a federation has one client's update replaced by any other. Two
clipped vectors are at most 2C apart and rounding moves either by γ√d / 2, so that rounded ones are
at most 2C + γ√d apart. The rounding's share is part of the claim.

Why m − c clients: the sum has at least m survivors, or the round ends before anything is unmasked.
Of them c may collude with the server and subtract the noise that they know. The noise of the others
has to be enough alone, so each adds (σ·2C)² / (m − c) of variance. More survivors only add noise.

Why integers: what is masked are integers modulo 2³². The sum that the server sees is a function of
the integer sum of clipped updates and noise, and reducing it modulo 2³² is post-processing; but
rounding a client's noisy value once more would not be a function of the sum. The grid of the masked
sum must therefore hold every multiple of γ up to ``largest``·γ, and nothing may be clipped there.

What is promised: (ε, δ) against the server with at most c colluding clients, as long as at least m
clients survive; computationally, for masks and noise come from ciphers (``csprng``). It does not
hold against someone who sees one client's vector unmasked.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from dp_accounting import rdp
from numpy.typing import NDArray

from fedsa_secure.errors import PrivacyError
from fedsa_secure.privacy.randomness import TurnSecret
from fedsa_secure.privacy.skellam import RELATIVE_ERROR, largest_draw, skellam_table

_BITS_OF_DEVIATION = 15
_CLIP_SLACK = 1 - 2.0**-40  # far more than the rounding errors of a norm by pairwise sums
_ORDERS = np.unique(np.geomspace(2, 2**15, 400).astype(np.int64))
_LARGEST_MULTIPLIER = 2**20
_DIGITS = 10**4


TAIL_SHARE = 0.01
"""Part of δ that is kept for draws beyond the tables."""


@dataclass(frozen=True)
class DiscreteNoise:
    """What every client of a federation adds to its update; all of it is public.

    ``DiscreteNoise.of`` makes it.
    """

    clip_norm: float
    """C: bound on the L2 norm of a client's update."""
    noise_multiplier: float
    """σ: the noise of all honest survivors has the standard deviation σ·2C."""
    honest: int
    """m − c: survivors that there are at least, and whose noise nobody knows."""
    values: int
    """d: length of an update."""
    step: float
    """γ: step of the grid, a power of two. The noise of a client has a standard deviation of
    2^14.5 to 2^15.5 steps."""

    @classmethod
    def of(
        cls, clip_norm: float, noise_multiplier: float, honest: int, values: int
    ) -> "DiscreteNoise":
        """The noise for σ and C, on a grid that fits them.

        Args:
            clip_norm: C, in units of the update.
            noise_multiplier: σ, a multiple of the sensitivity 2C.
            honest: m − c, survivors less colluders.
            values: d.

        Raises:
            PrivacyError: if nobody's noise would be unknown to the server.
            ValueError: if C, σ or d is not positive and finite.
        """
        if honest < 1:
            raise PrivacyError(
                "dp_noise 'distributed'",
                f"survivors less colluders has to be at least 1, not {honest}",
                "raise the least number of survivors, or use dp_noise='local'",
            )
        deviation = noise_multiplier * 2 * clip_norm / math.sqrt(honest)
        if not (0 < deviation < math.inf and clip_norm > 0 and values > 0):
            raise ValueError("clip norm, noise multiplier and length have to be positive, finite")
        step = 2.0 ** (round(math.log2(deviation)) - _BITS_OF_DEVIATION)
        return cls(clip_norm, noise_multiplier, honest, values, step)

    @property
    def variance(self) -> float:
        """Variance of one client's noise, in steps squared."""
        return (self.noise_multiplier * 2 * self.clip_norm / self.step) ** 2 / self.honest

    @property
    def total_variance(self) -> float:
        """Variance of the noise of the honest survivors, in steps squared."""
        return self.honest * self.variance

    @property
    def sensitivity_l2(self) -> float:
        """How far replacing a client moves the sum, in steps: (2C + γ√d) / γ."""
        return 2 * self.clip_norm / self.step + math.sqrt(self.values)

    @property
    def sensitivity_l1(self) -> float:
        """The same in the L1 norm: at most √d times as much, and its square, being integer."""
        return min(math.sqrt(self.values) * self.sensitivity_l2, self.sensitivity_l2**2)

    @property
    def largest(self) -> int:
        """Bound on the magnitude of an integer that a client sends."""
        return math.ceil(self.clip_norm / self.step) + largest_draw(self.variance)

    @property
    def table_epsilon(self) -> float:
        """What the table's distance from the Skellam distribution adds to a round's ε, at most."""
        return 2 * self.values * self.honest * RELATIVE_ERROR

    def privatise(
        self, update: NDArray[np.floating], secret: TurnSecret, label: str
    ) -> NDArray[np.float64]:
        """Clip, round to the nearest multiple of γ, add the client's share of noise.

        An update whose norm is no finite number counts as zero: an error would tell of the data.

        Args:
            update: a client's whole update. [d]
            secret: of the client's turn.
            label: names the block of noise.

        Returns:
            Multiples of γ, of magnitude at most ``largest``·γ. [d]

        Raises:
            PrivacyError: if the block of noise was used before.
            ValueError: if the update has another length.
        """
        if update.shape != (self.values,):
            raise ValueError(f"an update has {self.values} values, not {update.shape}")
        noise = secret.discrete(label, skellam_table(self.variance), self.values)
        return (self.rounded(update) + noise) * self.step

    def rounded(self, update: NDArray[np.floating]) -> NDArray[np.float64]:
        """The clipped update without noise, in steps: integers. [d]

        Args:
            update: a client's whole update. [d]
        """
        clipped = update.astype(np.float64)
        with np.errstate(over="ignore"):
            norm = math.sqrt(np.sum(clipped * clipped))
        if not math.isfinite(norm):
            return np.zeros(self.values)
        if norm > self.clip_norm * _CLIP_SLACK:
            clipped *= self.clip_norm * _CLIP_SLACK / norm
        return np.rint(clipped / self.step)


def skellam_renyi(
    total_variance: float, l1: float, l2: float, orders: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Rényi DP of the Skellam mechanism (Agarwal, Kairouz, Liu, NeurIPS 2021, Theorem 3.5).

    ε(α) ≤ α Δ₂² / 2μ + min(((2α − 1) Δ₂² + 6Δ₁) / 4μ², 3Δ₁ / 2μ) for noise of variance μ on every
    value of an integer vector.

    Args:
        total_variance: μ.
        l1: Δ₁, sensitivity in the L1 norm.
        l2: Δ₂, sensitivity in the L2 norm.
        orders: α, integers from 2. [order]

    Returns:
        ε at every order. [order]
    """
    gaussian = orders * l2**2 / (2 * total_variance)
    quadratic = ((2 * orders - 1) * l2**2 + 6 * l1) / (4 * total_variance**2)
    bound: NDArray[np.float64] = gaussian + np.minimum(quadratic, 3 * l1 / (2 * total_variance))
    return bound


def skellam_epsilon_of(rounds: Sequence[tuple[float, float, float]], delta: float) -> float:
    """The ε of rounds with distributed noise, composed in Rényi DP; never below the truth.

    The table's ``table_epsilon`` is not in it; what its draws leave out is, if that is within
    a hundredth of δ.

    Args:
        rounds: of each round the variance of the honest survivors' noise, and the sensitivities L1
            and L2, all on the grid: ``total_variance, sensitivity_l1, sensitivity_l2``.
        delta: δ.
    """
    total = np.zeros(len(_ORDERS))
    for variance, l1, l2 in rounds:
        total += skellam_renyi(variance, l1, l2, _ORDERS)
    return _to_epsilon(total, delta)


def _to_epsilon(renyi: NDArray[np.float64], delta: float) -> float:
    epsilon, _ = rdp.compute_epsilon(_ORDERS, renyi, delta * (1 - TAIL_SHARE))
    return float(epsilon)


def noise_multiplier_for_rounds(
    epsilon: float, delta: float, clip_norm: float, honest: int, values: int, rounds: int
) -> float:
    """The least σ, in steps of 10⁻⁴, with which all rounds together stay within ε.

    Args:
        epsilon: ε that is not to be exceeded.
        delta: δ.
        clip_norm: C.
        honest: m − c.
        values: d.
        rounds: how many rounds a client takes part in at most.

    Returns:
        σ; the certified ε, with rounding and the table's share, is at most ``epsilon``.

    Raises:
        PrivacyError: if no σ is enough, because of the rounding or of the table.
    """

    def spent(ticks: int) -> float:
        noise = DiscreteNoise.of(clip_norm, ticks / _DIGITS, honest, values)
        renyi = skellam_renyi(
            noise.total_variance, noise.sensitivity_l1, noise.sensitivity_l2, _ORDERS
        )
        return _to_epsilon(rounds * renyi, delta) + rounds * noise.table_epsilon

    low, high = 0, _DIGITS
    while spent(high) > epsilon:
        low, high = high, 2 * high
        if high > _LARGEST_MULTIPLIER * _DIGITS:
            raise PrivacyError(
                "dp_epsilon",
                f"no noise reaches {epsilon} over {rounds} rounds of {values} values on this grid",
                "allow a larger epsilon, fewer rounds, or share fewer values",
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if spent(middle) <= epsilon else (middle, high)
    return high / _DIGITS
