"""Constructions and bugs that look private and are not. The auditor has to catch each of them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fedsa_secure.audit import Records, RecordTraining, Setting
from fedsa_secure.federation.optimizers import OptimizerSettings, OptimizerState, StackedOptimizer
from fedsa_secure.privacy import (
    ClipGroup,
    PartialBatch,
    PrivateStep,
    SecretPoissonSampler,
    TurnSecret,
)


class Naive(RecordTraining):
    """DP-SGD on A alone. B is trained on the same records, without noise, and feeds the next A."""

    kind = "sgd"
    head_trained = False

    def __init__(self, setting: Setting, records: Records, secrets: Sequence[TurnSecret]) -> None:
        super().__init__(setting, records, secrets)
        self._B = {"B": self.model.adapter.B}
        state = OptimizerState(
            {f"B#{m}": torch.zeros_like(self._B["B"]) for m in "mv"}, torch.zeros(len(secrets))
        )
        self._free = StackedOptimizer(self._B, state, OptimizerSettings(kind=self.kind))
        self._free.rates = {"B": setting.rate}

    def noised_parameters(self) -> dict[str, nn.Parameter]:
        self.model.adapter.B.requires_grad_(False)  # what the private step is told
        self.model.head.weight.requires_grad_(False)
        return {"A": self.model.adapter.A}

    def parts(self, drawn: torch.Tensor) -> Iterable[PartialBatch]:
        self._seen = drawn
        return super().parts(drawn)

    def step(self) -> None:
        values = {name: p.detach().clone() for name, p in self.model.tensors().items()}
        super().step()
        self._B["B"].grad = self._gradient_of_b(values)
        self._free.step()

    def _gradient_of_b(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.enable_grad():
            B = values["B"].requires_grad_()
            delta = values["head"] @ B @ values["A"]  # [client, 1, d]
            predicted = torch.einsum("ntd,ckd->cnt", self.records.inputs, delta)
            losses = 0.5 * (predicted - self.records.targets).square().sum(2)
            losses = (losses / self.records.lengths)[self._seen]
            return torch.autograd.grad(losses.sum(), B)[0]


class NaiveAdam(Naive):
    kind = "adamw"


class NoiseDividedByTheBatch(RecordTraining):
    """The noise is scaled as if the sum had been averaged already."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.private_step.optimizer.noise_multiplier /= len(self.records.inputs)


class SumsThatStay(RecordTraining):
    """The clipped sums of a step are carried into the next one."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        optimizer = self.private_step.optimizer
        clear = optimizer.zero_grad

        def keep(set_to_none: bool = True) -> None:
            sums = [p.summed_grad for p in optimizer.params]
            clear(set_to_none)
            for parameter, total in zip(optimizer.params, sums, strict=True):
                parameter.summed_grad = None if total is None else total.detach().clone()

        optimizer.zero_grad = keep

    def step(self) -> None:
        # One context for all steps, as in a turn of training.
        if not hasattr(self, "_context"):
            self._context = self.private_step.open()
            self._context.__enter__()
        self.private_step(self.parts(self._drawn()))


class UnclippedHead(RecordTraining):
    """The head is noised like the rest but left out of the clipping."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        parameters = self.noised_parameters()
        head = parameters.pop("head")
        norm = self.setting.clip_norm
        groups = [ClipGroup(tuple(parameters.values()), norm), ClipGroup((head,), 1e9)]
        step = PrivateStep(
            self.model,
            groups,
            self.setting.stacked_optimizer({**parameters, "head": head}),
            noise_multiplier=self.setting.noise_multiplier,
            expected_batches=self.private_step.optimizer._expected,
            secrets=self.private_step._secrets,
        )
        step.optimizer.max_grad_norm = norm
        step.optimizer.attach_step_hook(self._remember)
        self.private_step = step


class MeanOverTokens(RecordTraining):
    """The loss is the mean over all tokens of the batch, as a language model's usually is."""

    def parts(self, drawn: torch.Tensor) -> Iterable[PartialBatch]:
        tokens = (drawn * self.records.lengths).sum(1, keepdim=True)
        own = self.records.lengths / tokens
        for part in super().parts(drawn):
            yield PartialBatch(part.losses * own.flatten(), part.real)


class CoinsOfTheSeed(RecordTraining):
    """The noise is secret, but the coins follow from a seed that the server knows."""

    public: Sequence[int] = ()
    """Number of the turn that each trial's coins come from."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._draws = [coins_of(turn, self.setting, self.records) for turn in self.public]


def coins_of(turn: int, setting: Setting, records: Records) -> Iterator[list[int]]:
    """The records of each step, for whoever knows the seed (it is 0)."""
    secret = TurnSecret.for_tests(0, 0, turn)
    count = len(records.inputs)
    return iter(SecretPoissonSampler(secret, count, setting.sampling_rate, setting.steps))
