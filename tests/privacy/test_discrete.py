"""Noise that clients make together: sensitivity, variance of sums, and the claimed ε."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq
from scipy.special import ive, logsumexp

from fedsa_secure.errors import PrivacyError
from fedsa_secure.privacy.discrete import (
    DiscreteNoise,
    noise_multiplier_for_rounds,
    skellam_epsilon_of,
    skellam_renyi,
)
from fedsa_secure.privacy.randomness import TurnSecret
from fedsa_secure.privacy.skellam import skellam_probabilities

FALSE_ALARM = 1e-6  # over the choice of the secrets, which are fixed here
DELTA = 1e-5
ANY_FLOAT = st.floats(width=64, allow_nan=True, allow_infinity=True) | st.floats(-2, 2)
UPDATES = st.integers(1, 24).flatmap(
    lambda d: st.tuples(*[arrays(np.float64, d, elements=ANY_FLOAT)] * 2)
)


def coarse(values: int, step: float) -> DiscreteNoise:
    """Noise with C = 1 on a grid that is coarse enough to see the rounding."""
    return replace(DiscreteNoise.of(1.0, 1.0, 1, values), step=step)


def secret(client: int = 0) -> TurnSecret:
    return TurnSecret.for_tests(11, client, 0)


# --- sensitivity


@given(UPDATES, st.sampled_from([2.0**-8, 0.125, 0.5, 2.0]))
def test_no_replaced_client_moves_the_sum_by_more_than_claimed(
    updates: tuple[NDArray[np.float64], NDArray[np.float64]], step: float
) -> None:
    noise = coarse(len(updates[0]), step)
    moved = noise.rounded(updates[0]) - noise.rounded(updates[1])
    np.testing.assert_array_equal(moved, np.rint(moved))
    assert np.linalg.norm(moved) * step <= 2 + step * math.sqrt(noise.values)
    assert np.linalg.norm(moved) <= noise.sensitivity_l2
    assert np.abs(moved).sum() <= noise.sensitivity_l1 * (1 + 1e-12)
    assert max(np.abs(noise.rounded(update)).max() for update in updates) <= 1 / step + 1


def test_rounding_can_exceed_twice_the_clip_norm() -> None:
    noise = coarse(9, 0.5)
    update = np.full(9, 10.0)  # clipped to a third each, rounded up to a half
    moved = np.linalg.norm(noise.rounded(update) - noise.rounded(-update))
    assert moved * noise.step == 3.0 > 2 * noise.clip_norm
    assert moved <= noise.sensitivity_l2 == 7.0


def test_clip_keeps_the_direction_and_small_updates() -> None:
    noise = DiscreteNoise.of(2.0, 1.0, 3, 4)
    small = np.array([0.5, -1.0, 0.25, 1.5])
    np.testing.assert_array_equal(noise.rounded(small) * noise.step, small)
    clipped = noise.rounded(100 * small) * noise.step
    np.testing.assert_allclose(clipped, 2 * small / np.linalg.norm(small), atol=noise.step)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_update_without_a_finite_norm_counts_as_zero(bad: float) -> None:
    noise = DiscreteNoise.of(1.0, 1.0, 3, 4)
    update = np.array([1.0, bad, 0.0, 2.0])
    sent = noise.privatise(update, secret(), "noise")
    np.testing.assert_array_equal(sent, noise.privatise(np.zeros(4), secret(), "noise"))
    assert np.count_nonzero(sent) == 4


# --- noise


@pytest.mark.parametrize(("survivors", "honest"), [(4, 4), (6, 4), (6, 2)])
def test_sum_of_survivors_has_the_promised_noise(survivors: int, honest: int) -> None:
    values, sigma, clip_norm = 20_000, 1.3, 0.7
    noise = DiscreteNoise.of(clip_norm, sigma, honest, values)
    sent = [noise.privatise(np.zeros(values), secret(k), "noise") for k in range(survivors)]
    total = np.sum(sent, axis=0)
    grid = total / noise.step
    np.testing.assert_array_equal(grid, np.rint(grid))
    promised = (sigma * 2 * clip_norm) ** 2
    squares = float(total @ total) / (promised * survivors / honest)
    assert FALSE_ALARM < stats.chi2.cdf(squares, values) < 1 - FALSE_ALARM
    assert noise.total_variance * noise.step**2 == pytest.approx(promised)
    bound = stats.norm.isf(FALSE_ALARM / 2 / survivors**2) / math.sqrt(values)
    assert np.abs(np.corrcoef(sent) - np.eye(survivors)).max() < bound


def test_noise_is_added_to_the_rounded_update() -> None:
    noise = DiscreteNoise.of(0.5, 2.0, 3, 50)
    update = np.random.default_rng(0).normal(size=50).astype(np.float32)
    plain = noise.privatise(np.zeros(50), secret(), "noise")
    moved = noise.privatise(update, secret(), "noise") - plain
    np.testing.assert_array_equal(moved, noise.rounded(update) * noise.step)
    again = secret()
    noise.privatise(update, again, "noise")
    with pytest.raises(PrivacyError, match="drawn before"):
        noise.privatise(update, again, "noise")


@pytest.mark.parametrize("clip_norm", [1e-3, 0.1, 1.0, 77.0])
@pytest.mark.parametrize(("sigma", "honest"), [(0.05, 1), (0.9, 7), (12.0, 100)])
def test_grid_has_2_to_the_15_steps_in_a_deviation(
    clip_norm: float, sigma: float, honest: int
) -> None:
    noise = DiscreteNoise.of(clip_norm, sigma, honest, 10)
    assert 2**14 <= math.sqrt(noise.variance) <= 2**15 * math.sqrt(2)
    assert math.frexp(noise.step)[0] == 0.5
    deviation = sigma * 2 * clip_norm / math.sqrt(honest)
    assert math.sqrt(noise.variance) * noise.step == pytest.approx(deviation)
    assert noise.largest >= clip_norm / noise.step + 12 * math.sqrt(noise.variance)


# --- accounting


def log_bessel(order: int, variance: float) -> NDArray[np.float64]:
    """log(exp(−v) Iₙ(v)) for n = 0 … order, from ratios by backward recurrence (DLMF 10.29.1)."""
    ratios, ratio = np.empty(order), 0.0
    for n in range(order + 400, 0, -1):
        ratio = 1 / (2 * n / variance + ratio)  # I_n / I_(n−1)
        if n <= order:
            ratios[n - 1] = ratio
    return np.log(ive(0, variance)) + np.concatenate([[0], np.log(ratios).cumsum()])


@pytest.mark.parametrize("variance", [1.0, 10.0, 300.0, 5000.0])
@pytest.mark.parametrize("shift", [1, 2, 7, 40])
def test_bound_is_above_the_exact_renyi_divergence(variance: float, shift: int) -> None:
    orders = np.array([2, 3, 8, 32])
    reach = int(32 * shift + 40 * math.sqrt(variance) + 200)
    half = log_bessel(reach + shift, variance)
    n = np.arange(-reach, reach + 1)
    here, moved = half[np.abs(n)], half[np.abs(n - shift)]
    exact = [logsumexp(a * moved + (1 - a) * here) / (a - 1) for a in orders]
    bound = skellam_renyi(variance, float(shift), float(shift), orders)
    assert (bound >= np.array(exact) * (1 - 1e-10)).all()
    if variance == 5000:  # it is not merely a large number
        assert (bound <= np.array(exact) * 1.1).all()


def test_bound_is_the_one_of_the_theorem() -> None:
    # By hand: 3·4/8 + min((5·4 + 12)/64, 6/8), and 10·4/2 + min((19·4 + 12)/4, 6/2).
    assert skellam_renyi(4.0, 2.0, 2.0, np.array([3])) == 1.5 + 0.5
    assert skellam_renyi(1.0, 2.0, 2.0, np.array([10])) == 20 + 3


def test_claim_holds_for_the_exact_distribution_of_one_value() -> None:
    noise = DiscreteNoise.of(0.3, 2.0, 1, 1)
    epsilon = skellam_epsilon_of(
        [(noise.total_variance, noise.sensitivity_l1, noise.sensitivity_l2)], DELTA
    )
    reach, shift = 12 * math.isqrt(int(noise.variance)), math.floor(noise.sensitivity_l2)
    half = skellam_probabilities(noise.total_variance, reach + shift)
    n = np.arange(-reach, reach + 1)
    here, moved = half[np.abs(n)], half[np.abs(n - shift)]

    def exact_delta(claim: float) -> float:
        return float(np.maximum(moved - math.exp(claim) * here, 0).sum())

    assert exact_delta(epsilon) <= DELTA < exact_delta(epsilon / 1.15)


def gaussian_epsilon(sigma: float, rounds: int) -> float:
    """Balle and Wang, "Improving the Gaussian Mechanism", ICML 2018, Theorem 8."""
    mu = math.sqrt(rounds) / sigma

    def excess(epsilon: float) -> float:
        right = stats.norm.logcdf(-epsilon / mu - mu / 2)
        return stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + right) - DELTA

    return float(brentq(excess, 0, 500))


@pytest.mark.parametrize(("sigma", "rounds"), [(11.7973, 10), (1.8981, 10), (5.0, 200)])
def test_epsilon_is_that_of_gaussian_noise_and_little_more(sigma: float, rounds: int) -> None:
    noise = DiscreteNoise.of(0.1, sigma, 5, 1000)
    claim = (noise.total_variance, noise.sensitivity_l1, noise.sensitivity_l2)
    ideal = gaussian_epsilon(sigma, rounds)
    assert ideal < skellam_epsilon_of([claim] * rounds, DELTA) < 1.12 * ideal


def test_rounding_is_in_the_claim() -> None:
    fine = DiscreteNoise.of(1.0, 2.0, 4, 10_000)
    spent = []
    for factor in (1, 64, 1024):
        noise = replace(fine, step=fine.step * factor)
        assert noise.sensitivity_l2 * noise.step == pytest.approx(2 + noise.step * 100)
        claim = (noise.total_variance, noise.sensitivity_l1, noise.sensitivity_l2)
        spent.append(skellam_epsilon_of([claim], DELTA))
    assert spent[0] < spent[1] < spent[2]
    assert spent[2] > 2 * spent[0]


@pytest.mark.parametrize(
    ("epsilon", "honest", "values", "rounds"),
    [(8.0, 5, 75_000, 20), (1.0, 1, 1000, 10), (3.0, 80, 75_000, 100), (50.0, 2, 10, 1)],
)
def test_found_multiplier_is_the_least_that_keeps_the_claim(
    epsilon: float, honest: int, values: int, rounds: int
) -> None:
    def spent(sigma: float) -> float:
        noise = DiscreteNoise.of(0.1, sigma, honest, values)
        claim = (noise.total_variance, noise.sensitivity_l1, noise.sensitivity_l2)
        return skellam_epsilon_of([claim] * rounds, DELTA) + rounds * noise.table_epsilon

    sigma = noise_multiplier_for_rounds(epsilon, DELTA, 0.1, honest, values, rounds)
    assert sigma == round(sigma, 4)
    assert spent(sigma) <= epsilon < spent(sigma - 1e-4)


def test_what_no_noise_can_reach_is_refused() -> None:
    with pytest.raises(PrivacyError, match="no noise reaches"):
        noise_multiplier_for_rounds(0.01, DELTA, 0.1, 2, 1_000_000, 100)


# --- refusals


@pytest.mark.parametrize("honest", [0, -1])
def test_noise_that_colluders_know_entirely_is_refused(honest: int) -> None:
    with pytest.raises(PrivacyError, match="survivors"):
        DiscreteNoise.of(1.0, 1.0, honest, 10)


@pytest.mark.parametrize(
    ("clip_norm", "sigma", "values"),
    [(1.0, 0.0, 5), (0.0, 1.0, 5), (1.0, math.inf, 5), (1.0, 1.0, 0)],
)
def test_impossible_settings_are_refused(clip_norm: float, sigma: float, values: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        DiscreteNoise.of(clip_norm, sigma, 1, values)


def test_update_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="has 4 values"):
        DiscreteNoise.of(1.0, 1.0, 1, 4).privatise(np.zeros(5), secret(), "noise")
