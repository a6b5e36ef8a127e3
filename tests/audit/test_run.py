"""One training with canaries: what they add up to, and that missing noise is caught."""

from typing import Any

import numpy as np
import pytest
import torch

from fedsa_secure.audit import RunFinding, audit_run, most_provable_in_one_run
from fedsa_secure.audit import run as run_module
from fedsa_secure.audit.canaries import Canaries
from fedsa_secure.audit.run import judged, train_with
from fedsa_secure.config import TrainConfig
from fedsa_secure.errors import ConfigError, PrivacyError
from fedsa_secure.federation.mechanism import Mechanism
from fedsa_secure.privacy import TurnSecret, gaussian_epsilon
from fedsa_secure.runtimes.prepare import Given, prepare

SMALL = {
    "clients": 2,
    "rank": 24,  # 2 layers of 2 targets: 3072 released values
    "rounds": 4,
    "local_steps": 2,
    "batch_size": 32,
    "max_length": 16,
    "dp_test_seed": 11,
    "dp_noise_multiplier": 3.0,  # more than the claim of 4 needs; spares the search
}


@pytest.fixture
def small_run(tiny_bert: Any, tiny_tokenizer: Any, small_dataset: Any) -> Any:
    def make(**options: Any) -> RunFinding:
        given = {
            "model": tiny_bert(),
            "tokenizer": tiny_tokenizer,
            "dataset": small_dataset(80),
            "epsilon": 4.0,
            **SMALL,
        }
        return audit_run(**{**given, **options})

    return make


def test_noise_that_fits_the_claim_holds(small_run: Any) -> None:
    found = small_run()
    assert found.verdict == "holds"
    assert found.proven <= found.claimed < found.most_provable
    assert found.noise_multiplier == 3.0
    # Among 2000 canaries the attack sees something: noise of this size leaves μ near 1/2.
    assert found.right > 0.52 * found.guesses


def test_missing_noise_is_caught(small_run: Any) -> None:
    """Claimed 4, trained without noise: no guess is wrong, and the largest bound comes out."""
    found = small_run(noise_multiplier=0.0, rounds=8)  # more steps: every canary is drawn
    assert found.verdict == "violated"
    assert found.right == found.guesses == int(0.95 * found.trials)
    assert found.proven == found.most_provable
    assert found.proven == most_provable_in_one_run(found.trials, found.guesses, 1e-6, 0.025)


def test_a_claim_that_could_not_be_refuted_is_inconclusive(small_run: Any) -> None:
    found = small_run(canaries=100)
    assert found.most_provable < found.claimed
    assert found.verdict == "inconclusive"


@pytest.mark.parametrize("clients", [1, 2])
def test_scores_without_noise_are_how_often_each_canary_was_drawn(
    clients: int, tiny_bert: Any, tiny_tokenizer: Any, small_dataset: Any
) -> None:
    """Each adds exactly C to its own value, whatever the records and the other client do."""
    options = {**SMALL, "dp_sampling_rate": 0.5, "dp_clip_weights": "joint"}
    config = TrainConfig.build(
        **options, dp_epsilon=4.0, dp_delta=1e-6, partition="iid", secure_aggregation=False
    )
    given = Given(tiny_bert(), small_dataset(80), tokenizer=tiny_tokenizer)
    prepared = prepare(given, config)
    present = np.arange(700) % 3 == 0  # more than one part of canaries
    planted, expected = Canaries(present, 0.5), np.zeros(700)
    mechanism = Mechanism.of(prepared.config, 3072)
    mechanism = Mechanism(**{**vars(mechanism), "noise_multiplier": 0.0})
    shared = train_with(planted, prepared, mechanism, clients)
    for number in range(1, 5):
        secret = TurnSecret.for_tests(3 * 11 + 1, 0, number)
        for step in range(2):
            coins = secret.coins(f"step {step}", 700, 0.5)
            expected += coins & present
    np.testing.assert_allclose(planted.scores, expected, atol=1e-4)
    assert expected[present].min() < expected[present].max()
    start = prepared.model.initial
    assert all(not torch.equal(tensor, start[name]) for name, tensor in shared.items())


def test_the_noise_of_the_scores_is_that_of_the_claim(
    small_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Absent canaries score pure noise: σ times the root of the steps, in clip norms."""
    seen: list[Any] = []
    original = judged
    monkeypatch.setattr(
        run_module, "judged", lambda *given: (seen.append(given), original(*given))[1]
    )
    small_run()
    scores, present, *_ = seen[0]
    absent = scores[~present]
    # 1000 values: the deviation's own relative error is 2.2 %; five of them.
    assert absent.std() == pytest.approx(3.0 * 8**0.5, rel=0.11)
    assert scores[present].mean() - absent.mean() == pytest.approx(4.0, abs=5 * 9 / 500**0.5)


def test_what_is_known_is_never_overstated() -> None:
    """Scores of exactly μ-private canaries; the bound may be wrong for 5 % of them."""
    stream, mu, delta = np.random.default_rng(8), 1.5, 1e-6
    config = TrainConfig.build(dp_epsilon=gaussian_epsilon(mu, delta), dp_delta=delta)
    found = []
    for _ in range(25):
        present = stream.random(1000) < 0.5
        scores = stream.normal(size=1000) + mu * present
        found.append(judged(scores, present, config, 1.0, 0.05).proven)
    assert sum(proven > config.dp_epsilon for proven in found) <= 6  # 5 %: 1.25; P(> 6) < 2e-4
    assert np.median(found) > 0.2 * config.dp_epsilon


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"secure_aggregation": True}, ConfigError, "secure_aggregation"),
        ({"dp_unit": "client"}, ConfigError, "dp_unit"),
        ({"rnak": 3}, ConfigError, "rnak"),
        ({"canaries": 3073}, ConfigError, "canaries"),
        ({"canaries": 5}, ConfigError, "canaries"),
        ({"dp_delta": 1e-3}, PrivacyError, "dp_delta"),
    ],
)
def test_what_cannot_be_audited_is_refused(
    small_run: Any, options: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        small_run(**options)


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "verdict"), [(None, "holds"), (0.0, "violated")])
def test_a_real_fine_tuning(noise: float | None, verdict: str) -> None:
    """MiniLM and the lexicon, ε = 8."""
    found = audit_run(noise_multiplier=noise)
    assert found.verdict == verdict
    assert found.most_provable > found.claimed == 8
    assert found.proven > (1 if noise is None else 8)
