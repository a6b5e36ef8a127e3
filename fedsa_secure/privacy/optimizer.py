"""Clip, sum, noise, divide: Opacus' ``DPOptimizer`` with a client axis.

Opacus keeps per-record gradients of one model. Here the parameters hold C clients [C, …], the
records are client-major in equal segments [C·n, …], and every client has its own sum, its own
noise and its own expected batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import Tensor, nn
from torch.optim import Optimizer

from fedsa_kernels import clipped_sum, squared_norms

_SMALLEST = 1e-30
_untyped: Callable[[Any], Any] = iter  # Opacus hangs attributes on parameters


@dataclass(frozen=True)
class ClipGroup:
    """Parameters whose gradients of one record are clipped by one norm.

    Args:
        parameters: stacked. Each [client, …]
        threshold: bound on the Euclidean norm over all of them.
    """

    parameters: tuple[nn.Parameter, ...]
    threshold: float


class ClientDPOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
    """DP-SGD for C stacked clients.

    With thresholds c_g the gradient of one record counts at most C = √Σc_g² in the sum over all
    groups, whatever the record is; a gradient that is not finite counts nothing. To every
    coordinate of every client's sum comes Gaussian noise of standard deviation σ·C, drawn by
    ``noise``. Then the sum is divided by the client's public expected batch.

    Args:
        optimizer: takes the step; its parameters are those of the groups.
        groups: what is clipped together.
        noise_multiplier: σ.
        expected_batches: public constants, one per client. [client]
        noise: standard normal values for all coordinates of all clients at one step.
            (client, value)

    Guarantee: a step is the Gaussian mechanism with noise multiplier σ, for each client and one of
        its records replaced by a null record, given that records do not touch one another's
        gradients and ``noise`` is independent standard normal.

    Source: Abadi et al., Deep Learning with Differential Privacy (CCS 2016), algorithm 1.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        groups: Sequence[ClipGroup],
        *,
        noise_multiplier: float,
        expected_batches: Float[Tensor, " client"],
        noise: Callable[[int], Float[Tensor, "client value"]],
    ) -> None:
        norm = sum(group.threshold**2 for group in groups) ** 0.5
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self._groups, self._noise = list(groups), noise
        self._expected = expected_batches
        self._real: Tensor | None = None
        grouped = [parameter for group in groups for parameter in group.parameters]
        if {id(p) for p in grouped} != {id(p) for p in self.params} or len(grouped) != len(
            self.params
        ):
            raise ValueError("every parameter of the optimizer has to be in one clip group")

    def forget(self) -> None:
        """Forget gradients and sums, also those of a batch that was left half way.

        Opacus keeps sums until a step is taken; a record of such a batch would count twice.
        """
        self._step_skip_queue.clear()
        self._is_last_step_skipped = False
        self.zero_grad()

    def count_only(self, real: Bool[Tensor, "client own"]) -> None:
        """Say which records of the coming backward pass are real; fill rows count nothing."""
        self._real = real

    def clip_and_accumulate(self) -> None:
        """Clip every record's gradient and add it to its client's sum, in ``summed_grad``."""
        if self._real is None:
            raise ValueError("count_only has to be called for every backward pass")
        for group in self._groups:
            factors = self._factors(group, self._real)
            for parameter in _untyped(group.parameters):
                _check_processed_flag(parameter.grad_sample)
                shape = parameter.shape[1:]
                total = clipped_sum(self._get_flat_grad_sample(parameter), factors, shape)
                before = parameter.summed_grad
                parameter.summed_grad = total if before is None else before + total
                _mark_as_processed(parameter.grad_sample)
        self._real = None

    def _factors(
        self, group: ClipGroup, real: Bool[Tensor, "client own"]
    ) -> Float[Tensor, "client own"]:
        """What each record's gradient is multiplied by. 0 for fill rows and what is not finite."""
        squares = sum(
            squared_norms(self._get_flat_grad_sample(p), p.shape[1:]) for p in group.parameters
        )
        norms = torch.as_tensor(squares).sqrt().view(real.shape)
        factors = (group.threshold / norms.clamp(min=_SMALLEST)).clamp(max=1.0)
        # Norms that overflow to infinity would give 0 and gradients that are NaN give NaN.
        return torch.where(real & norms.isfinite(), factors, 0.0)

    def add_noise(self) -> None:
        """Noise for all coordinates of all clients, one block per client and step."""
        sizes = [parameter[0].numel() for parameter in self.params]
        blocks = torch.split(self._noise(sum(sizes)), sizes, dim=1)
        deviation = self.noise_multiplier * self.max_grad_norm
        for parameter, block in zip(self.params, blocks, strict=True):
            _check_processed_flag(parameter.summed_grad)
            noise = (deviation * block).to(parameter).view_as(parameter)
            parameter.grad = parameter.summed_grad + noise
            _mark_as_processed(parameter.summed_grad)

    def scale_grad(self) -> None:
        """Divide every client's sum by its public expected batch, never by the batch drawn."""
        for parameter in self.params:
            expected = self._expected.to(parameter)
            parameter.grad /= expected.view(-1, *[1] * (parameter.dim() - 1))

    def zero_grad(self, set_to_none: bool = True) -> Any:
        """Forget gradients; sums stay while a batch is worked off in parts (see Opacus)."""
        return super().zero_grad(set_to_none)
