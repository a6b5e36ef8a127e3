"""Simulated failures: who stops answering at which step of the protocol, and in which attempt."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from fedsa_secure.config import TrainConfig
from fedsa_secure.errors import ConfigError, did_you_mean
from fedsa_secure.federation.server import select_clients
from fedsa_secure.streams import numpy_stream


class Step(IntEnum):
    """The steps of an attempt in order (docs/protocol.md §8)."""

    ADVERTISE_KEYS = 1
    SHARE_KEYS = 2
    MASKED_INPUT = 3
    CONSISTENCY = 4
    UNMASK = 5


_STEPS = {step.name.lower(): step for step in Step}


@dataclass(frozen=True)
class Dropouts:
    """A client that drops out answers neither this step nor the later ones of the attempt.

    It is back for the next attempt and the next round. Draws depend on (seed, round, attempt,
    client) only, attempts counted as they are made, so a resumed run has the same failures.

    Args:
        rate: probability that a client drops out in an attempt, at a step drawn evenly.
        schedule: step by round and client, for the first attempt of a round.
        seed: root of the draws.
    """

    rate: float
    schedule: Mapping[tuple[int, int], Step]
    seed: int

    @classmethod
    def of(cls, config: TrainConfig, clients: int) -> "Dropouts":
        """What the option ``dropouts`` asks for.

        Args:
            config: the options.
            clients: how many there are.

        Raises:
            ConfigError: if an entry cannot be understood, or cannot happen.
        """
        asked = config.dropouts
        if isinstance(asked, float):
            return cls(asked, {}, config.seed)
        schedule: dict[tuple[int, int], Step] = {}
        for text in asked:
            place, step = _entry(text, config, clients)
            if place in schedule:
                raise ConfigError(
                    "dropouts",
                    f"client {place[1]} fails twice in round {place[0]}",
                    "give the earlier of the two steps",
                )
            schedule[place] = step
        return cls(0.0, schedule, config.seed)

    @property
    def possible(self) -> bool:
        """Whether anybody can drop out at all."""
        return self.rate > 0 or bool(self.schedule)

    def step(self, round_number: int, attempt: int, client: int) -> Step | None:
        """Where a client drops out; None if it does not.

        Args:
            round_number: counted from 1.
            attempt: of this round, counted from 1.
            client: its number.
        """
        if attempt == 1 and (round_number, client) in self.schedule:
            return self.schedule[round_number, client]
        if not self.rate:
            return None
        stream = numpy_stream(self.seed, "dropouts", round_number, attempt, client)
        if stream.random() >= self.rate:
            return None
        return Step(int(stream.integers(1, len(Step) + 1)))


def _entry(text: str, config: TrainConfig, clients: int) -> tuple[tuple[int, int], Step]:
    parts = [part.strip() for part in text.split(":")]
    try:
        round_number, client, name = int(parts[0]), int(parts[1]), parts[2]
    except (ValueError, IndexError):
        round_number = 0
    if len(parts) != 3 or round_number < 1 or client < 0:
        raise ConfigError(
            "dropouts",
            f"{text!r} is no ROUND:CLIENT:STEP",
            "write such as 3:0:masked_input, or a rate such as 0.1",
        )
    if name not in _STEPS:
        raise ConfigError("dropouts", f"no step {name!r}", did_you_mean(name, _STEPS))
    if round_number > config.rounds or client >= clients:
        raise ConfigError(
            "dropouts",
            f"{text!r} in a run of {config.rounds} rounds and clients 0 to {clients - 1}",
        )
    invited = select_clients(clients, config.participation, config.seed, round_number)
    if client not in invited:
        raise ConfigError(
            "dropouts",
            f"{text!r}, and client {client} is not invited to round {round_number}",
            f"invited are {', '.join(map(str, invited[:20]))}{', …' * (len(invited) > 20)}",
        )
    return (round_number, client), _STEPS[name]
