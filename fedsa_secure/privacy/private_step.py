"""One private step of C stacked clients. Training and auditor take this path and no other."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim import Optimizer

from fedsa_secure.errors import PrivacyError
from fedsa_secure.privacy.optimizer import ClientDPOptimizer, ClipGroup
from fedsa_secure.privacy.randomness import TurnSecret
from fedsa_secure.privacy.watching import watched


@dataclass(frozen=True)
class PartialBatch:
    """Losses of some records, with their graph.

    Args:
        losses: of each record, from its own tokens only. [client·row]
        real: False for rows that only fill a segment. [client, row]
    """

    losses: Float[Tensor, " rows"]
    real: Bool[Tensor, "client row"]


class PrivateStep:
    """Noised steps of stacked clients, while the context is open.

    Args:
        module: the model that carries the clients.
        groups: everything in it that is trained, by clip group.
        optimizer: takes the step.
        noise_multiplier: σ; 0 only where the auditor plants it.
        expected_batches: public, one per client. [client]
        secrets: one per client; every step takes one block of noise of each.

    Raises:
        PrivacyError: if the module has a parameter with gradients that is in no group.

    Guarantee: see ``ClientDPOptimizer``.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ClipGroup],
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        expected_batches: Float[Tensor, " client"],
        secrets: Sequence[TurnSecret],
    ) -> None:
        _require_all_noised(module, groups)
        self._module, self._secrets = module, secrets
        self._steps = 0
        self.optimizer = ClientDPOptimizer(
            optimizer,
            groups,
            noise_multiplier=noise_multiplier,
            expected_batches=expected_batches,
            noise=self._noise,
        )

    @contextmanager
    def open(self) -> Iterator["PrivateStep"]:
        """Let Opacus' hooks watch the trained layers."""
        with watched(self._module):
            yield self

    def __call__(self, parts: Iterable[PartialBatch]) -> None:
        """One step: gradients of all parts are clipped and added up, then noised once.

        Args:
            parts: the batch in at least one part; each is made when the one before is done with.

        Raises:
            PrivacyError: if the first step leaves the parameters where they were.
        """
        before = None if self._steps else [p.detach().clone() for p in self.optimizer.params]
        self.optimizer.forget()
        waiting = None
        for part in parts:
            if waiting is not None:
                self._accumulate(waiting)
            waiting = part
            self._backward(part)
        if waiting is None:
            raise ValueError("a step without records still needs a part with fill rows")
        self.optimizer.count_only(waiting.real)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._steps += 1
        if before is not None:
            _require_moved(before, self.optimizer)

    def _backward(self, part: PartialBatch) -> None:
        # A sum over records: a mean would couple them. where, and not a product with zero.
        torch.where(part.real.flatten(), part.losses, 0.0).sum().backward()  # type: ignore[no-untyped-call]

    def _accumulate(self, part: PartialBatch) -> None:
        """Clip and add up, without noise and without a step: there is more of this batch."""
        self.optimizer.count_only(part.real)
        self.optimizer.signal_skip_step(True)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _noise(self, values: int) -> Float[Tensor, "client value"]:
        label = f"step {self._steps}"
        drawn = [torch.from_numpy(s.gaussian(label, values)) for s in self._secrets]
        return torch.stack(drawn)


def _require_all_noised(module: nn.Module, groups: Sequence[ClipGroup]) -> None:
    """Everything trained has to be clipped and noised: else one record reaches A around the noise.

    Raises:
        PrivacyError: naming the first parameter that is not.
    """
    noised = {id(parameter) for group in groups for parameter in group.parameters}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in noised:
            raise PrivacyError(
                name,
                "it is trained without noise on the same records, and what is released would "
                "depend on it",
                "freeze it, or put it into a clip group",
            )


def _require_moved(before: list[Tensor], optimizer: ClientDPOptimizer) -> None:
    # A wrapped optimizer can hold other tensors than the model and then train nothing.
    if all(torch.equal(old, new) for old, new in zip(before, optimizer.params, strict=True)):
        raise PrivacyError(
            "optimizer", "its first step moved no parameter", "check its learning rate"
        )
