"""Attacks on whole trainings: ours prove at most the claim, every planted bug proves more."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from unsound_training import (
    MeanOverTokens,
    Naive,
    NaiveAdam,
    NoiseDividedByTheBatch,
    SumsThatStay,
    UnclippedHead,
)

from fedsa_secure.audit import Records, RecordTraining, audit_hidden_state, audit_two_worlds
from fedsa_secure.audit.hidden_state import (
    TwoWorlds,
    audit_gaussian,
    changed_record_of_client,
    clipped_record,
    hidden_record,
    noised_sums,
    replaced_client,
    sampled,
)
from fedsa_secure.privacy import (
    Event,
    SecretPoissonSampler,
    TurnSecret,
    certified_epsilon,
    noise_multiplier_for,
)

DELTA = 1e-5
SEED = 5  # the attacks below are the same in every run
BOTH = pytest.mark.parametrize("epsilon", [1.0, 8.0])


@BOTH
@pytest.mark.parametrize("frozen_b", [False, True])
def test_a_hidden_record_proves_no_more_than_claimed(frozen_b: bool, epsilon: float) -> None:
    finding = audit_gaussian(hidden_record(frozen_b=frozen_b), epsilon, DELTA, 1000, SEED)
    assert finding.verdict == "holds"


@pytest.mark.parametrize(
    "worlds",
    [clipped_record(steps=2), clipped_record(frozen_b=True, steps=2), replaced_client(steps=2)],
)
def test_the_attack_has_power(worlds: TwoWorlds) -> None:
    finding = audit_gaussian(worlds, 8.0, DELTA, 2500, SEED)
    assert finding.verdict == "holds"
    assert finding.mu_lower >= 0.85 * finding.mu_claimed


def test_one_record_of_a_client_needs_the_claim_of_a_replaced_one() -> None:
    # Calibrated to C instead of 2C, μ would be half of what one record proves.
    finding = audit_gaussian(changed_record_of_client(steps=2), 8.0, DELTA, 2500, SEED)
    assert finding.verdict == "holds"
    assert finding.mu_lower > 1.5 * finding.mu_claimed / 2


@BOTH
@pytest.mark.parametrize("start", [Naive, NaiveAdam])
def test_the_naive_construction_is_caught(start: type[RecordTraining], epsilon: float) -> None:
    finding = audit_gaussian(replace(hidden_record(), start=start), epsilon, DELTA, 1000, SEED)
    assert finding.verdict == "violated"
    assert finding.proven > 3 * finding.claimed


def coupled_losses() -> TwoWorlds:
    """A canary of many tokens among records whose gradients just reach the clip norm.

    With losses of their own they stay there; in a mean over the batch's tokens it silences them.
    """
    one, ordinary, tokens = torch.ones(1, 1, dtype=torch.float64), 20, 60
    inputs = torch.zeros(ordinary + 1, tokens, 4, dtype=torch.float64)
    targets = torch.zeros(ordinary + 1, tokens, dtype=torch.float64)
    inputs[:ordinary, 0, 1], targets[:ordinary, 0] = 1.0, 21.0
    inputs[ordinary, :, 3], targets[ordinary] = 1.0, 0.01
    lengths = torch.ones(ordinary + 1, dtype=torch.float64)
    lengths[ordinary] = tokens
    records = Records(inputs, targets, lengths)
    setting = replace(clipped_record().setting, B=one, head=one)
    return TwoWorlds(
        "coupled", setting, records.without(ordinary), records, lambda s: s[:, :2, 1].sum(1), seen=2
    )


@BOTH
@pytest.mark.parametrize(
    ("worlds", "start"),
    [
        (lambda: clipped_record(steps=3), NoiseDividedByTheBatch),
        (lambda: clipped_record(steps=3), SumsThatStay),
        (lambda: hidden_record(frozen_b=True), UnclippedHead),
        (coupled_losses, MeanOverTokens),
    ],
)
def test_a_planted_bug_is_caught(
    worlds: Callable[[], TwoWorlds], start: type[RecordTraining], epsilon: float
) -> None:
    sound = audit_gaussian(worlds(), epsilon, DELTA, 1000, SEED)
    assert sound.verdict == "holds"
    broken = audit_gaussian(replace(worlds(), start=start), epsilon, DELTA, 1000, SEED)
    assert broken.verdict == "violated"


def told_by_coins(public: bool, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Whoever knows the coins looks only at the steps in which the canary could have been."""
    worlds, trials = sampled(clipped_record(steps=2), rate=0.1), 2000
    steps = worlds.setting.steps
    setting = replace(
        worlds.setting, noise_multiplier=noise_multiplier_for(epsilon, DELTA, 0.1, steps)
    )
    numbers = []
    for world, records in enumerate((worlds.without, worlds.present)):
        known = [TurnSecret.for_tests(SEED, trial, world) for trial in range(trials)]
        others = [TurnSecret.for_tests(SEED + 1, trial, world) for trial in range(trials)]
        coins = torch.zeros(trials, steps, dtype=torch.float64)
        for own, secret in zip(coins, known, strict=True):
            for step, drawn in enumerate(SecretPoissonSampler(secret, 2, 0.1, steps)):
                own[step] = float(0 in drawn)
        again = [TurnSecret.for_tests(SEED, trial, world) for trial in range(trials)]
        training = RecordTraining(setting, records, again if public else others)
        sums = noised_sums(training, steps)[:, :, 2]
        numbers.append((coins * (-sums - 0.5)).sum(1).numpy())  # log likelihood ratio, times σ²
    return numbers[0], numbers[1]


@pytest.mark.parametrize("epsilon", [1.0])
def test_coins_from_a_public_seed_are_caught(epsilon: float) -> None:
    setting = sampled(clipped_record(steps=2), rate=0.1).setting
    sigma = noise_multiplier_for(epsilon, DELTA, 0.1, setting.steps)
    event = Event(steps=setting.steps, sampling_rate=0.1, noise_multiplier=sigma)
    claimed = certified_epsilon([event], DELTA)
    caught = audit_two_worlds(*told_by_coins(True, epsilon), claimed, DELTA)
    assert caught.verdict == "violated"
    secret = audit_two_worlds(*told_by_coins(False, epsilon), claimed, DELTA)
    assert secret.verdict == "holds"


def test_few_trials_pass_no_large_claim() -> None:
    findings = audit_hidden_state(epsilons=(8.0,), trials=50, seed=SEED)
    pointwise = [f for f in findings if f.mu_claimed is None]
    assert len(findings) == 8
    assert len(pointwise) == 2
    assert {f.verdict for f in pointwise} == {"inconclusive"}


@pytest.mark.slow
def test_the_whole_audit_at_full_power() -> None:
    # Secrets of the operating system: 16 findings, each wrong with a probability below 5 %.
    # Nothing but a false alarm can fail here; measured bounds lie well below their claims.
    for finding in audit_hidden_state():
        assert finding.verdict == "holds", finding


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(
    "worlds", [clipped_record(), clipped_record(frozen_b=True), replaced_client()]
)
def test_canaries_at_the_clip_norm_are_tight(worlds: TwoWorlds, epsilon: float) -> None:
    finding = audit_gaussian(worlds, epsilon, DELTA, 80_000 if epsilon < 2 else 20_000, SEED)
    print(finding)
    assert finding.verdict == "holds"
    assert finding.mu_lower >= 0.85 * finding.mu_claimed
