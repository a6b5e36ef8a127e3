"""The worst case, attacked: can state that no noise touched carry one record into A?

The trap (docs/privacy.md): if B is trained on the same records without noise, one canary moves B,
and B moves the gradient of A of every other record. The data here make that as bad as it gets:
ordinary records whose inputs A does not see at its public start, and whose gradients of A are zero
as long as B (or the head) is. The canary is the one record that A sees, and it alone moves B. If
its share of B were not noised, the ordinary records would shout it out in the next step.

Neighbours by zero-out: in the other world the canary is the null record. What is released is the
sequence of A; the attack takes one number from it. A second data set shows that the attack has
power: a canary whose clipped gradient always has norm C and points one way, which proves nearly the
claimed ε.

Everything runs through the private step, the sampler and the noise of training. Every trial has
secrets of its own, from the operating system.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from fedsa_secure.audit.bounds import Finding, audit_two_worlds
from fedsa_secure.audit.tiny_clients import ClientTraining
from fedsa_secure.audit.tiny_training import Records, RecordTraining, Setting, Training
from fedsa_secure.privacy import (
    DiscreteNoise,
    Event,
    TurnSecret,
    certified_epsilon,
    gaussian_epsilon,
    noise_multiplier_for,
    noise_multiplier_for_rounds,
    skellam_epsilon_of,
)

_ORDINARY = 20
_STACK = 8000
"""Trials of one pass: bounds the memory."""
_POINTWISE = 6
"""Times as many trials where only (ε, δ) is claimed: refuting that takes rarer events."""
_CLIENT_CLIP = 1e-3
_SAMPLING_RATE = 0.5

Start = Callable[[Setting, Records, Sequence[TurnSecret]], Training]
Attack = Callable[[Float[Tensor, "trial step d"]], Float[Tensor, " trial"]]


@dataclass(frozen=True)
class TwoWorlds:
    """Two neighbouring data sets and the attack that tells them apart.

    Args:
        name: of the finding.
        setting: public constants; the noise multiplier is set by the claim.
        without: records of the first world.
        present: records of the second.
        attack: a number for every trial, from the noised sums of A's first row.
        seen: steps that the attack looks at; the others are not taken.
        start: makes the training.
    """

    name: str
    setting: Setting
    without: Records
    present: Records
    attack: Attack
    seen: int
    start: Start = RecordTraining


def hidden_record(*, frozen_b: bool = False, steps: int = 10) -> TwoWorlds:
    """The worst case: only the canary moves B (the head, if B is frozen), the others betray it."""
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    setting = Setting(
        A=_rows([1.0, 0, 0, 0]),
        B=one if frozen_b else zero,
        head=zero if frozen_b else one,
        frozen_b=frozen_b,
        steps=steps,
    )
    records = _records([([0, 10.0, 0, 0], 10.0)] * _ORDINARY + [([1.0, 0, 0, 0], 10.0)])
    name = f"{'frozen-b' if frozen_b else 'twin'}: record hidden in {'head' if frozen_b else 'B'}"
    return TwoWorlds(
        name, setting, records.without(_ORDINARY), records, lambda sums: sums[:, 1, 1], seen=2
    )


def clipped_record(*, frozen_b: bool = False, steps: int = 10) -> TwoWorlds:
    """A canary whose clipped gradient has norm C in every step, along A's third input."""
    one = torch.ones(1, 1, dtype=torch.float64)
    setting = Setting(
        A=_rows([1.0, 0, 0, 0]), B=one, head=one, frozen_b=frozen_b, steps=steps, rate=1e-4
    )
    records = _records([([0, 0, 10.0, 0], 1e4), ([0, 0, 0, 0], 0.0)])
    name = f"{'frozen-b' if frozen_b else 'twin'}: record at the clip norm"
    return TwoWorlds(
        name, setting, records.without(0), records, lambda sums: sums[:, :, 2].sum(1), seen=steps
    )


def changed_record_of_client(*, steps: int = 10) -> TwoWorlds:
    """One record turns a client's whole update round: B is free and takes the record's sign."""
    setting = Setting(
        A=_rows([1.0, -0.02, 0, 0]),
        B=torch.zeros(1, 1, dtype=torch.float64),
        head=torch.ones(1, 1, dtype=torch.float64),
        steps=steps,
        clip_norm=_CLIENT_CLIP,
        rate=0.01,
    )
    records = _records([([0, 1.0, 0, 0], 3.0)] * _ORDINARY + [([1.0, 0, 0, 0], 4.0)])
    return TwoWorlds(
        "client: one record changed",
        setting,
        records.without(_ORDINARY),
        records,
        lambda sums: sums[:, :, 1].sum(1),
        seen=steps,
        start=ClientTraining,
    )


def replaced_client(*, steps: int = 10) -> TwoWorlds:
    """A client replaced by its opposite: the clipped updates are 2C apart in every round."""
    one = torch.ones(1, 1, dtype=torch.float64)
    setting = Setting(
        A=_rows([1.0, 0, 0, 0]), B=one, head=one, steps=steps, clip_norm=_CLIENT_CLIP, rate=1e-3
    )
    return TwoWorlds(
        "client: replaced",
        setting,
        _records([([0, 0, 1.0, 0], -10.0)]),
        _records([([0, 0, 1.0, 0], 10.0)]),
        lambda sums: sums[:, :, 2].sum(1),
        seen=steps,
        start=ClientTraining,
    )


def statistics(
    worlds: TwoWorlds, trials: int, seed: int | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The attack's number in every trial of both worlds.

    Args:
        worlds: what to train and how to attack it.
        trials: independent trainings of each world.
        seed: for tests; None for secrets of the operating system.

    Returns:
        Without and with the canary. [trial], [trial]
    """
    found = []
    for number, records in enumerate((worlds.without, worlds.present)):
        stacks = [range(k, min(k + _STACK, trials)) for k in range(0, trials, _STACK)]
        values = [_attacked(worlds, records, _secrets(seed, number, stack)) for stack in stacks]
        found.append(torch.cat(values).numpy())
    return found[0], found[1]


def audit_gaussian(
    worlds: TwoWorlds, epsilon: float, delta: float, trials: int, seed: int | None = None
) -> Finding:
    """Calibrate without sampling, train in both worlds, attack.

    Args:
        worlds: with a sampling rate of 1.
        epsilon: the noise is calibrated to it.
        delta: of the claim.
        trials: of each world.
        seed: for tests.

    Returns:
        The claim is what the noise is exactly worth: μ = √T/σ and its ε, at most ``epsilon``.
    """
    sigma = noise_multiplier_for(epsilon, delta, 1.0, worlds.setting.steps)
    mu = worlds.setting.steps**0.5 / sigma
    numbers = statistics(_with_noise(worlds, sigma), trials, seed)
    return audit_two_worlds(
        *numbers, gaussian_epsilon(mu, delta), delta, name=worlds.name, mu_claimed=mu
    )


def audit_sampled(
    worlds: TwoWorlds, epsilon: float, delta: float, trials: int, seed: int | None = None
) -> Finding:
    """The same for Poisson sampling, where the claim is one of (ε, δ) only.

    Args:
        worlds: with any sampling rate.
        epsilon: the noise is calibrated to it.
        delta: of the claim.
        trials: of each world.
        seed: for tests.
    """
    setting = worlds.setting
    sigma = noise_multiplier_for(epsilon, delta, setting.sampling_rate, setting.steps)
    event = Event(steps=setting.steps, sampling_rate=setting.sampling_rate, noise_multiplier=sigma)
    numbers = statistics(_with_noise(worlds, sigma), trials, seed)
    return audit_two_worlds(*numbers, certified_epsilon([event], delta), delta, name=worlds.name)


def audit_distributed(
    worlds: TwoWorlds, epsilon: float, delta: float, trials: int, seed: int | None = None
) -> Finding:
    """The same for integer noise, with the accounting of its sum.

    Args:
        worlds: of clients.
        epsilon: the noise is calibrated to it.
        delta: of the claim.
        trials: of each world.
        seed: for tests.
    """
    setting, values = worlds.setting, worlds.setting.A.numel()
    sigma = noise_multiplier_for_rounds(epsilon, delta, setting.clip_norm, 1, values, setting.steps)
    noise = DiscreteNoise.of(setting.clip_norm, sigma, 1, values)
    each = (noise.total_variance, noise.sensitivity_l1, noise.sensitivity_l2)
    claimed = skellam_epsilon_of([each] * setting.steps, delta)
    claimed += setting.steps * noise.table_epsilon
    discrete = replace(
        worlds,
        name=f"{worlds.name}, distributed noise",
        seen=min(worlds.seen, 2),
        start=partial(ClientTraining, discrete=noise),
    )
    return audit_two_worlds(*statistics(discrete, trials, seed), claimed, delta, name=discrete.name)


def audit_hidden_state(
    epsilons: Sequence[float] = (1.0, 8.0),
    trials: int = 4000,
    seed: int | None = None,
    delta: float = 1e-5,
) -> list[Finding]:
    """Attack every mode of protection on its worst-case data.

    Args:
        epsilons: claims; the noise of every mode is calibrated to each.
        trials: of each world; six times as many where only (ε, δ) is claimed.
        seed: for tests; the noise is then not secret. None for the operating system's.
        delta: of the claims.

    Returns:
        For every claim: twin and frozen B (hidden record, record at the clip norm), the twin with
        Poisson sampling, and clients (one record changed, client replaced, client replaced with
        distributed noise). Each is wrong with a probability of at most 5 % (``false_alarm``).
    """
    findings = []
    for epsilon in epsilons:
        for worlds in (
            hidden_record(),
            clipped_record(),
            hidden_record(frozen_b=True),
            clipped_record(frozen_b=True),
            changed_record_of_client(),
            replaced_client(),
        ):
            findings.append(audit_gaussian(worlds, epsilon, delta, trials, seed))
        many = _POINTWISE * trials
        findings.append(audit_sampled(sampled(hidden_record()), epsilon, delta, many, seed))
        findings.append(audit_distributed(replaced_client(), epsilon, delta, many, seed))
    return findings


def sampled(worlds: TwoWorlds, rate: float = _SAMPLING_RATE) -> TwoWorlds:
    """The same worlds with Poisson sampling.

    Args:
        worlds: of records.
        rate: q.
    """
    setting = replace(worlds.setting, sampling_rate=rate)
    return replace(worlds, name=f"{worlds.name}, sampled", setting=setting)


def noised_sums(training: Training, steps: int) -> Float[Tensor, "trial step d"]:
    """What the released values of A's first row tell: the noised sum of every step.

    Args:
        training: with SGD.
        steps: to take.
    """
    sums = []
    for _ in range(steps):
        before = training.shared.clone()
        training.step()
        sums.append((training.shared - before)[:, 0] * training.scale)
    return torch.stack(sums, dim=1)


def _attacked(
    worlds: TwoWorlds, records: Records, secrets: Sequence[TurnSecret]
) -> Float[Tensor, " trial"]:
    training = worlds.start(worlds.setting, records, secrets)
    return worlds.attack(noised_sums(training, worlds.seen))


def _secrets(seed: int | None, world: int, trials: range) -> list[TurnSecret]:
    if seed is None:
        return [TurnSecret.fresh() for _ in trials]
    return [TurnSecret.for_tests(seed, trial, world) for trial in trials]


def _with_noise(worlds: TwoWorlds, sigma: float) -> TwoWorlds:
    return replace(worlds, setting=replace(worlds.setting, noise_multiplier=sigma))


def _rows(*rows: Sequence[float | int]) -> Float[Tensor, "r d"]:
    return torch.tensor(rows, dtype=torch.float64)


def _records(pairs: Sequence[tuple[Sequence[float | int], float]]) -> Records:
    """Records of one token each."""
    inputs = _rows(*(x for x, _ in pairs)).unsqueeze(1)
    targets = torch.tensor([[y] for _, y in pairs], dtype=torch.float64)
    return Records(inputs, targets, torch.ones(len(pairs), dtype=torch.float64))
