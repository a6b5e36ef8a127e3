"""``sum``: all that the server learns of a round, in the clear or by secure aggregation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fedsa_secure.types import NamedTensors


@dataclass(frozen=True)
class Contribution:
    """What one client has to say in a round.

    Args:
        client: its number.
        update: how far its training moved the shared tensors. [value]
        loss: its mean training loss; None in a private run, in which it is not sent.
        weight: what its update counts; 1 for all, or its training rows up to the public cap.
        rounding_key: of the coins that round it to the grid, where they are secret.
        accuracy: of its twin on its own test part, with noise; None if it is not sent.
    """

    client: int
    update: Float[Tensor, " value"]
    loss: float | None
    weight: int = 1
    rounding_key: bytes | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What a round came to.

    Args:
        mean: of the updates, in float64; None if the round was lost. [value]
        loss: mean of the clients' losses; None if the round was lost, or losses are not sent.
        survivors: whose contributions are in.
        clipped: values that lay beyond the range of the fixed point.
        attempts: how often it was tried.
        aborts: why attempts ended, in order.
        exchanges: with the server, those of setup included, but not the opening of the session.
        overhead_bytes: all that clients sent in them besides their vectors.
        accuracy: mean of the noised accuracies that clients sent, or None.
    """

    mean: Float[Tensor, " value"] | None
    loss: float | None
    survivors: tuple[int, ...]
    clipped: int = 0
    attempts: int = 1
    aborts: tuple[str, ...] = ()
    exchanges: int = 1
    overhead_bytes: int = 0
    accuracy: float | None = None


Contribute = Callable[[Sequence[int]], Iterator[Contribution]]
"""Trains these clients and gives their contributions, one at a time and in the order asked for."""


@runtime_checkable
class Aggregation(Protocol):
    """How the clients' contributions become one mean."""

    def round(
        self,
        number: int,
        cohort: Sequence[int],
        next_cohort: Sequence[int] | None,
        shared: NamedTensors,
        contribute: Contribute,
    ) -> Outcome:
        """Aggregate one round.

        Args:
            number: counted from 1.
            cohort: who is invited, in order.
            next_cohort: who will be invited to the next round; None if this is the last.
            shared: the public shared tensors at its start.
            contribute: lets clients train.
        """

    def uplink_bytes(self, values: int) -> int:
        """Bytes of the vector that each client sends, for this many shared values."""


class ClearAggregation:
    """The server sees every contribution.

    Sums are kept in float64, in the order of the clients, so that the result does not depend on how
    these were spread over passes.
    """

    def round(
        self,
        number: int,
        cohort: Sequence[int],
        next_cohort: Sequence[int] | None,
        shared: NamedTensors,
        contribute: Contribute,
    ) -> Outcome:
        """Aggregate one round (see ``Aggregation``)."""
        size = sum(tensor.numel() for tensor in shared.values())
        total, weights = torch.zeros(size, dtype=torch.float64), 0
        losses: list[float] = []
        accuracies: list[float] = []
        for each in contribute(cohort):
            total += each.update.double() * each.weight
            weights += each.weight
            losses += [] if each.loss is None else [each.loss]
            accuracies += [] if each.accuracy is None else [each.accuracy]
        return Outcome(total / weights, _mean(losses), tuple(cohort), accuracy=_mean(accuracies))

    def uplink_bytes(self, values: int) -> int:
        """Four bytes per value."""
        return 4 * values


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
