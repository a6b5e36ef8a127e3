"""``privatise``: what clients send in a private run: noised, stored, counted, only then sent."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float64
from torch import Tensor

from fedsa_secure.adapters import AdaptedModel
from fedsa_secure.config import TrainConfig
from fedsa_secure.data import FederatedData
from fedsa_secure.federation.aggregation import Contribution
from fedsa_secure.federation.checkpoint import StateStore
from fedsa_secure.federation.encoding import Layout
from fedsa_secure.federation.evaluation import predict_classes
from fedsa_secure.federation.local_training import ClientResult, train_clients
from fedsa_secure.federation.mechanism import Mechanism, is_evaluated
from fedsa_secure.federation.private_training import (
    PrivateTurn,
    released_method,
    train_privately,
)
from fedsa_secure.federation.server import difference
from fedsa_secure.federation.spending import Spending, data_set_of
from fedsa_secure.federation.stacking import passes
from fedsa_secure.federation.uploads import Upload, UploadStore
from fedsa_secure.methods import Method
from fedsa_secure.privacy import (
    LedgerEvent,
    TurnSecret,
    gaussian_update,
)
from fedsa_secure.types import NamedTensors

_log = logging.getLogger(__name__)


class Release:
    """The private turns of a run's clients, with everything that they leave on disk.

    Args:
        config: the resolved configuration.
        mechanism: its public constants.
        model: the frozen base.
        method: what is trained and shared.
        data: everybody's rows.
        layout: of the shared tensors.
        folder: the run folder.
        per_pass: clients in a stack.

    Guarantee: of every client, everything that ``contributions`` yields is counted in the run's
        ledger and in that of its data set before it is yielded. docs/privacy.md.
    """

    def __init__(
        self,
        config: TrainConfig,
        mechanism: Mechanism,
        model: AdaptedModel,
        method: Method,
        data: FederatedData,
        layout: Layout,
        folder: Path,
        per_pass: int,
    ) -> None:
        self._config, self.mechanism, self._per_pass = config, mechanism, per_pass
        self._model, self._method, self._data = model, method, data
        self._layout = layout
        self._run = folder.resolve().name
        self._uploads = UploadStore(folder / "uploads")
        self.spending = Spending(config, mechanism, len(data.shards), folder)

    def contributions(
        self,
        clients: Sequence[int],
        round_number: int,
        shared: NamedTensors,
        store: StateStore,
    ) -> Iterator[Contribution]:
        """What these clients send in a round, one at a time and in the order given.

        Args:
            clients: their numbers.
            round_number: counted from 1.
            shared: the public shared tensors at its start.
            store: where their states are, and go.

        Raises:
            BudgetExceededError: before anybody's turn, if a client's data set would spend too much.
            CheckpointError: likewise, if another run spends from one.
        """
        for client in clients:
            self.spending.require(client, self._planned(client, round_number))
        for group in passes(list(clients), self._stacked(clients)):
            found = {client: self._uploads.get(client, round_number) for client in group}
            missing = [client for client, upload in found.items() if upload is None]
            for upload in self._turns(missing, round_number, shared, store):
                self._uploads.put(upload)
                found[upload.event.client] = upload
            for client in group:
                ready = found[client]
                assert ready is not None  # noqa: S101 - for mypy
                self.spending.count(ready.events)
                store.put(client, ready.state, round_number)
                yield Contribution(
                    client, ready.update, None, rounding_key=ready.key, accuracy=ready.accuracy
                )

    def forget(self, last_round: int) -> None:
        """Stored uploads up to this round are not needed any more."""
        self._uploads.forget(last_round)

    def _planned(self, client: int, round_number: int) -> list[LedgerEvent]:
        """What a client's turn costs, or has cost if it was finished before a crash."""
        upload = self._uploads.get(client, round_number)
        if upload is not None:
            return upload.events
        event = self._event(client, round_number, TurnSecret.fresh(), "0" * 64)
        noised = self.mechanism.metric_noise and is_evaluated(self._config, round_number)
        return [event, self._metric_event(event)] if noised else [event]

    def _turns(
        self,
        clients: Sequence[int],
        round_number: int,
        shared: NamedTensors,
        store: StateStore,
    ) -> Iterator[Upload]:
        if not clients:
            return
        secrets = {client: self._secret(client, round_number) for client in clients}
        for result in self._train(clients, round_number, shared, store, secrets):
            secret = secrets[result.client]
            if not _finite(result):
                # An error would leave the client and tell of its data; this is noised and counted.
                _log.warning("client %d: its turn is not finite and counts zero", result.client)
                result = replace(result, shared=shared, state=store.get(result.client))
            update = self._layout.encode(difference(result.shared, shared)).double()
            if not self.mechanism.record:
                update = self._noised(update, secret)
            key = secret.key("rounding")
            accuracy = self._accuracy(result, secret, round_number)
            digest = Upload.digest(update, key, accuracy)
            event = self._event(result.client, round_number, secret, digest)
            counted = None if accuracy is None else self._metric_event(event)
            yield Upload(update, key, result.state, event, accuracy, counted)

    def _train(
        self,
        clients: Sequence[int],
        round_number: int,
        shared: NamedTensors,
        store: StateStore,
        secrets: dict[int, TurnSecret],
    ) -> list[ClientResult]:
        model, config, data = self._model, self._config, self._data
        states = {client: store.get(client) for client in clients}
        if not self.mechanism.record:
            turns = list(states.items())
            return train_clients(model, self._method, config, data, shared, turns, round_number)
        released = released_method(self._method, config)
        private = [PrivateTurn.of(client, states[client], secrets[client]) for client in clients]
        return train_privately(
            model, released, config, self.mechanism, data, shared, private, round_number
        )

    def _accuracy(
        self, result: ClientResult, secret: TurnSecret, round_number: int
    ) -> float | None:
        """Accuracy of the twin on the client's test part, its count noised; None if not asked for.

        Guarantee: the Gaussian mechanism of sensitivity 1 for a test row. For a training row it is
            a function of the twin, which is noised. The number of test rows is public.
        """
        deviation = self.mechanism.metric_noise
        if deviation is None or not is_evaluated(self._config, round_number):
            return None
        self._model.load([result.state.tensors(result.shared)], trained=())
        rows = self._data.shards[result.client].test
        classes, _ = predict_classes(self._model, self._data.rows, rows)
        right = int((classes == self._data.rows.labels[rows]).sum())
        noise = float(secret.gaussian("accuracy", 1)[0])
        return (right + deviation * noise) / len(rows)

    def _metric_event(self, event: LedgerEvent) -> LedgerEvent:
        """What a noised count costs beside the update of the same turn."""
        noise = self.mechanism.metric_noise
        changes = {
            "id": event.id + "00",  # another block of the same turn's secret
            "release": "metric",
            "steps": 1,
            "sampling_rate": 1.0,
            "clip_norm": 1.0,
            "noise_multiplier": noise,
        }
        return event.model_copy(update=changes)

    def _noised(
        self, update: Float64[Tensor, " value"], secret: TurnSecret
    ) -> Float64[Tensor, " value"]:
        """A client's whole update, clipped, with the noise that the client adds itself."""
        mechanism = self.mechanism
        if mechanism.discrete is not None:
            return torch.from_numpy(mechanism.discrete.privatise(update.numpy(), secret, "update"))
        return gaussian_update(
            update, mechanism.clip_norm, mechanism.noise_multiplier, secret, "update"
        )

    def _secret(self, client: int, round_number: int) -> TurnSecret:
        seed = self._config.dp_test_seed
        if seed is None:
            return TurnSecret.fresh()
        return TurnSecret.for_tests(seed, client, round_number)

    def _event(
        self, client: int, round_number: int, secret: TurnSecret, digest: str
    ) -> LedgerEvent:
        mechanism, noise = self.mechanism, self.mechanism.discrete
        discrete = (
            {}
            if noise is None
            else {
                "mechanism": "skellam",
                "variance": noise.total_variance,
                "sensitivity_l1": noise.sensitivity_l1,
                "sensitivity_l2": noise.sensitivity_l2,
                "table_epsilon": noise.table_epsilon,
            }
        )
        return LedgerEvent(
            id=secret.id,
            run=self._run,
            data_set=data_set_of(self._config, client),
            client=client,
            round=round_number,
            steps=mechanism.steps,
            sampling_rate=mechanism.sampling_rate,
            noise_multiplier=mechanism.noise_multiplier,
            clip_norm=mechanism.clip_norm,
            upload=digest,
            private=secret.private,
            **discrete,
        )

    def _stacked(self, clients: Sequence[int]) -> int:
        """Clients in one stack. Private batches that fill a pass by themselves go one by one.

        Side by side everyone would be filled up to the client with most records.
        """
        if not self.mechanism.record:
            return self._per_pass
        records = [len(self._data.shards[client].train) for client in clients]
        expected = self.mechanism.sampling_rate * sum(records) / max(1, len(records))
        return self._per_pass if expected < self._config.batch_size else 1


def _finite(result: ClientResult) -> bool:
    tensors = result.state.tensors(result.shared).values()
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
