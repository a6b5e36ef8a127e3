"""The smallest model that has all parts of the real one, trained by the real private step.

A LoRA layer on a frozen one, a linear head, squared error. The client axis carries trials: every
"client" of the stack has the same records and secrets of its own, so one pass of C clients is C
independent runs of a whole private training.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fedsa_secure.adapters import AdapterSettings, BatchContext, GroupedLinear, LoRALinear
from fedsa_secure.federation.optimizers import OptimizerSettings, OptimizerState, StackedOptimizer
from fedsa_secure.privacy import (
    ClipGroup,
    PartialBatch,
    PrivateStep,
    SecretPoissonSampler,
    TurnSecret,
)
from fedsa_secure.types import NamedTensors

_untyped: Any = getattr  # Opacus hangs attributes on parameters


@dataclass(frozen=True)
class Records:
    """One client's records. All zeros is the null record: its gradient is zero.

    Args:
        inputs: [record, token, d_in]
        targets: [record, token]
        lengths: tokens that count; the others are zeros. [record]
    """

    inputs: Float[Tensor, "record token d_in"]
    targets: Float[Tensor, "record token"]
    lengths: Float[Tensor, " record"]

    def without(self, place: int) -> "Records":
        """The neighbour in which the record at this place is the null record."""
        keep = torch.ones_like(self.lengths)
        keep[place] = 0.0
        lengths = torch.where(keep > 0, self.lengths, 1.0)
        return Records(self.inputs * keep.view(-1, 1, 1), self.targets * keep.view(-1, 1), lengths)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The public constants of a training.

    Args:
        A: start of A. [r, d_in]
        B: start of B. [d_out, r]
        head: start of the head. [1, d_out]
        frozen_b: whether B stays at its start.
        steps: how many.
        noise_multiplier: σ.
        clip_norm: C of a record, or of a client's update.
        sampling_rate: q.
        rate: learning rate of everything; where clients are protected, of a client's own steps.
        optimizer: ``sgd`` or ``adamw``.
        part: records of a client in one backward pass; None for all.
    """

    A: Float[Tensor, "r d_in"]
    B: Float[Tensor, "d_out r"]
    head: Float[Tensor, "1 d_out"]
    frozen_b: bool = False
    steps: int = 10
    noise_multiplier: float = 1.0
    clip_norm: float = 1.0
    sampling_rate: float = 1.0
    rate: float = 0.1
    optimizer: str = "sgd"
    part: int | None = None

    def start(self, trials: int) -> "TinyModel":
        """A model of this many clients, all at the public start."""
        model = TinyModel(self)
        with torch.no_grad():
            for name, parameter in model.tensors().items():
                start = getattr(self, name)
                parameter.data = start.to(parameter).expand(trials, *start.shape).clone()
        model.context.clients = trials
        return model

    def stacked_optimizer(self, parameters: dict[str, nn.Parameter]) -> StackedOptimizer:
        """The optimizer of training, with this setting's learning rate."""
        settings = OptimizerSettings(kind=self.optimizer)
        trials = len(next(iter(parameters.values())))
        moments = {
            f"{name}#{moment}": torch.zeros_like(parameter)
            for name, parameter in parameters.items()
            for moment in settings.moments
        }
        optimizer = StackedOptimizer(
            parameters, OptimizerState(moments, torch.zeros(trials)), settings
        )
        optimizer.rates = dict.fromkeys(parameters, self.rate)
        return optimizer


class TinyModel(nn.Module):
    """``head · (B·A) · x`` of every client of a stack, in float64.

    Args:
        setting: gives the sizes.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        d_out, rank = setting.B.shape
        self.context = BatchContext()
        frozen = nn.Linear(setting.A.shape[1], d_out, bias=False, dtype=torch.float64)
        nn.init.zeros_(frozen.weight)
        settings = AdapterSettings(rank=rank, alpha=float(rank))  # a scaling of 1
        self.adapter = LoRALinear(frozen, settings, "tiny", self.context)
        self.adapter.B.requires_grad_(not setting.frozen_b)
        self.head = GroupedLinear(
            nn.Linear(d_out, 1, bias=False, dtype=torch.float64), self.context
        )

    def tensors(self) -> dict[str, nn.Parameter]:
        """A, B and head by name. Each [client, …]"""
        return {"A": self.adapter.A, "B": self.adapter.B, "head": self.head.weight}

    def trained(self) -> dict[str, nn.Parameter]:
        """Those of them that are trained."""
        return {name: p for name, p in self.tensors().items() if p.requires_grad}

    def forward(self, inputs: Float[Tensor, "rows token d_in"]) -> Float[Tensor, "rows token"]:
        """Predictions; the rows are client-major."""
        self.context.rows = len(inputs)
        predicted: Tensor = self.head(self.adapter(inputs))
        return predicted.squeeze(2)

    def losses(self, records: Records) -> Float[Tensor, " rows"]:
        """Half the squared error of every record for every client, mean over its own tokens."""
        clients = self.context.clients
        predicted = self(records.inputs.repeat(clients, 1, 1))
        squares: Tensor = (predicted - records.targets.repeat(clients, 1)).square()
        return 0.5 * squares.sum(1) / records.lengths.repeat(clients)


class Training(ABC):
    """A training of stacked clients that can be stopped before every step, or round."""

    @property
    @abstractmethod
    def shared(self) -> Tensor:
        """What is released, as it is now. [client, r, d_in]"""

    @property
    @abstractmethod
    def scale(self) -> float:
        """What ``shared`` moves by, times this, is the noised sum, if the optimizer is SGD."""

    @property
    @abstractmethod
    def noised(self) -> NamedTensors:
        """Everything that is noised, as it is now. Each [client, …]"""

    @property
    @abstractmethod
    def clipped(self) -> Float[Tensor, "client value"]:
        """Of the last step: the clipped sums or updates, before noise."""

    @abstractmethod
    def step(self) -> None:
        """Take a step."""


class RecordTraining(Training):
    """Training with protected records, for C trials at once: twin, or with a frozen B.

    Args:
        setting: the public constants.
        records: of every client.
        secrets: of every client; they are the trials.
    """

    def __init__(self, setting: Setting, records: Records, secrets: Sequence[TurnSecret]) -> None:
        self.setting, self.records = setting, records
        self.model = setting.start(len(secrets))
        parameters = self.noised_parameters()
        expected = setting.sampling_rate * len(records.inputs)
        self.private_step = PrivateStep(
            self.model,
            [ClipGroup(tuple(parameters.values()), setting.clip_norm)],
            setting.stacked_optimizer(parameters),
            noise_multiplier=setting.noise_multiplier,
            expected_batches=torch.full((len(secrets),), expected, dtype=torch.float64),
            secrets=secrets,
        )
        self.private_step.optimizer.attach_step_hook(self._remember)
        self._draws = [
            iter(SecretPoissonSampler(s, len(records.inputs), setting.sampling_rate, setting.steps))
            for s in secrets
        ]

    @property
    def shared(self) -> Tensor:
        """The values of A. [client, r, d_in]"""
        return self.model.adapter.A.data

    @property
    def scale(self) -> float:
        """The expected batch over the learning rate; SGD goes downhill."""
        return -self.setting.sampling_rate * len(self.records.inputs) / self.setting.rate

    @property
    def noised(self) -> NamedTensors:
        """Everything that is trained."""
        return {name: p.data for name, p in self.noised_parameters().items()}

    def noised_parameters(self) -> dict[str, nn.Parameter]:
        """What the private step trains."""
        return self.model.trained()

    @property
    def clipped(self) -> Float[Tensor, "client value"]:
        """The clipped sums of the last step, before noise."""
        return self._sums

    def step(self) -> None:
        """Take a private step."""
        with self.private_step.open():
            self.private_step(self.parts(self._drawn()))

    def parts(self, drawn: Bool[Tensor, "client record"]) -> Iterable[PartialBatch]:
        """The records in parts; a record that was not drawn is a fill row."""
        size = self.setting.part or len(self.records.inputs)
        for first in range(0, len(self.records.inputs), size):
            part = slice(first, first + size)
            records = Records(
                self.records.inputs[part], self.records.targets[part], self.records.lengths[part]
            )
            yield PartialBatch(self.model.losses(records), drawn[:, part])

    def _drawn(self) -> Bool[Tensor, "client record"]:
        drawn = np.zeros((len(self._draws), len(self.records.inputs)), dtype=np.bool_)
        for own, draws in zip(drawn, self._draws, strict=True):
            own[next(draws)] = True
        return torch.from_numpy(drawn)

    def _remember(self, optimizer: Any) -> None:
        sums = [_untyped(p, "summed_grad").detach().flatten(1) for p in optimizer.params]
        self._sums = torch.cat(sums, dim=1)
