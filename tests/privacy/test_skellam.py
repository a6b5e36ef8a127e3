"""The table of integer noise against references that share nothing with it."""

import mpmath
import numpy as np
import pytest
from scipy import stats
from scipy.special import ive

from fedsa_secure.privacy.randomness import TurnSecret
from fedsa_secure.privacy.skellam import (
    RELATIVE_ERROR,
    SMALLEST_VARIANCE,
    SkellamTable,
    skellam_probabilities,
    skellam_table,
)

FALSE_ALARM = 1e-6  # over the choice of the secret, which is fixed here


def probability(variance: float, n: int) -> mpmath.mpf:
    """exp(−v) Iₙ(v) from the integral of DLMF 10.32.3, moved through its saddle point."""
    v = mpmath.mpf(variance)
    radius = mpmath.sqrt(n * n + v * v)
    ends = mpmath.linspace(0, 16 / mpmath.sqrt(radius), 9)
    integral = mpmath.quad(
        lambda t: mpmath.exp(radius * (mpmath.cos(t) - 1)) * mpmath.cos(n * (t - mpmath.sin(t))),
        ends,
    )
    return integral / mpmath.pi * mpmath.exp(radius - v - n * mpmath.asinh(n / v))


def thresholds_of(table: SkellamTable) -> list[int]:
    """In units of 2⁻¹²⁷: the distribution function of the magnitude."""
    halves = zip(table._high.tolist(), table._low.tolist(), strict=True)
    return [(high << 64) + low for high, low in halves]


@pytest.mark.parametrize("variance", [SMALLEST_VARIANCE, 2.0**31.3])
@pytest.mark.parametrize("deviations", [0, 3, 6, 9.5])
def test_table_has_the_ideal_probabilities(variance: float, deviations: float) -> None:
    thresholds = [0, *thresholds_of(skellam_table(variance))]
    n = int(deviations * variance**0.5)
    with mpmath.workdps(45):
        ideal = probability(variance, n) * (2 if n else 1)
        got = mpmath.mpf(thresholds[n + 1] - thresholds[n]) / 2**127
        assert abs(got / ideal - 1) < RELATIVE_ERROR


def test_probabilities_agree_with_scipy_where_it_has_any() -> None:
    n = np.arange(9000)
    np.testing.assert_allclose(skellam_probabilities(2.0**20, 8999), ive(n, 2.0**20), rtol=1e-11)


def test_nothing_is_lost_beyond_the_table() -> None:
    table = skellam_table(2.0**31.3)
    thresholds = thresholds_of(table)
    assert thresholds[-1] == 2**127
    assert len(thresholds) == table.largest + 1
    assert table.largest >= 12 * table.variance**0.5
    probabilities = skellam_probabilities(table.variance, table.largest)
    assert probabilities[0] + 2 * probabilities[1:].sum() == pytest.approx(1, abs=1e-13)
    beyond = int(9.5 * table.variance**0.5)
    assert 2 * probabilities[beyond:].sum() < 3e-21


def test_draw_is_the_inverse_of_the_distribution_function() -> None:
    table = skellam_table(SMALLEST_VARIANCE)
    thresholds = thresholds_of(table)
    some = [0, 1, 2, 1000, 9000, 12000, table.largest - 1]  # at the end many share their high word
    uniforms = [thresholds[n] + move for n in some for move in (-1, 0)]
    uniforms += [0, 2**127 - 1]
    words = [(((u >> 64) << 1) + sign, u % 2**64) for u in uniforms for sign in (0, 1)]
    draws = table.draw(np.array(words, dtype="<u8").view("<u4").ravel())
    ideal = np.searchsorted(np.array(thresholds, dtype=object), uniforms, side="right")
    np.testing.assert_array_equal(draws, np.outer(ideal, [1, -1]).ravel())
    assert ideal[:4].tolist() == [0, 1, 1, 2]
    assert np.abs(draws).max() == table.largest


def test_draws_have_the_distribution() -> None:
    table = skellam_table(SMALLEST_VARIANCE)
    draws = TurnSecret.for_tests(0, 0, 0).discrete("noise", table, 200_000)
    half = ive(np.arange(12_001), SMALLEST_VARIANCE)
    below = np.concatenate([half[:0:-1], half]).cumsum()  # P(X ≤ n), n from −12000
    edges = np.searchsorted(below, np.linspace(0, 1, 101)[1:-1]) - 12_000
    shares = np.diff([0, *below[edges + 12_000], 1])
    counts = np.bincount(np.searchsorted(edges, draws), minlength=100)
    assert stats.chisquare(counts, shares * len(draws)).pvalue > FALSE_ALARM
    assert stats.chisquare(np.bincount(draws & 15)).pvalue > FALSE_ALARM  # no integer is favoured


@pytest.mark.parametrize("variance", [2.0**19, 2.0**35, float("nan")])
def test_variance_without_a_table_is_refused(variance: float) -> None:
    with pytest.raises(ValueError, match="variance"):
        SkellamTable(variance)
