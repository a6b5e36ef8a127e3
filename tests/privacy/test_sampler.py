"""Poisson sampling with secret coins; fixed secrets, false-alarm rate 10⁻⁶ where one is needed."""

import numpy as np
import pytest
import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

from fedsa_secure.errors import PrivacyError
from fedsa_secure.privacy.randomness import TurnSecret, representable_rate
from fedsa_secure.privacy.sampler import SecretPoissonSampler

RECORDS, STEPS, RATE = 200, 500, 0.1
FALSE_ALARM = 1e-6


def drawn(first_step: int = 0, steps: int = STEPS) -> np.ndarray:
    """Which records are in which step. [step, record]"""
    secret = TurnSecret.for_tests(3, 1, 2)
    sampler = SecretPoissonSampler(secret, RECORDS, RATE, steps, first_step)
    member = np.zeros((steps, RECORDS))
    for step, places in enumerate(sampler):
        member[step, places] = 1
    return member


def test_sizes_of_batches_are_binomial() -> None:
    sizes = drawn().sum(1).astype(int)
    assert len(set(sizes)) > 10  # never cut or filled to one size
    variance = RECORDS * RATE * (1 - RATE)
    squares = ((sizes - RECORDS * RATE) ** 2).sum() / variance
    assert FALSE_ALARM < stats.chi2.cdf(squares, STEPS) < 1 - FALSE_ALARM
    assert stats.binomtest(sizes.sum(), RECORDS * STEPS, RATE).pvalue > FALSE_ALARM


def test_every_record_has_the_same_chance() -> None:
    counts = drawn().sum(0)
    squares = ((counts - STEPS * RATE) ** 2).sum() / (STEPS * RATE * (1 - RATE))
    assert FALSE_ALARM < stats.chi2.cdf(squares, RECORDS) < 1 - FALSE_ALARM


def test_records_and_steps_are_independent() -> None:
    member = drawn()
    for rows in (member, member.T):
        correlations = np.corrcoef(rows)[np.triu_indices(len(rows), 1)]
        bound = stats.norm.isf(FALSE_ALARM / 2 / len(correlations)) / np.sqrt(rows.shape[1])
        assert np.abs(correlations).max() < 1.5 * bound  # tails of binomials, not of normals


def test_steps_are_named_by_their_number() -> None:
    np.testing.assert_array_equal(drawn()[7:12], drawn(first_step=7, steps=5))


def test_batch_may_be_empty_or_whole() -> None:
    secret = TurnSecret.for_tests(0, 0, 0)
    assert list(SecretPoissonSampler(secret, 3, 2.0**-32, 4)) == [[], [], [], []]
    assert list(SecretPoissonSampler(secret, 3, 1.0, 2, first_step=4)) == [[0, 1, 2]] * 2


def test_second_pass_is_refused() -> None:
    sampler = SecretPoissonSampler(TurnSecret.for_tests(0, 0, 0), 3, 0.5, 2)
    list(sampler)
    with pytest.raises(PrivacyError, match="step 0"):
        list(sampler)


def test_fresh_turns_draw_other_batches() -> None:
    turns = [list(SecretPoissonSampler(TurnSecret.fresh(), 256, 0.5, 1)) for _ in range(2)]
    assert turns[0] != turns[1]  # but for a chance of 2⁻²⁵⁶


def test_sampler_is_what_opacus_and_a_loader_expect() -> None:
    sampler = SecretPoissonSampler(TurnSecret.for_tests(0, 0, 0), 40, 1 / 3, 6)
    assert isinstance(sampler, UniformWithReplacementSampler)
    assert len(sampler) == 6
    assert sampler.sample_rate == representable_rate(1 / 3)
    loader = DataLoader(TensorDataset(torch.arange(40)), batch_sampler=sampler)
    same = SecretPoissonSampler(TurnSecret.for_tests(0, 0, 0), 40, 1 / 3, 6)
    assert [batch.tolist() for (batch,) in loader] == list(same)


def test_no_records_are_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        SecretPoissonSampler(TurnSecret.for_tests(0, 0, 0), 0, 0.5, 1)
