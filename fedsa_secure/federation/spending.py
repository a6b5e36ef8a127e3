"""What a private run has spent, on disk: its own ledger, and those of its data sets."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fedsa_secure.config import TrainConfig
from fedsa_secure.errors import BudgetExceededError, CheckpointError
from fedsa_secure.federation.mechanism import Mechanism
from fedsa_secure.federation.privacy_report import PrivacyReport, statement
from fedsa_secure.federation.secure_aggregation import round_thresholds
from fedsa_secure.privacy import (
    DataSetLedger,
    Ledger,
    LedgerEvent,
    home_folder,
    require_budget,
    spent,
)


class Spending:
    """The ledgers of a run. They are locked from their first use until they are closed.

    Args:
        config: the resolved configuration.
        mechanism: its public constants.
        clients: how many there are.
        folder: the run folder.
    """

    def __init__(
        self, config: TrainConfig, mechanism: Mechanism, clients: int, folder: Path
    ) -> None:
        self._config, self._mechanism, self._clients = config, mechanism, clients
        self._path = folder / "ledger.jsonl"
        self._run: Ledger | None = None
        self._lifetimes: dict[int, DataSetLedger] = {}

    @property
    def run(self) -> Ledger:
        """What this run has spent."""
        if self._run is None:
            self._run = Ledger(self._path)
        return self._run

    def lifetime(self, client: int) -> DataSetLedger:
        """What the data set of a client has spent in all runs; nobody else may spend meanwhile."""
        if client not in self._lifetimes:
            home = home_folder(self._config.dp_home)
            self._lifetimes[client] = DataSetLedger.open(home, data_set_of(self._config, client))
        return self._lifetimes[client]

    def close(self) -> None:
        """Give the ledgers free for other runs."""
        for ledger in (*self._lifetimes.values(), *([self._run] if self._run else [])):
            ledger.close()
        self._lifetimes, self._run = {}, None

    def restore(self, events: int) -> None:
        """Go on from a checkpoint.

        What the run has spent is written once more where data sets are counted, if it is not there.

        Args:
            events: that the run's ledger had at the checkpoint.

        Raises:
            CheckpointError: if it has lost some since.
        """
        found = self.run.events()
        if len(found) < events:
            raise CheckpointError(
                f"{self._path} has {len(found)} events, but the checkpoint was taken at {events}; "
                "restore it from a backup: what was spent cannot be known without it"
            )
        for event in found:
            if event.private:
                self.lifetime(event.client).append([event])

    def require(self, client: int, planned: Sequence[LedgerEvent]) -> None:
        """Refuse what the run did not plan, or the data set could not pay for.

        Args:
            client: its number.
            planned: events of its turn; those that are counted already are not counted again.

        Raises:
            BudgetExceededError: before anything is spent.
            CheckpointError: if another run spends from the data set.
        """
        known = {e.id for e in self.run.events()}
        taken = self._counted("update")[client]
        if planned[0].id not in known and taken >= self._config.rounds:
            raise BudgetExceededError(
                f"client {client}",
                f"it has released {taken} updates and {self._config.rounds} were planned: stored "
                "uploads were lost after they had been counted",
                "train anew into another output_dir, with what is left of the budget",
            )
        if self._config.dp_test_seed is None:
            ledger = self.lifetime(client)
            budget = ledger.budget(self._config.dp_lifetime_epsilon)
            if budget is not None:
                require_budget(ledger, planned, self._config.dp_delta, budget)

    def count(self, events: Sequence[LedgerEvent]) -> None:
        """Write events of a client down, first at the silo's home: a crash counts too much.

        Noise from a test's seed is the same in every run with it, and only the run notes it.
        """
        private = [event for event in events if event.private]
        if private:
            self.lifetime(private[0].client).append(private)
        self.run.append(events)

    @property
    def secret(self) -> bool:
        """Whether nobody can make any of the run's noise again; the ledger has the last word."""
        seeded = self._config.dp_test_seed is not None
        return not seeded and all(event.private for event in self.run.events())

    @property
    def epsilon(self) -> float | None:
        """Certified ε of the client with most releases so far; None if noise was not secret."""
        return max(self.by_client().values(), default=0.0) if self.secret else None

    def by_client(self) -> dict[int, float]:
        """Certified ε of each client in this run.

        A row is for training or for testing, by coins that know nothing of it. Metrics are about
        the one and updates about the other, so the larger of the two is what a row has spent.
        """
        mechanism, updates, metrics = (
            self._mechanism,
            self._counted("update"),
            self._counted("metric"),
        )
        return {
            client: max(
                mechanism.epsilon(updates[client]), mechanism.metric_epsilon(metrics[client])
            )
            for client in range(self._clients)
        }

    def report(self, stopped: str | None = None) -> PrivacyReport:
        """What the run promises, as far as it got.

        Args:
            stopped: why it ended early.
        """
        config, mechanism = self._config, self._mechanism
        most = max(self._counted("update").values(), default=0)
        thresholds = None if mechanism.discrete is None else round_thresholds(config)
        report = PrivacyReport(
            epsilon=self.epsilon,
            delta=config.dp_delta,
            unit=config.dp_unit,
            release=config.dp_release if mechanism.record else "update",
            noise=config.dp_noise,
            noise_multiplier=mechanism.noise_multiplier,
            clip_norm=mechanism.clip_norm,
            sampling_rate=mechanism.sampling_rate,
            steps=most * mechanism.steps,
            colluders=None if thresholds is None else thresholds.colluders,
            survivors=None if thresholds is None else thresholds.survivors,
            by_client=self.by_client() if self.secret else {},
            lifetime=self._lifetime_epsilons() if self.secret else {},
            stopped=stopped,
        )
        return report.model_copy(update={"statement": statement(report)})

    def _counted(self, release: str) -> Counter[int]:
        """Updates, or metrics, that each client has released so far."""
        events = self.run.events()
        return Counter(event.client for event in events if event.release == release)

    def _lifetime_epsilons(self) -> dict[str, float]:
        """Certified ε of a record of each data set over all runs."""
        delta, found = self._config.dp_delta, {}
        for client in range(self._clients):
            ledger = self.lifetime(client)
            found[ledger.data_set] = spent(ledger.events(), delta)
        return found


def data_set_of(config: TrainConfig, client: int) -> str:
    """The name under which a client's data set is counted."""
    return f"{config.dp_dataset_id or config.dataset}/client-{client}"
