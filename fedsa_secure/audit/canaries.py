"""Records that are made to be noticed, put into the private steps of a real training.

A canary is a record whose gradient is one coordinate of a shared tensor, longer than the clip norm:
no record can move the released sum further, and no two of them touch the same value. Everything
after its gradient is what happens to any record: sampling by secret coins, clip, sum, noise,
division, optimizer.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsa_secure.privacy import PartialBatch, PrivateStep, SecretPoissonSampler, TurnSecret

_BEYOND = 10.0
"""Norm of a canary's gradient, in clip norms."""
_PART = 512


@dataclass
class Canaries:
    """The canaries of a run's first client, and what an attacker has seen of each.

    Args:
        present: which are in the data; the others are null records. [canary]
        sampling_rate: probability to be in a step, as of all records.
    """

    present: Bool[NDArray[np.bool_], " canary"]
    sampling_rate: float
    scores: Float64[NDArray[np.float64], " canary"] = field(init=False)
    """Sum over the steps so far of what was released at each canary's coordinate, in clip norms."""

    def __post_init__(self) -> None:
        self.scores = np.zeros(len(self.present))

    def drawn(
        self, secret: TurnSecret, steps: int
    ) -> Iterator[Int64[NDArray[np.int64], " canary"]]:
        """The canaries of each step: those of the sampler's that are in the data.

        Args:
            secret: fresh for every round.
            steps: of the round.
        """
        sampler = SecretPoissonSampler(secret, len(self.present), self.sampling_rate, steps)
        for places in sampler:
            chosen = np.asarray(places, np.int64)
            yield chosen[self.present[chosen]]


@dataclass(frozen=True)
class _CanaryPart(PartialBatch):
    """Canaries instead of losses.

    Args:
        places: their numbers. [canary]
    """

    places: Int64[NDArray[np.int64], " canary"]


class CanaryStep(PrivateStep):
    """Private steps into which the first client's canaries are mixed.

    What the attacker reads is the noised gradient that the optimizer gets. All other records and
    their coins are known to it, as in the definition of differential privacy, so it takes their
    sum away.

    Args:
        canaries: scores are added to.
        tensors: the parameters whose values are the canaries' coordinates, one after another.
        drawn: canaries of each step.
        made: what ``PrivateStep`` takes.
    """

    def __init__(
        self,
        *made: Any,
        canaries: Canaries,
        tensors: Sequence[nn.Parameter],
        drawn: Iterator[Int64[NDArray[np.int64], " canary"]],
        expected_batches: Tensor,
        **named: Any,
    ) -> None:
        expected = expected_batches.clone()
        # Absent canaries are null records: n_k is public and counts them.
        expected[0] += canaries.sampling_rate * len(canaries.present)
        super().__init__(*made, expected_batches=expected, **named)
        self._canaries, self._drawn = canaries, drawn
        self._expected, self._tensors = float(expected[0]), list(tensors)
        self._known: Tensor | None = None
        self.optimizer.original_optimizer.register_step_pre_hook(self._read)

    def __call__(self, parts: Iterable[PartialBatch]) -> None:
        """One step, see ``PrivateStep``; the canaries come after the records."""
        self._known = None
        super().__call__(chain(parts, self._canary_parts(next(self._drawn))))

    def _canary_parts(self, drawn: NDArray[np.int64]) -> Iterator[_CanaryPart]:
        clients = len(self.optimizer.params[0])
        for first in range(0, max(1, len(drawn)), _PART):
            places = drawn[first : first + _PART]
            real = torch.zeros(clients, max(1, len(places)), dtype=torch.bool)
            real[0, : len(places)] = True
            yield _CanaryPart(torch.zeros(real.numel()), real, places)

    def _backward(self, part: PartialBatch) -> None:
        if not isinstance(part, _CanaryPart):
            super()._backward(part)
            return
        if self._known is None:  # all records are summed up, and no canary is yet
            self._known = self._values([p.summed_grad for p in self._tensors])  # type: ignore[attr-defined]
        rows = part.real.numel()
        for parameter in self.optimizer.params:
            parameter.grad_sample = torch.zeros(rows, *_factors_shape(parameter))
        length = _BEYOND * self.optimizer.max_grad_norm
        for row, place in enumerate(part.places):
            parameter, index = self._coordinate(int(place))
            _set_unit(parameter, row, index, length)

    def _coordinate(self, place: int) -> tuple[Any, int]:
        """The tensor that holds this value, and where in it."""
        for parameter in self._tensors:
            size = parameter[0].numel()
            if place < size:
                return parameter, place
            place -= size
        raise ValueError("there are more canaries than released values")

    def _values(self, stacks: Sequence[Tensor]) -> Float64[Tensor, " canary"]:
        """The first client's values at the canaries' coordinates."""
        flat = torch.cat([stack[0].detach().flatten() for stack in stacks])
        return flat[: len(self._canaries.present)].double()

    def _read(self, *_: Any) -> None:
        """Add what this step releases to the scores."""
        grads = [p.grad for p in self._tensors if p.grad is not None]
        seen = self._values(grads) * self._expected
        assert self._known is not None  # noqa: S101 - for mypy
        self._canaries.scores += ((seen - self._known) / self.optimizer.max_grad_norm).numpy()


def _factors_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of a record's gradient: factors side by side for a matrix, see ``sample_grad``."""
    shape = tuple(parameter.shape[1:])
    return (1, sum(shape)) if len(shape) == 2 else shape


def _set_unit(parameter: Any, row: int, index: int, length: float) -> None:
    """Make a record's gradient this long, at one value of one parameter."""
    shape = parameter.shape[1:]
    if len(shape) == 2:
        parameter.grad_sample[row, 0, index // shape[1]] = length
        parameter.grad_sample[row, 0, shape[0] + index % shape[1]] = 1.0
    else:
        parameter.grad_sample[row].view(-1)[index] = length
