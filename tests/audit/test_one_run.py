"""What one run proves: cases worked by hand, and mechanisms whose ε is known."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from fedsa_secure.audit.one_run import (
    guesses_needed,
    most_provable_in_one_run,
    one_run_epsilon,
    p_value,
)
from fedsa_secure.errors import PrivacyError

LN_3 = math.log(3)  # randomised response that is right with probability 3/4


@pytest.mark.parametrize(
    ("canaries", "guesses", "right", "delta", "expected"),
    [
        (1, 1, 1, 0.0, 3 / 4),
        (9, 1, 1, 0.0, 3 / 4),
        (2, 2, 1, 0.0, 15 / 16),
        (3, 3, 2, 0.0, 27 / 32),
        (5, 5, 0, 0.0, 1.0),
        # α = P[short by one] = 1/4: the claim with δ may gain one guess.
        (1, 1, 1, 0.1, 3 / 4 + 2 * 1 * 0.1 / 4),
        # α = max(6/16, (6/16 + 1/16) / 2)
        (2, 2, 2, 0.05, 9 / 16 + 2 * 2 * 0.05 * 6 / 16),
        # α = max(27/64, (27 + 27)/64 / 2, (27 + 27 + 9)/64 / 3, 64ths in all / 4) at four guesses
        (4, 3, 3, 0.01, 27 / 64 + 2 * 4 * 0.01 * 27 / 64),
        (4, 3, 2, 0.01, 54 / 64 + 2 * 4 * 0.01 * 9 / 64),
    ],
)
def test_probabilities_are_those_worked_by_hand(
    canaries: int, guesses: int, right: int, delta: float, expected: float
) -> None:
    assert p_value(canaries, guesses, right, LN_3, delta) == pytest.approx(expected, rel=1e-12)


def test_perfect_guesses_prove_the_closed_form() -> None:
    """With δ = 0 the rate of right coins is the r-th root of the false-alarm rate."""
    for guesses in (10, 1000, 9000):
        rate = 0.05 ** (1 / guesses)
        expected = math.log(rate / (1 - rate))
        assert most_provable_in_one_run(guesses, guesses, 0.0) == pytest.approx(expected, abs=1e-6)
    assert round(most_provable_in_one_run(1000, 1000, 0.0), 2) == 5.81  # design §7


@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 1e-6), (8.0, 1e-6), (8.0, 0.0), (3.0, 1e-5)])
def test_guesses_needed_are_the_fewest(epsilon: float, delta: float) -> None:
    needed = guesses_needed(epsilon, delta)
    assert most_provable_in_one_run(needed, needed, delta) > epsilon
    assert most_provable_in_one_run(needed - 1, needed - 1, delta) <= epsilon
    if epsilon == 8 and not delta:
        assert needed == math.ceil(math.log(0.05) / -math.log1p(math.exp(-8)))  # 8932


def test_a_delta_that_explains_every_guess_is_refused() -> None:
    with pytest.raises(PrivacyError, match="no number of canaries"):
        guesses_needed(8.0, 1e-4)


def check_rate(exceeded: int, runs: int, false_alarm: float) -> None:
    """No more often than promised; 1e-6 is the probability of refusing a bound that is exact."""
    assert exceeded <= binom.ppf(1 - 1e-6, runs, false_alarm)


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("delta", [0.0, 1e-4])
def test_randomised_response_is_found_and_never_overstated(epsilon: float, delta: float) -> None:
    """Each coin is answered by itself: right with the odds of ε, shown with probability δ."""
    runs, coins = 400, 2000
    stream = np.random.default_rng(7)
    right = stream.random((runs, coins)) < delta + (1 - delta) / (1 + math.exp(-epsilon))
    values = {int(v): one_run_epsilon(coins, coins, int(v), delta) for v in np.unique(right.sum(1))}
    proven = np.array([values[int(v)] for v in right.sum(1)])
    check_rate(int((proven > epsilon).sum()), runs, 0.05)
    assert np.median(proven) > 0.75 * epsilon


def test_coins_that_are_all_shown_now_and_then_are_in_the_bound() -> None:
    """All coins are shown with probability δ, and none otherwise: (0, δ)-private by definition."""
    runs, coins, delta = 2000, 20, 0.08
    stream = np.random.default_rng(3)
    right = stream.binomial(coins, 0.5, runs)
    right[stream.random(runs) < delta] = coins
    beyond = {int(v): one_run_epsilon(coins, coins, int(v), delta) for v in np.unique(right)}
    check_rate(sum(beyond[int(v)] > 0 for v in right), runs, 0.05)
    # Without the part of δ it would be overstated: 20 of 20 has probability 1e-6 under ε = 0.
    assert one_run_epsilon(coins, coins, coins, 0.0) > 1


def test_the_more_are_right_the_more_is_proven() -> None:
    proven = [one_run_epsilon(500, 400, right, 1e-5) for right in range(0, 401, 20)]
    assert proven == sorted(proven)
    assert proven[10] == 0.0
    assert proven[-1] == most_provable_in_one_run(500, 400, 1e-5)


@pytest.mark.parametrize("numbers", [(5, 6, 1), (5, 4, 5), (5, 4, -1)])
def test_impossible_numbers_are_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="right guesses"):
        p_value(*numbers, epsilon=1.0, delta=0.0)
