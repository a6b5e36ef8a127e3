"""The public constants of a private run, and what they cost. docs/privacy.md.

Noise multiplier, clip norm, sampling rate and number of steps are fixed before the first step and
part of the configuration that every client signs. Participation may only reduce the steps.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

from fedsa_secure.config import TrainConfig
from fedsa_secure.errors import PrivacyError
from fedsa_secure.federation.secure_aggregation import round_thresholds
from fedsa_secure.privacy import (
    LARGEST_GAUSSIAN,
    DiscreteNoise,
    Event,
    certified_epsilon,
    noise_multiplier_for,
    noise_multiplier_for_rounds,
    representable_rate,
    skellam_epsilon_of,
)
from fedsa_secure.privacy.discrete import TAIL_SHARE
from fedsa_secure.privacy.skellam import TAIL
from fedsa_secure.secagg import FixedPoint
from fedsa_secure.types import Role

_GROUPS = (
    frozenset({Role.A, Role.PRIVATE_A}),
    frozenset({Role.B, Role.PRIVATE_B}),
    frozenset({Role.HEAD}),
)
"""Roles by place in ``dp_clip_weights``."""


@dataclass(frozen=True)
class Mechanism:
    """What noise a run adds.

    Args:
        record: whether records are protected, and not whole clients.
        clip_norm: C: of a record's gradient over all groups, or of a client's update.
        weights: parts of A, B and head in the clip norm; None for one norm over all.
        noise_multiplier: σ: standard deviation of the noise over the sensitivity, which is C for a
            record and 2C for a client.
        sampling_rate: probability of a record to be in a step; 1 for clients.
        steps: noised releases in a round.
        delta: probability that ε does not cover.
        discrete: noise that is spread over the clients, or None.
        metric_noise: standard deviation of the noise on a count of test rows; None if none is sent.
            One test row moves a count by one.
    """

    record: bool
    clip_norm: float
    weights: tuple[float, ...] | None
    noise_multiplier: float
    sampling_rate: float
    steps: int
    delta: float
    discrete: DiscreteNoise | None = None
    metric_noise: float | None = None

    @classmethod
    def of(cls, config: TrainConfig, values: int) -> "Mechanism":
        """The mechanism that a resolved configuration asks for.

        Args:
            config: with ``dp_noise_multiplier`` resolved.
            values: of an update.
        """
        if config.dp_noise_multiplier is None:
            raise ValueError("the noise multiplier has to be resolved before a mechanism is made")
        record, discrete = config.dp_unit == "record", None
        if config.dp_noise == "distributed":
            discrete = DiscreteNoise.of(
                config.dp_clip_norm, config.dp_noise_multiplier, _honest(config), values
            )
            _require_grid(discrete, round_thresholds(config).clients)
        weights = None if config.dp_clip_weights == "joint" else config.dp_clip_weights
        return cls(
            record=record,
            clip_norm=config.dp_clip_norm,
            weights=weights,
            noise_multiplier=config.dp_noise_multiplier,
            sampling_rate=representable_rate(config.dp_sampling_rate or 1.0) if record else 1.0,
            steps=config.local_steps if record else 1,
            delta=config.dp_delta,
            discrete=discrete,
            metric_noise=_metric_noise(config),
        )

    def metric_epsilon(self, counts: int) -> float:
        """Certified ε of a test row after this many noised counts."""
        if self.metric_noise is None or counts == 0:
            return 0.0
        event = Event(steps=counts, sampling_rate=1.0, noise_multiplier=self.metric_noise)
        return certified_epsilon([event], self.delta)

    def epsilon(self, rounds: int) -> float:
        """Certified ε of what a client has released in this many rounds."""
        if rounds == 0:
            return 0.0
        if self.discrete is not None:
            noise = self.discrete
            each = (noise.total_variance, noise.sensitivity_l1, noise.sensitivity_l2)
            return rounds * noise.table_epsilon + skellam_epsilon_of([each] * rounds, self.delta)
        event = Event(
            steps=rounds * self.steps,
            sampling_rate=self.sampling_rate,
            noise_multiplier=self.noise_multiplier,
        )
        return certified_epsilon([event], self.delta)

    def thresholds(self, trained: Collection[Role]) -> list[tuple[frozenset[Role], float]]:
        """Roles that are clipped together, and by what norm.

        The squares of the thresholds add up to C², so a record moves the sum of all groups by at
        most C, as under one norm.
        """
        if self.weights is None:
            return [(frozenset(trained), self.clip_norm)]
        groups = [
            (roles & frozenset(trained), weight)
            for roles, weight in zip(_GROUPS, self.weights, strict=True)
            if roles & frozenset(trained)
        ]
        length = math.sqrt(sum(weight**2 for _, weight in groups))
        return [(roles, self.clip_norm * weight / length) for roles, weight in groups]

    def largest_update(self) -> float:
        """Largest magnitude of a value that a client sends, where a client's update is noised."""
        if self.discrete is not None:
            return self.discrete.largest * self.discrete.step
        return self.clip_norm * (1 + 2 * self.noise_multiplier * LARGEST_GAUSSIAN)

    def largest_gradient(self, fewest_records: int) -> float:
        """Largest magnitude of a value of a noised gradient, where a record's is.

        Args:
            fewest_records: n_k of the client with the fewest records; public.
        """
        expected = self.sampling_rate * fewest_records
        noise = self.noise_multiplier * LARGEST_GAUSSIAN / expected
        return self.clip_norm * (1 / self.sampling_rate + noise)


def calibrated(config: TrainConfig, values: int) -> float:
    """The noise multiplier that a run needs, or that was asked for if it is enough.

    Raises:
        PrivacyError: if the one that was asked for spends more than ``dp_epsilon``.
    """
    if config.dp_epsilon is None:
        raise ValueError("there is nothing to calibrate without dp_epsilon")
    if config.dp_noise == "distributed":
        _require_tails(config, values)
    if config.dp_noise_multiplier is not None:
        epsilon = Mechanism.of(config, values).epsilon(config.rounds)
        if epsilon > config.dp_epsilon:
            raise PrivacyError(
                "dp_noise_multiplier",
                f"{config.dp_noise_multiplier:g} spends epsilon {epsilon:.4g}, more than "
                f"dp_epsilon={config.dp_epsilon:g}",
                "leave it out, and it is calibrated",
            )
        return config.dp_noise_multiplier
    if config.dp_noise == "distributed":
        return noise_multiplier_for_rounds(
            config.dp_epsilon,
            config.dp_delta,
            config.dp_clip_norm,
            _honest(config),
            values,
            config.rounds,
        )
    record = config.dp_unit == "record"
    rate = representable_rate(config.dp_sampling_rate or 1.0) if record else 1.0
    steps = config.rounds * (config.local_steps if record else 1)
    return noise_multiplier_for(config.dp_epsilon, config.dp_delta, rate, steps)


def _metric_noise(config: TrainConfig) -> float | None:
    """A row is for training or for testing, never both, so each side may spend all of ε."""
    if config.dp_metrics is None or config.dp_epsilon is None:
        return None
    counts = sum(is_evaluated(config, number) for number in range(1, config.rounds + 1))
    return noise_multiplier_for(config.dp_epsilon, config.dp_delta, 1.0, counts)


def is_evaluated(config: TrainConfig, round_number: int) -> bool:
    """Whether models are measured at the end of this round."""
    return round_number == config.rounds or round_number % config.evaluate_every == 0


def _require_grid(noise: DiscreteNoise, clients: int) -> None:
    """Refuse noise that the ring cannot hold: no sum may wrap and nothing may be clipped.

    Raises:
        PrivacyError: naming the option.
    """
    if FixedPoint(clients, noise.largest * noise.step).step > noise.step:
        raise PrivacyError(
            "dp_noise",
            f"sums of {clients} clients leave no room for 'distributed' noise in 32 bits",
            "use dp_noise='local', or fewer clients in a round",
        )


def _require_tails(config: TrainConfig, values: int) -> None:
    """Refuse a δ that is not far above what the tables of the noise leave out.

    Raises:
        PrivacyError: naming the option.
    """
    epsilon = config.dp_epsilon or 0.0
    left_out = (1 + math.exp(epsilon)) * values * _honest(config) * config.rounds * TAIL
    if left_out > TAIL_SHARE * config.dp_delta:
        raise PrivacyError(
            "dp_delta",
            f"the tables of 'distributed' noise leave {left_out:.1g} out, and {config.dp_delta:g} "
            "is not far enough above",
            f"give at least {left_out / TAIL_SHARE:.1g}, a smaller dp_epsilon, or dp_noise='local'",
        )


def _honest(config: TrainConfig) -> int:
    """Clients of a sum that are not colluding, at least: m − c."""
    thresholds = round_thresholds(config)
    return thresholds.survivors - thresholds.colluders
