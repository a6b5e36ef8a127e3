"""Client-level protection of the tiny model: a client trains freely, its update is noised."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fedsa_secure.audit.tiny_training import Records, Setting, Training
from fedsa_secure.privacy import DiscreteNoise, TurnSecret, clipped_update, gaussian_update
from fedsa_secure.types import NamedTensors

_SERVER_RATE = 0.1


class ClientTraining(Training):
    """Rounds of one protected client, for C trials at once.

    B and head are the client's own: they train without noise and stay from round to round. Other
    clients do not depend on the protected one except through A, so they are left out.

    Args:
        setting: the public constants; ``steps`` are rounds.
        records: of the protected client.
        secrets: of every trial.
        discrete: noise of distributed rounds, all of it made by this client; None for Gaussian.
        local_steps: of a round.
    """

    def __init__(
        self,
        setting: Setting,
        records: Records,
        secrets: Sequence[TurnSecret],
        discrete: DiscreteNoise | None = None,
        local_steps: int = 5,
    ) -> None:
        self.setting, self.records, self._secrets = setting, records, secrets
        self.model = setting.start(len(secrets))
        self._A = self.model.adapter.A.detach().clone()
        self._discrete, self._local_steps, self._rounds = discrete, local_steps, 0

    @property
    def shared(self) -> Tensor:
        """The released values of A. [client, r, d_in]"""
        return self._A

    @property
    def scale(self) -> float:
        """One over the rate at which the server adds updates."""
        return 1 / _SERVER_RATE

    @property
    def noised(self) -> NamedTensors:
        """A alone; B and head are never noised."""
        return {"A": self._A}

    @property
    def clipped(self) -> Float[Tensor, "client value"]:
        """The clipped updates of the last round, before noise."""
        return torch.stack([self._clip(update) for update in self._updates])

    def step(self) -> None:
        """Take a round."""
        self._updates = self._update().flatten(1)
        label = f"round {self._rounds}"
        self._rounds += 1
        noised = [
            self._noise(update, secret, label)
            for update, secret in zip(self._updates, self._secrets, strict=True)
        ]
        self._A += _SERVER_RATE * torch.stack(noised).view_as(self._A)

    def _update(self) -> Float[Tensor, "client r d_in"]:
        with torch.no_grad():
            self.model.adapter.A.copy_(self._A)
        optimizer = self.setting.stacked_optimizer(self.model.trained())
        for _ in range(self._local_steps):
            optimizer.zero_grad()
            self.model.losses(self.records).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return self.model.adapter.A.detach() - self._A

    def _noise(
        self, update: Float64[Tensor, " value"], secret: TurnSecret, label: str
    ) -> Float64[Tensor, " value"]:
        if self._discrete is not None:
            return torch.from_numpy(self._discrete.privatise(update.numpy(), secret, label))
        setting = self.setting
        return gaussian_update(update, setting.clip_norm, setting.noise_multiplier, secret, label)

    def _clip(self, update: Float64[Tensor, " value"]) -> Float64[Tensor, " value"]:
        if self._discrete is None:
            return clipped_update(update, self.setting.clip_norm)
        return torch.from_numpy(self._discrete.rounded(update.numpy()) * self._discrete.step)
