"""Attacks on whole trainings: ours prove at most the claim, every planted bug proves more."""

from dataclasses import replace
from itertools import count, islice

import pytest
import torch
from unsound_training import (
    CoinsOfTheSeed,
    MeanOverTokens,
    Naive,
    NaiveAdam,
    NoiseDividedByTheBatch,
    SumsThatStay,
    UnclippedHead,
    coins_of,
)

from fedsa_secure.audit import Records, RecordTraining, audit_hidden_state
from fedsa_secure.audit.hidden_state import (
    TwoWorlds,
    audit_distributed,
    audit_gaussian,
    audit_sampled,
    changed_record_of_client,
    clipped_record,
    hidden_record,
    replaced_client,
    sampled,
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
    finding = audit_gaussian(worlds, 8.0, DELTA, 4000, SEED)
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


@pytest.mark.parametrize(
    ("worlds", "start"),
    [
        (clipped_record(steps=3), NoiseDividedByTheBatch),
        (clipped_record(steps=3), SumsThatStay),
        (hidden_record(frozen_b=True), UnclippedHead),
        (coupled_losses(), MeanOverTokens),
    ],
)
def test_a_planted_bug_is_caught(worlds: TwoWorlds, start: type[RecordTraining]) -> None:
    sound = audit_gaussian(worlds, 8.0, DELTA, 1000, SEED)
    assert sound.verdict == "holds"
    broken = audit_gaussian(replace(worlds, start=start), 8.0, DELTA, 1000, SEED)
    assert broken.verdict == "violated"


def turns_with_the_canary(worlds: TwoWorlds, trials: int) -> list[int]:
    drawn = (k for k in count() if 0 in next(coins_of(k, worlds.setting, worlds.present)))
    return list(islice(drawn, trials))


@pytest.mark.parametrize(
    ("start", "verdict"), [(CoinsOfTheSeed, "violated"), (RecordTraining, "holds")]
)
def test_coins_from_a_public_seed_are_caught(
    start: type[RecordTraining], verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A run's seed is public, so its promise has to hold for every seed. The attacker takes runs
    # whose seed, were it that of the coins, has the canary in the first step: no sampling hides it.
    worlds, trials = sampled(clipped_record(steps=1), rate=0.1), 1500
    if start is CoinsOfTheSeed:
        monkeypatch.setattr(start, "public", turns_with_the_canary(worlds, trials))
    finding = audit_sampled(replace(worlds, start=start), 1.0, DELTA, trials, SEED)
    assert finding.verdict == verdict


def test_few_trials_pass_no_large_claim() -> None:
    worlds = replaced_client(steps=2)
    assert audit_distributed(worlds, 8.0, DELTA, 200, SEED).verdict == "inconclusive"
    assert audit_distributed(worlds, 1.0, DELTA, 200, SEED).verdict == "holds"


@pytest.mark.slow
def test_the_whole_audit_at_full_power() -> None:
    # Of 16 tests with a false-alarm rate of 5 % some would fail; the seed fixes which.
    findings = audit_hidden_state(seed=SEED)
    assert len(findings) == 16
    assert {finding.verdict for finding in findings} == {"holds"}


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(
    "worlds", [clipped_record(), clipped_record(frozen_b=True), replaced_client()]
)
def test_canaries_at_the_clip_norm_are_tight(worlds: TwoWorlds, epsilon: float) -> None:
    finding = audit_gaussian(worlds, epsilon, DELTA, 120_000 if epsilon < 2 else 20_000, SEED)
    print(finding)
    assert finding.verdict == "holds"
    assert finding.mu_lower >= 0.85 * finding.mu_claimed
