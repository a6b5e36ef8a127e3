"""Ledgers of a private run beyond crashes: lost files, remembered budgets, noised metrics."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedsa_secure.errors import BudgetExceededError, CheckpointError
from fedsa_secure.federation.aggregation import Contribution
from fedsa_secure.federation.masked_vector import MaskedVector
from fedsa_secure.federation.mechanism import Mechanism
from fedsa_secure.federation.release import Release
from fedsa_secure.federation.run_folder import RunFolder
from fedsa_secure.federation.spending import Spending
from fedsa_secure.privacy import DataSetLedger, LedgerEvent, TurnSecret, certified_epsilon
from fedsa_secure.privacy.ledger import read_ledger
from fedsa_secure.runtimes.simulation import Simulation

PRIVATE = {
    "dp_epsilon": 8.0,
    "dp_noise_multiplier": 1.0,
    "dp_dataset_id": "pool",
    "rounds": 2,
    "local_steps": 1,
    "personal_steps": 1,
    "cross_rows": 0,
}


@pytest.fixture
def made(federation: Callable[..., Any]) -> Any:
    return federation(sizes=(30, 30, 30), **PRIVATE)


def again(made: Any, name: str) -> Simulation:
    """The same run, opened by another process."""
    folder, config = RunFolder.open(made.folder / name)
    return Simulation(config, made.model, made.data, folder)


def test_a_ledger_that_lost_events_is_refused(made: Any) -> None:
    made.simulate("run")
    path = made.folder / "run" / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with (
        closing(again(made, "run")) as simulation,
        pytest.raises(CheckpointError, match=r"has 5 events, but the checkpoint was taken at 6"),
    ):
        simulation.restore()


def test_what_a_data_sets_ledger_lost_is_written_again_from_the_runs(made: Any) -> None:
    made.simulate("run", dp_home=str(made.folder / "home"))
    [path] = (made.folder / "home" / "ledgers").glob("pool-client-1-*.jsonl")
    before = path.read_text()
    path.unlink()
    with closing(again(made, "run")) as simulation:
        simulation.restore()
    assert path.read_text() == before


def test_a_budget_stays_with_the_data_set(made: Any) -> None:
    home = str(made.folder / "home")
    made.simulate("first", dp_home=home, dp_lifetime_epsilon=4.0)
    with pytest.raises(BudgetExceededError, match="lifetime budget of 4"):
        made.simulate("second", dp_home=home)  # and does not say a budget
    made.simulate("third", dp_home=home, dp_lifetime_epsilon=50.0)


def test_a_client_releases_no_more_updates_than_were_planned(made: Any) -> None:
    """Also if stored uploads were lost after they had been counted."""
    config = made.config.replace(dp_home=str(made.folder / "home"))
    mechanism = Mechanism.of(config, 10)
    spending = Spending(config, mechanism, 3, made.folder)
    with closing(spending):
        for number in (1, 2):
            planned = [an_event(number)]
            spending.require(0, planned)
            spending.count(planned)
        spending.require(0, planned)  # sent again, not released again
        with pytest.raises(BudgetExceededError, match="2 updates and 2 were planned"):
            spending.require(0, [an_event(3)])
        assert spending.epsilon == mechanism.epsilon(2)


def test_a_seeded_event_in_the_ledger_ends_every_claim(made: Any) -> None:
    """Whatever the configuration says by now."""
    config = made.config.replace(dp_home=str(made.folder / "home"))
    spending = Spending(config, Mechanism.of(config, 10), 3, made.folder)
    with closing(spending):
        spending.count([an_event(1)])
        assert spending.epsilon is not None
        spending.count([an_event(2).model_copy(update={"private": False})])
        assert spending.epsilon is None
        assert spending.report().statement.startswith("NOT PRIVATE")


def an_event(number: int) -> LedgerEvent:
    return LedgerEvent(
        id=f"{number:032x}",
        run="run",
        data_set="pool/client-0",
        client=0,
        round=number,
        steps=1,
        sampling_rate=0.25,
        noise_multiplier=1.0,
        clip_norm=0.1,
        upload="0" * 64,
    )


def test_a_budget_that_is_given_replaces_the_one_before(made: Any) -> None:
    with closing(DataSetLedger.open(made.folder / "home", "pool")) as ledger:
        assert ledger.budget(None) is None
        assert ledger.budget(3.5) == 3.5
        assert ledger.budget(None) == 3.5
        assert ledger.budget(2.0) == 2.0
        assert ledger.budget(None) == 2.0


def test_a_noised_metric_is_a_count_with_the_noise_of_its_turn(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the noise taken off, what was sent times the test rows is a whole number of them."""
    sent: list[tuple[int, float]] = []
    write = MaskedVector.write

    def spy(self: MaskedVector, each: Contribution, number: int, *rest: Any) -> None:
        assert self.size == self.values + 1
        sent.append((number, each.client, each.accuracy))
        write(self, each, number, *rest)

    monkeypatch.setattr(MaskedVector, "write", spy)
    options = {"dp_metrics": "noised", "evaluate_every": 2, "rounds": 4, "dp_test_seed": 3}
    simulation = made.simulate("run", **options)
    config = made.config.replace(**options)
    deviation = Mechanism.of(config, 10).metric_noise
    assert deviation is not None
    assert [number for number, _, accuracy in sent if accuracy is not None] == [2] * 3 + [4] * 3
    rights = []
    for number, client, accuracy in sent:
        if accuracy is None:
            continue
        rows = len(made.data.shards[client].test)
        noise = TurnSecret.for_tests(3, client, number).gaussian("accuracy", 1)[0]
        right = accuracy * rows - deviation * noise
        assert right == pytest.approx(round(right), abs=1e-6)
        assert 0 <= round(right) <= rows
        rights.append(round(right))
    assert len(set(rights)) > 1
    records = simulation.records
    assert [record.noised_accuracy is None for record in records] == [True, False, True, False]
    last = [accuracy for number, _, accuracy in sent if number == 4]
    assert records[-1].noised_accuracy == pytest.approx(np.mean(last), abs=1e-5)


def test_metrics_are_counted_and_a_row_spends_on_one_side(made: Any) -> None:
    options = {"dp_metrics": "noised", "evaluate_every": 1, "dp_home": str(made.folder / "home")}
    simulation = made.simulate("run", **options)
    events = read_ledger(made.folder / "run" / "ledger.jsonl")
    metrics = [event for event in events if event.release == "metric"]
    assert len(metrics) == len(events) / 2 == 6
    assert {(e.sampling_rate, e.clip_norm, e.steps) for e in metrics} == {(1.0, 1.0, 1)}
    by_side = [
        certified_epsilon([e.event for e in events if e.client == 0 and e.release == side], 1e-5)
        for side in ("update", "metric")
    ]
    assert simulation.records[-1].epsilon == pytest.approx(max(by_side))
    assert max(by_side) <= 8.0


@pytest.mark.parametrize("noise", ["local", "distributed"])
def test_a_client_that_diverges_sends_noise_and_is_counted(
    federation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, noise: str
) -> None:
    """An error would leave the client and tell of its data."""
    made = federation(
        sizes=(30, 30, 30), **PRIVATE | {"dp_unit": "client", "dp_noise": noise, "rounds": 1}
    )
    train = Release._train

    def one_diverges(self: Release, *arguments: Any) -> list[Any]:
        results = train(self, *arguments)
        bad = {name: t * torch.inf for name, t in results[1].state.personal.items()}
        state = replace(results[1].state, personal=bad)
        return [results[0], replace(results[1], state=state, loss=float("nan")), *results[2:]]

    monkeypatch.setattr(Release, "_train", one_diverges)
    options = {"dp_noise_multiplier": 30.0} if noise == "local" else {"dp_noise_multiplier": 60.0}
    simulation = made.simulate("run", **options)
    assert simulation._store.get(1).personal == {}  # as before its turn
    assert len(read_ledger(made.folder / "run" / "ledger.jsonl")) == 3
    assert all(bool(t.isfinite().all()) for t in simulation.shared.values())
