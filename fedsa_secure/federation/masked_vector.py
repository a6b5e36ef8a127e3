"""What a client puts under its mask, and what the sum of it says. docs/protocol.md §10."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedsa_secure.csprng import Keystream
from fedsa_secure.federation.aggregation import Contribution
from fedsa_secure.secagg import FixedPoint, integer_cap, rounding_key
from fedsa_secure.secagg.masks import UInt32Array

LOSS_RANGE = 64.0
"""Training losses above this count as this, in nats."""
ACCURACY_RANGE = 2.0
"""Noised accuracies beyond this, on either side, count as this."""


@dataclass(frozen=True)
class Opened:
    """What the sum over some clients says.

    Args:
        mean: of the updates. [value]
        loss: mean of the losses; None if they were not sent.
        clipped: values of all clients that were beyond the range; 0 if that was not sent.
        accuracy: mean of the noised accuracies; None if they were not sent.
    """

    mean: Float[Tensor, " value"]
    loss: float | None
    clipped: int
    accuracy: float | None = None


@dataclass(frozen=True)
class MaskedVector:
    """Places and grids: the update, the loss, the number of clipped values, perhaps the weight.

    In a private run the update alone, or with a noised accuracy.

    Args:
        values: of an update.
        clients: most summands.
        seed: root of the rounding coins, which need no secrecy: they are independent of the data.
            A private run has secret ones.
        weight_cap: the largest weight; None if all count the same.
        private: whether nothing but the update is sent.
        metric: whether a private run has a place for a noised accuracy.
    """

    values: int
    clients: int
    seed: int
    weight_cap: int | None = None
    private: bool = False
    metric: bool = False

    def __post_init__(self) -> None:
        if self.weight_cap is not None and self.weight_cap > integer_cap(self.clients):
            raise ValueError(f"{self.clients} weights of {self.weight_cap} wrap in 32 bits")

    @property
    def size(self) -> int:
        """Values in the vector."""
        others = int(self.metric) if self.private else 2
        return self.values + others + (self.weight_cap is not None)

    def write(
        self, contribution: Contribution, round_number: int, bound: float, out: UInt32Array
    ) -> None:
        """Encode a contribution.

        Args:
            contribution: of one client.
            round_number: counted from 1; a retry of the round writes the same values.
            bound: range of the update.
            out: where to. [size]
        """
        key = contribution.rounding_key
        if key is None:
            key = rounding_key(self.seed, contribution.client, round_number)
        coins, n = Keystream(key), self.values
        fraction = contribution.weight / (self.weight_cap or 1)
        clipped = self._grid(bound).encode(contribution.update.numpy(), coins, out[:n], fraction)
        if self.private:
            if self.metric:
                accuracy = np.array([contribution.accuracy or 0.0]).clip(
                    -ACCURACY_RANGE, ACCURACY_RANGE
                )
                self._grid(ACCURACY_RANGE).encode(accuracy, coins, out[n : n + 1])
            return
        loss = np.array([min(contribution.loss or 0.0, LOSS_RANGE)])
        self._grid(LOSS_RANGE).encode(loss, coins, out[n : n + 1])
        out[n + 1] = min(clipped, integer_cap(self.clients))
        if self.weight_cap is not None:
            out[n + 2] = contribution.weight

    def open(self, total: UInt32Array, survivors: int, bound: float) -> Opened:
        """Decode a sum.

        Args:
            total: over the survivors. [size]
            survivors: how many.
            bound: range of the update.
        """
        n = self.values
        weights = float(survivors)
        if self.weight_cap is not None:
            weights = max(int(total[n + 2]), 1) / self.weight_cap  # a client may lie about its own
        mean = self._grid(bound).decode(total[:n], survivors) / weights
        if self.private:
            accuracy = None
            if self.metric:
                grid = self._grid(ACCURACY_RANGE)
                accuracy = float(grid.decode(total[n : n + 1], survivors)[0]) / survivors
            return Opened(torch.from_numpy(mean), None, 0, accuracy)
        loss = self._grid(LOSS_RANGE).decode(total[n : n + 1], survivors)[0] / survivors
        return Opened(torch.from_numpy(mean), float(loss), int(total[n + 1]))

    def _grid(self, bound: float) -> FixedPoint:
        return FixedPoint(self.clients, bound)
