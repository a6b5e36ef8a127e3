"""What one training run proves about ε, with many canaries in it.

Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023. Each of m
canaries is in the data with probability ½, by coins of its own. The attacker sees what the run
releases and guesses r of the coins. If the run is (ε, δ)-private for every single canary, the
number of right guesses is hardly larger than that of r coins that land right with probability
e^ε / (1 + e^ε): Theorem 5.2. So v right guesses refute every ε for which that is improbable.

How many may be guessed is public, so what could be proven at best is known beforehand: 1000 guesses
that are all right prove no more than ε = 5.81 with confidence 95 %.
"""

import math

import numpy as np
from scipy.optimize import bisect
from scipy.special import expit
from scipy.stats import binom

from fedsa_secure.errors import PrivacyError

_LARGEST = 60.0
"""No number of guesses that can be made proves more."""
_TOLERANCE = 1e-9


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Bound on the probability of so many right guesses if the run is (ε, δ)-private.

    Args:
        canaries: m; each is in or out with probability ½.
        guesses: r, fixed before the run; about the others nothing is said.
        right: v.
        epsilon: ε.
        delta: δ.

    Raises:
        ValueError: unless 0 ≤ v ≤ r ≤ m.

    Source: Steinke, Nasr, Jagielski (NeurIPS 2023), Theorem 5.2 and appendix D.
    """
    if not 0 <= right <= guesses <= canaries:
        raise ValueError("there are at most as many right guesses as guesses, and as canaries")
    rate = float(expit(epsilon))
    beyond = float(binom.sf(right - 1, guesses, rate))
    # With δ the attacker may gain i right guesses, in runs whose probability is about 2mδ / i.
    short = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, rate))
    slope = float((short / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, beyond + 2 * canaries * delta * slope)


def one_run_epsilon(
    canaries: int, guesses: int, right: int, delta: float, false_alarm: float = 0.05
) -> float:
    """The largest ε that this many right guesses refute.

    Args:
        canaries: m.
        guesses: r.
        right: v.
        delta: δ of the claim.
        false_alarm: largest probability that the result lies above the true ε.

    Returns:
        A lower bound of ε at ``delta``; 0 if nothing is proven.

    Guarantee: for a run that is (ε, δ)-private under removal of any canary, the result exceeds ε
        with at most this probability, given that the coins of the canaries are independent and
        fair, and r was fixed before them.
    """

    def excess(epsilon: float) -> float:
        return p_value(canaries, guesses, right, epsilon, delta) - false_alarm

    if excess(0.0) >= 0:
        return 0.0
    low, high = 0.0, 1.0
    while high < _LARGEST and excess(high) < 0:
        low, high = high, high + 1
    # Nothing is said to be proven beyond the first ε that is not refuted.
    return float(bisect(excess, low, high, xtol=_TOLERANCE)) - _TOLERANCE


def most_provable_in_one_run(
    canaries: int, guesses: int, delta: float, false_alarm: float = 0.05
) -> float:
    """ε that is proven if every guess is right.

    Args:
        canaries: m.
        guesses: r.
        delta: δ of the claim.
        false_alarm: as in ``one_run_epsilon``.
    """
    return one_run_epsilon(canaries, guesses, guesses, delta, false_alarm)


def guesses_needed(
    epsilon: float, delta: float, false_alarm: float = 0.05, share: float = 1.0
) -> int:
    """The fewest guesses, all of them right, that prove more than ε.

    Args:
        epsilon: the claim that is to be refutable.
        delta: δ of the claim.
        false_alarm: as in ``one_run_epsilon``.
        share: part of the canaries that is guessed, r / m.

    Raises:
        PrivacyError: if no number of guesses is enough: δ lets an attacker gain as many as are
            needed.
    """

    def refuted(guesses: int) -> bool:
        canaries = math.ceil(guesses / share)
        return p_value(canaries, guesses, guesses, epsilon, delta) < false_alarm

    fewest = math.ceil(math.log(false_alarm) / math.log(expit(epsilon)))  # with δ = 0
    most = fewest
    while not refuted(most):
        most = math.ceil(1.25 * most)
        if most > 32 * fewest:
            raise PrivacyError(
                "dp_delta",
                f"at delta {delta:g} no number of canaries in one run can refute epsilon "
                f"{epsilon:g}",
                "audit a claim with a smaller delta, or in two worlds",
            )
    low = fewest - 1
    while most - low > 1:
        middle = (low + most) // 2
        low, most = (low, middle) if refuted(middle) else (middle, most)
    return most
