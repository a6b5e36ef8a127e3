"""``audit run``: one real training with canaries in it. What does it prove about ε?

The run is made for the audit and for nothing else: thousands of canaries do the model no good. It
is trained by the code of any private run (``train_privately``), record level, with the noise that
the claim asks for. The attacker sees every noised gradient of the client, more than leaves it in a
run, since this is what the accountant counts.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64
from numpy.typing import NDArray

from fedsa_secure.audit.bounds import Finding
from fedsa_secure.audit.canaries import Canaries, CanaryStep
from fedsa_secure.audit.one_run import (
    guesses_needed,
    most_provable_in_one_run,
    one_run_epsilon,
)
from fedsa_secure.config import TrainConfig
from fedsa_secure.errors import ConfigError
from fedsa_secure.federation.encoding import Layout
from fedsa_secure.federation.local_training import ClientState, method_of
from fedsa_secure.federation.mechanism import Mechanism
from fedsa_secure.federation.private_training import (
    PrivateTurn,
    released_method,
    train_privately,
)
from fedsa_secure.federation.server import apply_mean, difference
from fedsa_secure.privacy import TurnSecret
from fedsa_secure.runtimes.prepare import Given, Prepared, prepare
from fedsa_secure.types import NamedTensors

_SHARES = (0.95, 0.02)
"""Parts of the canaries that are guessed: nearly all catch missing noise, few prove most of what
noise leaves. The false-alarm rate is divided between them."""
_MARGIN = 1.1
_LEAST_CANARIES = 2000
_DEFAULTS = {
    "clients": 10,
    "partition": "iid",
    "rounds": 10,
    "local_steps": 2,
    "batch_size": 128,
    "dp_delta": 1e-6,  # a larger one explains too many right guesses in one run
    "dp_sampling_rate": 0.5,
}
# One norm over all that is trained, so that a canary in A alone has the whole sensitivity.
_FIXED = {
    "dp_unit": "record",
    "dp_clip_weights": "joint",
    "dp_noise": "local",
    "secure_aggregation": False,
}
_OBJECTS = ("model", "dataset", "partition", "tokenizer")


class RunFinding(Finding):
    """What one training proves; ``trials`` is the number of its canaries.

    Args:
        guesses: how many coins the attacker guessed for ``proven``.
        right: how many of these guesses were right.
        noise_multiplier: σ of the training.
    """

    guesses: int
    right: int
    noise_multiplier: float


def audit_run(
    epsilon: float = 8.0,
    canaries: int | None = None,
    noise_multiplier: float | None = None,
    false_alarm: float = 0.05,
    trained_clients: int = 1,
    **options: Any,
) -> RunFinding:
    """Train once with canaries, guess which were in the data, and say what that proves.

    Args:
        epsilon: the claim.
        canaries: how many; by default enough to refute the claim, if there are as many released
            values.
        noise_multiplier: σ of the training, to try the audit itself: with 0 it has to say
            "violated". By default what the claim asks for.
        false_alarm: largest probability of proving more than is true.
        trained_clients: how many of the clients train, in one stack; the first has the canaries.
            The others' updates depend on it through what it releases only.
        options: as of ``train``: model, data and training. Some are fixed (``secure_aggregation``
            off, one clip norm over all that is trained); others have defaults of the audit: iid,
            20 steps, sampling rate ½, δ = 10⁻⁶.

    Raises:
        ConfigError: if an option is unknown, impossible or fixed, or there are more canaries than
            released values.
        PrivacyError: if ``dp_delta`` is so large that no number of canaries could refute the claim.

    Guarantee: ``proven`` exceeds the true ε of the training with at most ``false_alarm``.

    Source: Steinke, Nasr, Jagielski (NeurIPS 2023); white-box canaries: Nasr et al. (USENIX
        Security 2023), §3.
    """
    prepared = _prepared(epsilon, options)
    config = prepared.config
    values = sum(tensor.numel() for tensor in _start(prepared).values())
    count = _count(canaries, values, config, false_alarm)
    mechanism = Mechanism.of(config, values)
    if noise_multiplier is not None:
        mechanism = replace(mechanism, noise_multiplier=noise_multiplier)
    coins = _secret(config, "canaries", 0).coins("present", count, 0.5)
    planted = Canaries(coins, mechanism.sampling_rate)
    train_with(planted, prepared, mechanism, trained_clients)
    return judged(planted.scores, coins, config, mechanism.noise_multiplier, false_alarm)


def train_with(
    canaries: Canaries, prepared: Prepared, mechanism: Mechanism, clients: int
) -> NamedTensors:
    """All rounds of a private training whose first client has canaries; returns what is shared.

    Args:
        canaries: their scores are filled in.
        prepared: model, data and options.
        mechanism: clip norm, sampling and noise.
        clients: the first so many train.
    """
    config, model, data = prepared.config, prepared.model, prepared.data
    method = released_method(method_of(config, model.generates), config)
    shared = _start(prepared)
    layout = Layout.of(shared)
    states = [ClientState() for _ in data.shards[:clients]]

    def make_step(*made: Any, **named: Any) -> CanaryStep:
        tensors = [model.parameters(method.trained)[name] for name in shared]
        drawn = canaries.drawn(_secret(config, "sampling", number), config.local_steps)
        return CanaryStep(*made, canaries=canaries, tensors=tensors, drawn=drawn, **named)

    train = partial(train_privately, model, method, config, mechanism, data)
    for number in range(1, config.rounds + 1):
        turns = [
            PrivateTurn.of(client, state, _secret(config, "turn", number, client))
            for client, state in enumerate(states)
        ]
        results = train(shared, turns, number, make_step)
        updates = [layout.encode(difference(each.shared, shared)).double() for each in results]
        shared = apply_mean(shared, layout, torch.stack(updates).mean(0))
        states = [each.state for each in results]
    return shared


def judged(
    scores: Float64[NDArray[np.float64], " canary"],
    present: Bool[NDArray[np.bool_], " canary"],
    config: TrainConfig,
    noise_multiplier: float,
    false_alarm: float,
) -> RunFinding:
    """Guess the canaries with the highest scores in and those with the lowest out.

    Args:
        scores: of each canary.
        present: its coin.
        config: the claim.
        noise_multiplier: σ of the training.
        false_alarm: largest probability of proving more than is true.
    """
    count, level = len(scores), false_alarm / len(_SHARES)
    order = np.argsort(scores, kind="stable")
    tried = []
    for share in _SHARES:
        guesses = int(share * count)
        out, inside = order[: guesses // 2], order[count - (guesses - guesses // 2) :]
        right = int((~present[out]).sum() + present[inside].sum())
        proven = one_run_epsilon(count, guesses, right, config.dp_delta, level)
        most = most_provable_in_one_run(count, guesses, config.dp_delta, level)
        tried.append((proven, guesses, right, most))
    proven, guesses, right, _ = max(tried)
    return RunFinding(
        name="one training with canaries",
        claimed=float(config.dp_epsilon or 0.0),
        proven=proven,
        most_provable=max(most for *_, most in tried),
        delta=config.dp_delta,
        trials=count,
        false_alarm=false_alarm,
        guesses=guesses,
        right=right,
        noise_multiplier=noise_multiplier,
    )


def _prepared(epsilon: float, options: dict[str, Any]) -> Prepared:
    """Model and data of the audit's run."""
    for name in _FIXED:
        if name in options:
            raise ConfigError(name, "the audit sets it itself", "leave the option out")
    objects = {name: options.pop(name) for name in _OBJECTS if name in options}
    given = Given(**{"partition": _DEFAULTS["partition"], **objects})
    chosen = {**_DEFAULTS, **options, **given.options(), **_FIXED, "dp_epsilon": epsilon}
    return prepare(given, TrainConfig.build(**chosen))


def _start(prepared: Prepared) -> NamedTensors:
    """The public start of what is shared."""
    model = prepared.model
    method = method_of(prepared.config, model.generates)
    return {name: model.initial[name] for name in model.names(method.shared)}


def _count(canaries: int | None, values: int, config: TrainConfig, false_alarm: float) -> int:
    """Number of canaries: each needs a released value of its own."""
    if canaries is None:
        level, share = false_alarm / len(_SHARES), _SHARES[0]
        needed = guesses_needed(config.dp_epsilon or 0.0, config.dp_delta, level, share)
        return min(values, max(_LEAST_CANARIES, math.ceil(_MARGIN * needed / share)))
    if not 100 <= canaries <= values:
        raise ConfigError(
            "canaries",
            f"{canaries} of {values} released values",
            f"give from 100 to {values}; each canary has a value of its own",
        )
    return canaries


def _secret(config: TrainConfig, purpose: str, number: int, client: int = 0) -> TurnSecret:
    """Coins and noise of the operating system; in tests from a number."""
    if config.dp_test_seed is None:
        return TurnSecret.fresh()
    kind = ("turn", "sampling", "canaries").index(purpose)
    return TurnSecret.for_tests(3 * config.dp_test_seed + kind, client, number)
