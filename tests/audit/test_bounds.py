"""Lower bounds of ε are right for laws that are known, and say so when they cannot know."""

import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from fedsa_secure.audit import Finding, audit_two_worlds, largest_rate, most_provable
from fedsa_secure.privacy import gaussian_epsilon

DELTA = 1e-5


def gaussians(mu: float, trials: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    stream = np.random.default_rng(seed)
    return stream.normal(size=trials), stream.normal(mu, size=trials)


@pytest.mark.parametrize(("errors", "trials"), [(0, 10), (3, 40), (17, 200), (199, 200)])
def test_the_largest_rate_leaves_exactly_the_level(errors: int, trials: int) -> None:
    # Clopper and Pearson: at this rate so few errors have just this probability.
    rate = float(largest_rate(errors, trials, 0.025))
    assert binom.cdf(errors, trials, rate) == pytest.approx(0.025)


def test_all_errors_bound_nothing() -> None:
    assert float(largest_rate(7, 7, 0.05)) == 1.0


@pytest.mark.parametrize("mu", [0.5, 1.6651])
def test_a_gaussian_is_proven_nearly_whole_and_never_beyond(mu: float) -> None:
    finding = audit_two_worlds(
        *gaussians(mu, 60_000), gaussian_epsilon(mu, DELTA), DELTA, mu_claimed=mu
    )
    assert finding.mu_lower is not None
    assert 0.9 * mu < finding.mu_lower <= mu
    assert finding.verdict == "holds"


def test_a_side_of_the_canary_does_not_matter() -> None:
    without, present = gaussians(2.0, 10_000)
    right = audit_two_worlds(without, present, 20.0, DELTA, mu_claimed=3.0)
    left = audit_two_worlds(-without, -present, 20.0, DELTA, mu_claimed=3.0)
    assert left.mu_lower == pytest.approx(right.mu_lower, rel=0.01)
    assert left.proven == pytest.approx(right.proven, rel=0.01)


def test_false_alarms_are_as_rare_as_stated() -> None:
    # 400 audits of a true claim, each wrong with at most 5 %: more than 37 have a probability
    # below 0.1 %. The claim is exact, so this fails if the level were not shared out.
    mu, epsilon = 1.0, gaussian_epsilon(1.0, DELTA)
    findings = [
        audit_two_worlds(*gaussians(mu, 400, seed), epsilon, DELTA, mu_claimed=mu)
        for seed in range(400)
    ]
    assert sum(f.verdict == "violated" for f in findings) <= binom.ppf(0.999, 400, 0.05)


def test_randomised_response_is_bounded_pointwise() -> None:
    # ε of answering truthfully with probability p is exactly ln(p / (1 − p)), at δ = 0.
    stream, p = np.random.default_rng(1), 0.8
    without, present = stream.random(40_000) > p, stream.random(40_000) < p
    finding = audit_two_worlds(without, present, math.log(4), 0.0)
    assert 0.95 * math.log(4) < finding.proven <= math.log(4)
    assert finding.mu_lower is None


def test_worlds_that_are_told_apart_prove_the_most_provable() -> None:
    without, present = np.zeros(2000), np.ones(2000)
    for mu in (None, 0.3):
        finding = audit_two_worlds(without, present, 1.0, DELTA, mu_claimed=mu)
        assert finding.proven == pytest.approx(finding.most_provable)
        assert finding.verdict == "violated"


def test_most_provable_is_worked_out_by_hand() -> None:
    # No error in n trials: the rate is at most 1 − level^(1/n).
    rate = 1 - 0.025 ** (1 / 1000)
    assert most_provable(2000, DELTA) == pytest.approx(math.log((1 - DELTA - rate) / rate))
    rate = 1 - 0.0125 ** (1 / 1000)
    mu = 2 * norm.ppf(1 - rate)
    expected = gaussian_epsilon(mu, DELTA)
    assert most_provable(2000, DELTA, gaussian=True) == pytest.approx(expected)


def test_a_claim_beyond_what_is_provable_is_never_passed() -> None:
    finding = audit_two_worlds(*gaussians(0.0, 400), 8.0, DELTA)
    assert finding.claimed > finding.most_provable
    assert finding.verdict == "inconclusive"


def test_equal_worlds_prove_nothing() -> None:
    finding = audit_two_worlds(*gaussians(0.0, 4000), 1.0, DELTA, mu_claimed=0.268)
    assert finding.proven < 0.1


def test_a_finding_is_written_with_its_verdict() -> None:
    finding = audit_two_worlds(*gaussians(0.0, 400), 1.0, DELTA, name="x")
    written = finding.model_dump()
    assert written["verdict"] == "holds"
    written.pop("verdict")
    assert Finding(**written) == finding


@pytest.mark.parametrize(
    ("without", "present"),
    [([0.0] * 4, [0.0] * 5), ([0.0] * 3, [1.0] * 3), ([0.0] * 4, [math.nan] * 4)],
)
def test_numbers_that_are_no_trials_are_refused(without: list[float], present: list[float]) -> None:
    with pytest.raises(ValueError, match="trial"):
        audit_two_worlds(np.array(without), np.array(present), 1.0, DELTA)
