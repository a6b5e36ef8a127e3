"""How much privacy a list of noised steps spends, and how much noise a target needs.

Google's dp-accounting certifies: its privacy loss distributions (Doroshenko et al., "Connect the
Dots", PoPETs 2022) are rounded so that ε is an upper bound. Opacus' PRV accountant (Gopi et al.,
"Numerical Composition of Differential Privacy", 2021) only searches and cross-checks. There is no
option that selects an accountant: the central-limit one, Opacus' "gdp", lies below the truth.
"""

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache

import dp_accounting
import numpy as np
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from fedsa_secure.errors import PrivacyError

_FINE = 1e-4
"""Width of a bin of the privacy loss, for an ε between 1 and 10."""
_LEAST_DELTA = 1e-10
_ROUNDING = 1e-4
"""Part of δ kept back for the rounding of the Fourier transforms, some 1e-16 a bin."""
_DIGITS = 4
_SEARCH_ERROR = 0.1
"""Error band of the search as a part of the target; its middle is far nearer to the truth."""
_MOST_NOISE = 1e6

_Group = tuple[float, float, int]  # sampling rate, noise multiplier, steps


class Event(BaseModel):
    """Steps of one Poisson-sampled Gaussian mechanism.

    The noise multiplier is the noise's standard deviation over the sensitivity: over the clip norm
    C where a record is replaced by a null record, over 2C where a client is replaced.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(ge=1)
    sampling_rate: float = Field(gt=0, le=1)
    noise_multiplier: float = Field(gt=0, allow_inf_nan=False)


def certified_epsilon(events: Sequence[Event], delta: float) -> float:
    """ε of all events together, an upper bound.

    Adjacency is zero-out: one record replaced by a null record (docs/privacy.md). What an event
    computes may depend on what earlier ones released; its parameters may not.

    Args:
        events: in any order; none of them cost nothing.
        delta: probability that ε does not cover.

    Raises:
        PrivacyError: if delta is too small for the arithmetic, or not below 1.
    """
    _require_possible(delta)
    return _certify(_grouped(events), delta) if events else 0.0


def prv_epsilon(events: Sequence[Event], delta: float) -> float:
    """ε by Opacus' PRV accountant, the upper end of its error band of 0.01; a cross-check.

    Raises:
        PrivacyError: if the accountant finds no finite value; it does so for very little noise.
    """
    if not events:
        return 0.0
    epsilon = _prv(_grouped(events), delta, 0.01)
    if not math.isfinite(epsilon):
        raise PrivacyError("noise_multiplier", "the PRV accountant finds no finite epsilon")
    return epsilon


def noise_multiplier_for(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The least noise, within 1.5 %, of which ``steps`` steps are certified at most ε.

    Args:
        epsilon: the target.
        delta: probability that ε does not cover.
        sampling_rate: probability that a record takes part in a step.
        steps: number of steps.

    Returns:
        Standard deviation over sensitivity, of four significant digits.

    Raises:
        PrivacyError: if no noise between the possible bounds is certified, or delta is too small.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise PrivacyError("dp_epsilon", f"{epsilon:g} is not positive and finite")
    _require_possible(delta)
    sigma = _rounded_up(_search(epsilon, delta, sampling_rate, steps))
    while sigma <= _MOST_NOISE:
        event = Event(steps=steps, sampling_rate=sampling_rate, noise_multiplier=sigma)
        certified = certified_epsilon([event], delta)
        if certified <= epsilon:
            return sigma
        excess = certified / epsilon - 1
        sigma = _rounded_up(sigma * (1 + min(max(excess, 2e-4), 0.5)))
    raise PrivacyError(
        "dp_epsilon",
        f"{epsilon:g} in {steps} steps at delta {delta:g} needs more noise than {_MOST_NOISE:g} "
        "times the sensitivity",
        "take fewer steps or a larger dp_epsilon",
    )


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε at δ of one Gaussian mechanism, exactly: the root in ε of ``gaussian_delta``.

    Args:
        mu: sensitivity over standard deviation; √T/σ for T steps without sampling.
        delta: probability that ε does not cover.
    """
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    most = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))  # the tail of the loss alone
    return float(brentq(lambda e: gaussian_delta(mu, e) - delta, 0.0, most, xtol=1e-13, rtol=1e-13))


def gaussian_delta(mu: float, epsilon: float) -> float:
    """δ at ε of one Gaussian mechanism, exactly.

    Dong, Roth, Su, "Gaussian Differential Privacy", 2022, Corollary 2.13.

    Args:
        mu: sensitivity over standard deviation, positive.
        epsilon: at least zero.
    """
    tail = math.exp(epsilon + log_ndtr(-epsilon / mu - mu / 2))  # e^ε alone may overflow
    return max(0.0, float(ndtr(-epsilon / mu + mu / 2)) - tail)


def _require_possible(delta: float) -> None:
    if not _LEAST_DELTA <= delta < 1:
        raise PrivacyError(
            "dp_delta",
            f"{delta:g} is outside [{_LEAST_DELTA:g}, 1), where double precision can certify it",
            "choose a delta below one over the number of records",
        )


def _grouped(events: Sequence[Event]) -> tuple[_Group, ...]:
    """Steps of equal noise and sampling together: their order does not matter for a fixed list."""
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        steps[event.sampling_rate, event.noise_multiplier] += event.steps
    return tuple(sorted((rate, sigma, count) for (rate, sigma), count in steps.items()))


@lru_cache(maxsize=256)
def _certify(groups: tuple[_Group, ...], delta: float) -> float:
    """An upper bound at every bin width; the width is refined until it fits the size of ε."""
    allowed = delta * (1 - _ROUNDING)
    # The largest loss of one step is near 1/(2σ²): no more than some ten million bins of it.
    narrowest = 1e-7 / min(sigma for _, sigma, _ in groups) ** 2
    epsilon = _pld(groups, allowed, max(1e-2, narrowest))
    while True:
        refined = _pld(groups, allowed, max(_bin_width(epsilon), narrowest))
        if refined > epsilon / 2 or refined < 1e-4:
            return min(epsilon, refined)
        epsilon = refined


def _bin_width(epsilon: float) -> float:
    """Finer below ε = 1, where a bin of 1e-4 shows; coarser above 10, where it only costs time."""
    return _FINE * min(3 * max(epsilon, 1e-4), 1.0) if epsilon <= 10 else 1e-5 * epsilon


def _pld(groups: Sequence[_Group], delta: float, bin_width: float) -> float:
    """An upper bound: ε of these steps, or of some more."""
    for more in range(4):
        # With σ below 0.1 dp-accounting can cut the whole of a distribution off, and then fails;
        # with another number of steps it does not. Where it overflows, ε comes out infinite.
        longer = [(rate, sigma, steps + more) for rate, sigma, steps in groups]
        with suppress(IndexError), np.errstate(over="ignore"):
            epsilon = _composed(longer, delta, bin_width)
            if math.isfinite(epsilon):
                return epsilon
    # Sampling only helps, so this is a bound as well.
    mu = math.sqrt(sum(steps / sigma**2 for _, sigma, steps in groups))
    return gaussian_epsilon(mu, delta)


def _composed(groups: Sequence[_Group], delta: float, bin_width: float) -> float:
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL, bin_width)
    for rate, sigma, steps in groups:
        gaussian = dp_accounting.GaussianDpEvent(sigma)
        sampled = gaussian if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, gaussian)
        accountant.compose(sampled, steps)
    return float(accountant.get_epsilon(delta))


def _prv(groups: Sequence[_Group], delta: float, error: float) -> float:
    """Upper end of an error band of width 2·error; infinite where the accountant fails."""
    accountant = PRVAccountant()
    accountant.history = [(sigma, rate, steps) for rate, sigma, steps in groups]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", UserWarning)  # about its first guess of the domain
        try:
            epsilon = float(accountant.get_epsilon(delta, eps_error=error))
        except (ArithmeticError, RuntimeError, ValueError, MemoryError):
            return math.inf
    return epsilon if math.isfinite(epsilon) else math.inf


def _search(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """Noise near the least one; not certified."""
    high = math.sqrt(steps) / _gaussian_mu(epsilon, delta)  # sampling only helps
    if rate == 1:
        return high
    error = _SEARCH_ERROR * epsilon

    def excess(log_sigma: float) -> float:
        groups = ((rate, math.exp(log_sigma), steps),)
        middle = _prv(groups, delta, error) - error
        if not math.isfinite(middle):  # so it is from an ε of some hundreds on
            middle = _pld(groups, delta, error / 100)
        return math.log(min(max(middle / epsilon, 1e-3), 1e3))

    high = math.log(high)
    low = min(max(high + math.log(rate), math.log(0.3)), high - math.log(2))  # PRV is slow below
    while excess(low) <= 0:
        low, high = low - math.log(2), low
    return math.exp(brentq(excess, low, high, xtol=1e-4))


def _gaussian_mu(epsilon: float, delta: float) -> float:
    """The μ whose Gaussian mechanism is exactly (ε, δ)-private."""
    high = 1.0
    while gaussian_delta(high, epsilon) < delta:
        high *= 2
    return float(brentq(lambda mu: gaussian_delta(mu, epsilon) - delta, 1e-9, high, xtol=1e-15))


def _rounded_up(value: float) -> float:
    """Up to four significant digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - _DIGITS)
    return float(f"{math.ceil(value / unit * (1 - 1e-12)) * unit:.{_DIGITS}g}")
