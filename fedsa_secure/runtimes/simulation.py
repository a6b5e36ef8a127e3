"""The simulator: all clients of a federation on one machine, many of them in one forward pass."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from fedsa_secure.adapters import AdaptedModel, save_peft_adapter
from fedsa_secure.config import TrainConfig
from fedsa_secure.data import FederatedData
from fedsa_secure.errors import BudgetExceededError, CheckpointError, DivergedError
from fedsa_secure.federation.aggregation import (
    Aggregation,
    ClearAggregation,
    Contribution,
    Outcome,
)
from fedsa_secure.federation.checkpoint import Origin, StateStore
from fedsa_secure.federation.encoding import Layout
from fedsa_secure.federation.evaluation import ClientMetrics, evaluate_client, mean_of
from fedsa_secure.federation.history import History, RoundRecord, RoundTiming
from fedsa_secure.federation.local_training import (
    ClientResult,
    learning_rates,
    method_of,
    optimizer_settings,
    train_clients,
)
from fedsa_secure.federation.mechanism import Mechanism, is_evaluated
from fedsa_secure.federation.observer import Observer
from fedsa_secure.federation.personalization import personalize
from fedsa_secure.federation.release import Release
from fedsa_secure.federation.run import check_origin
from fedsa_secure.federation.run_folder import RunFolder, RunSummary, config_digest
from fedsa_secure.federation.secure_aggregation import SecureAggregation
from fedsa_secure.federation.server import apply_mean, difference, select_clients
from fedsa_secure.federation.stacking import passes
from fedsa_secure.federation.update_range import update_range
from fedsa_secure.files import writing
from fedsa_secure.types import NamedTensors

_log = logging.getLogger(__name__)


class Simulation:
    """One run, from its first or its last checkpointed round to its result.

    Args:
        config: the resolved configuration; ``clients_per_pass`` is a number.
        model: the adapted model.
        data: everybody's rows.
        folder: the run folder, already made.
        observers: told of the progress.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: AdaptedModel,
        data: FederatedData,
        folder: RunFolder,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._config, self._model, self._data, self._folder = config, model, data, folder
        self._observers = observers
        self._method = method_of(config, model.generates)
        self._store = StateStore(folder.checkpoint, in_memory=config.client_state == "memory")
        self._history = History(folder.path)
        self._shared: NamedTensors = {
            name: model.initial[name] for name in model.names(self._method.shared)
        }
        self._layout = Layout.of(self._shared)
        self._mechanism = (
            None if config.dp_epsilon is None else Mechanism.of(config, self._layout.size)
        )
        self._origin = Origin(config_digest(config), data.fingerprint, model.fingerprint)
        self._aggregation = self._make_aggregation()
        self._release = self._make_release()
        self._seconds_train = 0.0
        self._done = 0
        self._metrics: list[ClientMetrics] | None = None

    def restore(self) -> None:
        """Go back to the last checkpoint, if there is one.

        Raises:
            CheckpointError: if it is damaged, or belongs to another configuration or other data.
        """
        restored = self._store.restore()
        if self._release is not None:
            self._release.spending.restore(0 if restored is None else restored[0].ledger_events)
        if restored is None:
            self._history.cut(0)
            return
        checkpoint, self._shared = restored
        check_origin(checkpoint, self._folder.path, self._config, self._model)
        if checkpoint.data != self._data.fingerprint:
            raise CheckpointError(
                "the data are not those that the run began with (texts, labels or their division "
                "differ); give the same data set, or train anew into another output_dir"
            )
        self._store.tidy(checkpoint)
        self._history.cut(checkpoint.history_bytes)
        self._done = checkpoint.round
        if self._release is not None:
            self._release.forget(self._done)  # a crash may have left them behind the checkpoint

    def run(self) -> RunSummary:
        """All rounds that are left, then the result."""
        try:
            for observer in self._observers:
                observer.started(self._config, self._folder.path, self._done)
            for round_number in range(self._done + 1, self._config.rounds + 1):
                record, timing = self._round(round_number)
                for observer in self._observers:
                    observer.round_finished(record, timing)
        except BudgetExceededError as error:
            self._stop_early(error)
            raise
        finally:
            for observer in self._observers:
                observer.finished()
        return self._finish()

    def close(self) -> None:
        """Give what a private run keeps locked free for other runs."""
        if self._release is not None:
            self._release.spending.close()

    def _stop_early(self, error: BudgetExceededError) -> None:
        """Save the last good model as the result of a run that may not go on."""
        if self._done:
            self.restore()  # some clients may have taken their turn of the round that is given up
            self._personalize()
            self._commit(self._done, self._history.length, again=True)
            self._finish(str(error))

    def _commit(self, round_number: int, history_bytes: int, again: bool = False) -> None:
        """Make a checkpoint of the state as it is."""
        spending = None if self._release is None else self._release.spending
        events = 0 if spending is None else len(spending.run.events())
        self._store.commit(round_number, self._shared, self._origin, history_bytes, events, again)

    def evaluate(self, elsewhere: bool = True) -> list[ClientMetrics]:
        """Metrics of all personal models as they are now, elsewhere than at home as well or not."""
        return [
            evaluate_client(
                self._model,
                self._data,
                client,
                self.client_tensors(client),
                self._config,
                elsewhere,
            )
            for client in range(len(self._data.shards))
        ]

    @property
    def shared(self) -> NamedTensors:
        """The public shared tensors as they are now."""
        return self._shared

    @property
    def records(self) -> list[RoundRecord]:
        """One record per round so far."""
        return self._history.records()

    def client_tensors(self, client: int) -> NamedTensors:
        """All trained tensors of one client as they are now, the shared ones included."""
        return self._store.get(client).tensors(self._shared)

    @property
    def _per_pass(self) -> int:
        if not isinstance(self._config.clients_per_pass, int):
            raise TypeError("clients_per_pass has to be resolved before a simulation is made")
        return self._config.clients_per_pass

    def _round(self, round_number: int) -> tuple[RoundRecord, RoundTiming]:
        """``train → encode → mask → sum → decode → update``, then evaluate and checkpoint."""
        config = self._config
        clock = _Clock()
        last = round_number == config.rounds
        clients = self._cohort(round_number)
        self._seconds_train = 0.0
        outcome = self._aggregation.round(
            round_number,
            clients,
            None if last else self._cohort(round_number + 1),
            self._shared,
            lambda chosen: self._contributions(chosen, round_number),
        )
        if outcome.mean is not None and self._shared:
            self._shared = apply_mean(self._shared, self._layout, outcome.mean)
        seconds_aggregate = clock.lap() - self._seconds_train
        metrics = None
        if last:
            self._personalize()
        if last or (is_evaluated(config, round_number) and not self._twins):
            metrics = self.evaluate(elsewhere=last)
            self._metrics = metrics if last else None
        seconds_evaluate = clock.lap()
        record = self._record(round_number, clients, outcome, metrics)
        length = self._history.append(record)
        # Of a private run nothing that was counted is to be made again, so every round is kept.
        if last or self._release or round_number % config.checkpoint_every == 0:
            self._commit(round_number, length)
            if self._release:
                self._release.forget(round_number)
        timing = RoundTiming(
            round=round_number,
            train=self._seconds_train,
            aggregate=seconds_aggregate,
            evaluate=seconds_evaluate,
            checkpoint=clock.lap(),
            exchanges=outcome.exchanges,
            overhead_bytes=outcome.overhead_bytes,
        )
        self._history.append_timing(timing)
        self._done = round_number
        _log.info("round %d of %d: loss %s", round_number, config.rounds, record.loss)
        return record, timing

    def _cohort(self, round_number: int) -> list[int]:
        config = self._config
        return select_clients(
            len(self._data.shards), config.participation, config.seed, round_number
        )

    def _make_aggregation(self) -> Aggregation:
        """In the clear if that is asked for, or if nothing leaves the clients."""
        if not (self._config.secure_aggregation and self._shared):
            return ClearAggregation()
        return SecureAggregation(self._config, self._layout, self._cohort, self._update_range)

    @property
    def _twins(self) -> bool:
        """Whether personal models come into being after the last round only."""
        return self._release is not None and self._release.mechanism.record

    def _make_release(self) -> Release | None:
        if self._mechanism is None:
            return None
        return Release(
            self._config,
            self._mechanism,
            self._model,
            self._method,
            self._data,
            self._layout,
            self._folder.path,
            self._per_pass,
        )

    def _personalize(self) -> None:
        """The personal part of a private run, on top of what is released."""
        if not self._twins:
            return
        for group in passes(list(range(len(self._data.shards))), self._per_pass):
            turns = [(client, self._store.get(client)) for client in group]
            states = personalize(
                self._model, self._method, self._config, self._data, self._shared, turns
            )
            for client, state in zip(group, states, strict=True):
                self._store.put(client, state, self._config.rounds + 1)

    def _update_range(self, round_number: int, shared: NamedTensors) -> float:
        """Bound on a value of an update in this round; public."""
        config, private = self._config, self._mechanism
        if private is not None and not private.record and config.update_range is None:
            return private.largest_update()
        settings = optimizer_settings(config)
        if private is not None and private.record:
            fewest = min(len(shard.train) for shard in self._data.shards)
            settings = replace(settings, max_grad_norm=private.largest_gradient(fewest))
        by_step = [
            learning_rates(self._model, self._method, config, round_number, step)
            for step in range(config.local_steps)
        ]
        rates = [max(rates[name] for name in shared) for rates in by_step]
        largest = max(float(tensor.abs().max()) for tensor in shared.values())
        return update_range(config, settings, rates, largest)

    def _contributions(self, clients: Sequence[int], round_number: int) -> Iterator[Contribution]:
        """What these clients send, one at a time and in the order given."""
        if self._release is None:
            yield from self._train(clients, round_number)
            return
        clock = _Clock()
        shared, store = self._shared, self._store
        for each in self._release.contributions(clients, round_number, shared, store):
            self._seconds_train += clock.lap()
            yield each
            clock.lap()

    def _train(self, clients: Sequence[int], round_number: int) -> Iterator[Contribution]:
        """What these clients have to say, one at a time and in the order given.

        Everything else that a client's turn ends with goes to its own store.
        """
        clock = _Clock()
        for group in passes(list(clients), self._per_pass):
            turns = [(client, self._store.get(client)) for client in group]
            results = train_clients(
                self._model,
                self._method,
                self._config,
                self._data,
                self._shared,
                turns,
                round_number,
            )
            for result in results:
                vector = self._layout.encode(difference(result.shared, self._shared))
                _check_finite(result, round_number)
                self._store.put(result.client, result.state, round_number)
                weight = self._weight(result.client)
                self._seconds_train += clock.lap()
                yield Contribution(result.client, vector, result.loss, weight)
                clock.lap()

    def _weight(self, client: int) -> int:
        """What a client's update counts; its rows, where they count, up to the public cap."""
        cap = self._config.weight_cap
        return 1 if cap is None else min(len(self._data.shards[client].train), cap)

    def _record(
        self,
        round_number: int,
        clients: list[int],
        outcome: Outcome,
        metrics: list[ClientMetrics] | None,
    ) -> RoundRecord:
        received = sum(t.numel() * t.element_size() for t in self._shared.values())
        rates = learning_rates(self._model, self._method, self._config, round_number, 0)
        return RoundRecord(
            round=round_number,
            clients=tuple(clients),
            learning_rate=next(iter(rates.values())),
            loss=outcome.loss,
            uplink_bytes=self._aggregation.uplink_bytes(self._layout.size),
            downlink_bytes=received,
            test_loss=None if metrics is None else mean_of(metrics, "loss"),
            accuracy=None if metrics is None else mean_of(metrics, "accuracy"),
            macro_f1=None if metrics is None else mean_of(metrics, "macro_f1"),
            survivors=outcome.survivors,
            attempts=outcome.attempts,
            aborts=outcome.aborts,
            clipped=outcome.clipped,
            epsilon=None if self._release is None else self._release.spending.epsilon,
            noised_accuracy=outcome.accuracy if is_evaluated(self._config, round_number) else None,
            statement=self._statement() if round_number == self._config.rounds else None,
        )

    def _statement(self) -> str | None:
        return None if self._release is None else self._release.spending.report().statement

    def _finish(self, stopped: str | None = None) -> RunSummary:
        """Write every client's adapter, then the result that marks the run as finished."""
        metrics = self._metrics if self._metrics is not None else self.evaluate()
        for client in range(len(self._data.shards)):
            with writing(self._folder.adapter(client)):
                save_peft_adapter(
                    self._model,
                    self.client_tensors(client),
                    self._folder.adapter(client),
                    self._config.model,
                )
        summary = RunSummary(
            label_names=self._data.label_names,
            clients=tuple(metrics),
            privacy=None if self._release is None else self._release.spending.report(stopped),
        )
        self._folder.write_summary(summary)
        if self._release is not None:
            self._release.forget(self._config.rounds)  # those of a round that was given up
        return summary


def _check_finite(result: ClientResult, round_number: int) -> None:
    tensors = [
        *result.shared.values(),
        *result.state.personal.values(),
        *result.state.twin.values(),
    ]
    if (result.loss is None or math.isfinite(result.loss)) and all(
        bool(t.isfinite().all()) for t in tensors
    ):
        return
    raise DivergedError(
        f"client {result.client} diverged in round {round_number}: its loss or a tensor that it "
        "trains is not finite; take a lower learning_rate, or use max_grad_norm"
    )


class _Clock:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
