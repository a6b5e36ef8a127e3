"""What a number of attacks proves about ε: lower bounds that are wrong with a stated probability.

An attack reads one number off what a run releases, and says "the record was there" if that number
is beyond a threshold. For an (ε, δ)-private run no attack can be right too often: a rate of false
alarms and a rate of misses that are both small refute the claim (Kairouz, Oh, Viswanath, "The
Composition Theorem for Differential Privacy", ICML 2015, Theorem 2.1; Nasr et al., "Tight Auditing
of Differentially Private Machine Learning", USENIX Security 2023, §4).

Sign and threshold are chosen on the first half of the trials and tested on the second, so the
bounds of Clopper and Pearson hold for the rates at that threshold.
"""

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, computed_field
from scipy.special import ndtri
from scipy.stats import beta

from fedsa_secure.privacy import gaussian_epsilon

_CANDIDATES = 1001
"""Thresholds that are tried on the first half: quantiles of all its values."""
_LEAST_TRIALS = 4

Verdict = Literal["holds", "violated", "inconclusive"]
_Values = NDArray[np.float64]


class Finding(BaseModel):
    """What an audit found out about one claim.

    Args:
        name: what was audited.
        claimed: ε that is promised, at ``delta``.
        proven: a lower bound of the true ε.
        most_provable: what perfect attacks in as many trials would have proven.
        mu_claimed: μ of the claim, if it is one of Gaussian differential privacy; else None.
        mu_lower: a lower bound of the true μ; None where ``mu_claimed`` is.
        delta: probability that ε does not cover.
        trials: in each of the two worlds, or of a single run.
        false_alarm: largest probability that ``proven`` lies above the truth.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    claimed: float
    proven: float
    most_provable: float
    mu_claimed: float | None = None
    mu_lower: float | None = None
    delta: float
    trials: int
    false_alarm: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Verdict:
        """Whether the claim is refuted; one that could not have been is never said to hold."""
        if self.proven > self.claimed:
            return "violated"
        return "inconclusive" if self.claimed > self.most_provable else "holds"


def audit_two_worlds(
    statistic_without: NDArray[Any],
    statistic_with: NDArray[Any],
    claimed: float,
    delta: float,
    false_alarm: float = 0.05,
    *,
    name: str = "two worlds",
    mu_claimed: float | None = None,
) -> Finding:
    """Test a claim of (ε, δ) with independent runs in two neighbouring worlds.

    Two tests are made, and ``false_alarm`` is shared between them and their two error rates. The
    pointwise one assumes (ε, δ) only. The Gaussian one is made where the claim is μ-GDP, which is
    more than (ε, δ): a refuted μ refutes the ε that was computed from it. Sampled steps (q < 1) are
    not μ-GDP for any useful μ; leave ``mu_claimed`` out for them.

    Args:
        statistic_without: the attack's number in each run without the canary. [trial]
        statistic_with: the same in the world with the canary. [trial]
        claimed: ε.
        delta: probability that ε does not cover.
        false_alarm: largest probability of proving more than is true.
        name: of the finding.
        mu_claimed: μ, if the claim is one of Gaussian differential privacy.

    Raises:
        ValueError: if the worlds have different numbers of trials, fewer than four, or NaN.
    """
    without, present = _checked(statistic_without), _checked(statistic_with)
    if len(without) != len(present):
        raise ValueError("both worlds need the same number of trials")
    level = false_alarm / (2 if mu_claimed is None else 4)
    half = len(without) // 2
    chosen, tested = (without[:half], present[:half]), (without[half:], present[half:])
    bounds = [_pointwise(*_rates(*tested, *_best_threshold(*chosen, delta, level), level), delta)]
    mu_lower = None
    if mu_claimed is not None:
        mu_lower = _gaussian(*_rates(*tested, *_balanced_threshold(*chosen), level))
        bounds.append(gaussian_epsilon(mu_lower, delta) if mu_lower > 0 else 0.0)
    return Finding(
        name=name,
        claimed=claimed,
        proven=max(bounds),
        most_provable=most_provable(
            len(without), delta, false_alarm, gaussian=mu_claimed is not None
        ),
        mu_claimed=mu_claimed,
        mu_lower=mu_lower,
        delta=delta,
        trials=len(without),
        false_alarm=false_alarm,
    )


def most_provable(
    trials: int, delta: float, false_alarm: float = 0.05, *, gaussian: bool = False
) -> float:
    """ε that ``audit_two_worlds`` proves if the worlds differ in every trial.

    Args:
        trials: in each world.
        delta: probability that ε does not cover.
        false_alarm: as in ``audit_two_worlds``.
        gaussian: whether the claim is one of Gaussian differential privacy.
    """
    tested = trials - trials // 2
    rate = float(largest_rate(0, tested, false_alarm / (4 if gaussian else 2)))
    pointwise = _pointwise(rate, rate, delta)
    mu = _gaussian(rate, rate)
    return max(pointwise, gaussian_epsilon(mu, delta)) if gaussian and mu > 0 else pointwise


def largest_rate(errors: NDArray[Any] | np.integer | int, trials: int, level: float) -> _Values:
    """Upper bound of Clopper and Pearson: a probability that is larger with confidence 1 − level.

    Args:
        errors: how often it came out, of each rate. [rate]
        trials: of each.
        level: probability that the bound lies below the truth.

    Returns:
        The bounds. [rate]
    """
    wrong = np.asarray(errors, np.float64)
    bounds = beta.ppf(1 - level, wrong + 1, np.maximum(trials - wrong, 0.5))
    return np.where(wrong >= trials, 1.0, bounds)


def _checked(statistic: NDArray[Any]) -> _Values:
    values = np.asarray(statistic, np.float64)
    if values.ndim != 1 or len(values) < _LEAST_TRIALS or np.isnan(values).any():
        raise ValueError(f"a statistic has at least {_LEAST_TRIALS} numbers, one for each trial")
    return values


def _rates(
    without: _Values, present: _Values, sign: int, threshold: float, level: float
) -> tuple[float, float]:
    """Upper bounds of the rates of false alarms and of misses."""
    alarms = largest_rate((sign * without > threshold).sum(), len(without), level)
    misses = largest_rate((sign * present <= threshold).sum(), len(present), level)
    return float(alarms), float(misses)


def _best_threshold(
    without: _Values, present: _Values, delta: float, level: float
) -> tuple[int, float]:
    """Sign and threshold of the largest pointwise bound on these trials."""
    best, half = (-math.inf, 1, 0.0), len(without)
    for sign in (1, -1):
        low, high = np.sort(sign * without), np.sort(sign * present)
        thresholds = np.quantile(np.concatenate([low, high]), np.linspace(0, 1, _CANDIDATES))
        alarms = largest_rate(half - np.searchsorted(low, thresholds, "right"), half, level)
        misses = largest_rate(np.searchsorted(high, thresholds, "right"), half, level)
        odds = np.maximum((1 - delta - misses) / alarms, (1 - delta - alarms) / misses)
        place = int(np.argmax(odds))
        best = max(best, (float(odds[place]), sign, float(thresholds[place])))
    return best[1], best[2]


def _balanced_threshold(without: _Values, present: _Values) -> tuple[int, float]:
    """The median of all trials, and the side of it where the canary's are."""
    middle = float(np.median(np.concatenate([without, present])))
    sign = 1 if (present > middle).sum() >= (without > middle).sum() else -1
    return sign, sign * middle


def _pointwise(alarms: float, misses: float, delta: float) -> float:
    """ε from misses ≥ 1 − δ − e^ε · alarms, and the same with both exchanged."""
    odds = max((1 - delta - misses) / alarms, (1 - delta - alarms) / misses)
    return math.log(odds) if odds > 1 else 0.0


def _gaussian(alarms: float, misses: float) -> float:
    """μ from the trade-off curve of two normal laws at distance μ (Dong, Roth, Su, 2022, §2.2)."""
    return max(0.0, float(ndtri(1 - alarms) - ndtri(misses))) if max(alarms, misses) < 1 else 0.0
