"""``audit mechanism``: one release, thousands of times, through the code that a run goes through.

Clip, noise, optimizer step, fixed point, mask, sum and decoding are those of the library. Only what
is clipped is made up: a canary that saturates the clip norm, so that no neighbour is easier to tell
apart. The noise is set so that the release is exactly μ-GDP with μ = 2, where few trials prove
nearly all of μ; then the noise of the run's own σ is measured by itself.

The client axis carries the trials: every client of a stack has its own sum, its own noise and its
own secret, so C clients are C independent trials. Their updates are the vector of one client of a
round of secure aggregation; one other sends noise too, if the noise is made together.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from fedsa_secure.adapters import GroupedLinear
from fedsa_secure.adapters.context import BatchContext
from fedsa_secure.audit.bounds import Finding, audit_two_worlds
from fedsa_secure.audit.masked_sum import CLIENTS, masked_sum
from fedsa_secure.audit.noise import NoiseFinding, audit_noise
from fedsa_secure.config import TrainConfig
from fedsa_secure.federation.mechanism import Mechanism, calibrated
from fedsa_secure.federation.optimizers import OptimizerSettings, OptimizerState, StackedOptimizer
from fedsa_secure.federation.update_range import update_range
from fedsa_secure.privacy import (
    ClipGroup,
    PartialBatch,
    PrivateStep,
    TurnSecret,
    gaussian_epsilon,
    gaussian_update,
    skellam_epsilon_of,
)

MU = 2.0
"""μ of the release that is attacked."""
_STEPS = 2
_RECORDS = 2  # of a client: an ordinary one, and the canary or nothing
_VALUES = 2  # of a trial: the canary's coordinate and the ordinary record's
_BEYOND = 1e3  # norm of a canary, in clip norms
_NOISE_SHAPE = (4, 32, 256)  # rounds, clients, values
_MODES = {
    "record": {"dp_unit": "record"},
    "client, local noise": {"dp_unit": "client"},
    "client, distributed noise": {"dp_unit": "client", "dp_noise": "distributed"},
}


def audit_mechanism(
    config: TrainConfig | None = None,
    trials: int = 10_000,
    false_alarm: float = 1e-3,
    test_seed: int | None = None,
) -> list[Finding | NoiseFinding]:
    """Attack single releases at μ = 2 and q = 1, and test the noise at the run's own σ.

    Args:
        config: gives ε, δ, clip norm, sampling rate and steps; by default those of
            ``train(dp_epsilon=8)``. Unit and kind of noise are varied.
        trials: in each of the two worlds.
        false_alarm: of every finding: the largest probability that it says "violated" and all is
            well.
        test_seed: for tests: noise from this number.

    Returns:
        For each mode what the attack proves, then variance and correlations of its noise.

    Source: Nasr et al., "Tight Auditing of Differentially Private Machine Learning", USENIX
        Security 2023, §4; docs/privacy.md.
    """
    config = config or TrainConfig.build(dp_epsilon=8.0)
    found: list[Finding | NoiseFinding] = []
    for number, (name, options) in enumerate(_MODES.items()):
        own = config.replace(clients=CLIENTS, dp_noise_multiplier=None, **options)
        seed = None if test_seed is None else 1000 * (3 * test_seed + number)
        found.append(audit_release(name, own, trials, false_alarm, seed))
        found += audit_release_noise(name, own, false_alarm, seed)
    return found


def audit_release(
    name: str, config: TrainConfig, trials: int, false_alarm: float, seed: int | None = None
) -> Finding:
    """Trials with and without a canary at μ = 2, told apart by its coordinate of the sum.

    A record is there or is not; a client is replaced by its opposite.

    Args:
        name: of the finding.
        config: of three clients.
        trials: in each world.
        false_alarm: of the finding.
        seed: for tests.
    """
    record = config.dp_unit == "record"
    sigma = math.sqrt(_STEPS if record else 1) / MU
    mechanism = Mechanism.of(config.replace(dp_noise_multiplier=sigma), _VALUES)
    mechanism = replace(mechanism, sampling_rate=1.0, steps=_STEPS if record else 1)
    worlds = (0.0, _BEYOND) if record else (-_BEYOND, _BEYOND)
    without, present = (
        release(mechanism, trials, _VALUES, canary, None if seed is None else seed + world)[:, 0]
        for world, canary in enumerate(worlds)
    )
    mu, epsilon = _claim(mechanism, config.dp_delta)
    return audit_two_worlds(
        without.numpy(),
        present.numpy(),
        epsilon,
        config.dp_delta,
        false_alarm,
        name=f"{name}: one release at μ = 2",
        mu_claimed=mu,
    )


def audit_release_noise(
    name: str, config: TrainConfig, false_alarm: float, seed: int | None = None
) -> list[NoiseFinding]:
    """Noise of releases that saw no data, at the σ that the run itself would have.

    Args:
        name: what the findings begin with.
        config: of three clients; its ``dp_noise_multiplier`` is calibrated if it is None.
        false_alarm: of each finding.
        seed: for tests.
    """
    rounds, clients, values = _NOISE_SHAPE
    sigma = config.dp_noise_multiplier or calibrated(config, values)
    mechanism = Mechanism.of(config.replace(dp_noise_multiplier=sigma), values)
    noise = [
        release(mechanism, clients, values, None, None if seed is None else seed + 10 + k)
        for k in range(rounds)
    ]
    stacked = torch.stack(noise).numpy()
    label = f"{name}: noise at σ = {sigma:.4g}"
    return audit_noise(stacked, _deviation(mechanism), false_alarm, name=label)


def release(
    mechanism: Mechanism, trials: int, values: int, canary: float | None, seed: int | None = None
) -> Float64[Tensor, "trial value"]:
    """What the server decodes, of independent trials of one release.

    Args:
        mechanism: as the run has it.
        trials: how many.
        values: length of an update.
        canary: its length in clip norms along the first coordinate; None for no data at all.
        seed: for tests.
    """

    def secrets(client: int) -> list[TurnSecret]:
        if seed is None:
            return [TurnSecret.fresh() for _ in range(trials)]
        return [TurnSecret.for_tests(seed, client, trial) for trial in range(trials)]

    if mechanism.record:
        vectors = [_record_updates(mechanism, values, canary, secrets(0))]
        bound = _record_range(mechanism)
    else:
        vectors = [_client_updates(mechanism, values, canary, secrets(0))]
        if mechanism.discrete is not None:  # the other honest client of the three; it has no data
            vectors += [
                _client_updates(mechanism, values, None, secrets(client))
                for client in range(1, mechanism.discrete.honest)
            ]
        bound = mechanism.largest_update()
    return masked_sum([vector.flatten() for vector in vectors], bound).view(trials, values)


def _record_updates(
    mechanism: Mechanism, values: int, canary: float | None, secrets: list[TurnSecret]
) -> Float64[Tensor, "trial value"]:
    """Updates of clients with two records, by private steps of SGD with rate 1."""
    trials, context = len(secrets), BatchContext()
    layer = GroupedLinear(nn.Linear(values, 1, bias=False), context)
    context.clients = context.rows = trials
    layer.weight = nn.Parameter(torch.zeros(trials, 1, values))
    optimizer = StackedOptimizer(
        {"weight": layer.weight}, OptimizerState(), OptimizerSettings(kind="sgd")
    )
    optimizer.rates = {"weight": 1.0}
    step = PrivateStep(
        layer,
        [ClipGroup((layer.weight,), mechanism.clip_norm)],
        optimizer,
        noise_multiplier=mechanism.noise_multiplier,
        expected_batches=torch.full((trials,), mechanism.sampling_rate * _RECORDS),
        secrets=secrets,
    )
    with step.open():
        for _ in range(mechanism.steps):
            step(_parts(layer, trials, values, canary, mechanism.clip_norm))
    return layer.weight.detach()[:, 0].double()


def _parts(
    layer: GroupedLinear, trials: int, values: int, canary: float | None, clip_norm: float
) -> Iterator[PartialBatch]:
    """An ordinary record of every client, then its canary; each is the gradient of its loss."""
    for place, length in ((1, 0.5), (0, canary)):
        record = torch.zeros(trials, values)
        record[:, place] = clip_norm * (length or 0.0)
        present = canary is not None and bool(length)
        yield PartialBatch(layer(record).squeeze(1), torch.full((trials, 1), present))


def _client_updates(
    mechanism: Mechanism, values: int, canary: float | None, secrets: list[TurnSecret]
) -> Float64[Tensor, "trial value"]:
    """Whole updates with what each client adds of the noise itself."""
    update = torch.zeros(values, dtype=torch.float64)
    update[0] = mechanism.clip_norm * (canary or 0.0)
    if mechanism.discrete is not None:
        noise, given = mechanism.discrete, update.numpy()
        made = [noise.privatise(given, secret, "update") for secret in secrets]
        return torch.from_numpy(np.stack(made))
    norm, sigma = mechanism.clip_norm, mechanism.noise_multiplier
    return torch.stack(
        [gaussian_update(update, norm, sigma, secret, "update") for secret in secrets]
    )


def _record_range(mechanism: Mechanism) -> float:
    """The range that a run takes for such steps (``Simulation``)."""
    settings = OptimizerSettings(kind="sgd", max_grad_norm=mechanism.largest_gradient(_RECORDS))
    return update_range(TrainConfig.build(), settings, [1.0] * mechanism.steps, largest=0.0)


def _claim(mechanism: Mechanism, delta: float) -> tuple[float, float]:
    """μ and ε of one release."""
    noise = mechanism.discrete
    if noise is None:
        return MU, gaussian_epsilon(MU, delta)
    # Near enough a normal law; the rounding's share of the sensitivity is in it.
    mu = noise.sensitivity_l2 / math.sqrt(noise.total_variance)
    each = (noise.total_variance, noise.sensitivity_l1, noise.sensitivity_l2)
    return mu, skellam_epsilon_of([each], delta) + noise.table_epsilon


def _deviation(mechanism: Mechanism) -> float:
    """Standard deviation that is promised for every value of the decoded sum."""
    if mechanism.record:
        scale = mechanism.clip_norm / (mechanism.sampling_rate * _RECORDS)
        return mechanism.noise_multiplier * scale * math.sqrt(mechanism.steps)
    return mechanism.noise_multiplier * 2 * mechanism.clip_norm
