"""Private runs that are killed, or run out of budget: nothing released is uncounted.

A resumed run has fresh coins and noise, so its bytes are not those of one that was not killed. What
holds is: everything that was ever sent has its event in both ledgers, under the digest of the very
bytes; what was stored is sent again as it was; no noise is in two different uploads.
"""

import hashlib
import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedsa_secure
from fedsa_secure.errors import BudgetExceededError, CheckpointError
from fedsa_secure.federation.aggregation import Contribution
from fedsa_secure.federation.checkpoint import StateStore
from fedsa_secure.federation.masked_vector import MaskedVector
from fedsa_secure.federation.release import Release
from fedsa_secure.federation.run_folder import RunFolder, RunSummary
from fedsa_secure.federation.uploads import UploadStore
from fedsa_secure.privacy import (
    DataSetLedger,
    Event,
    Ledger,
    LedgerEvent,
    TurnSecret,
    certified_epsilon,
    spent,
)
from fedsa_secure.privacy.ledger import read_ledger
from fedsa_secure.runtimes.simulation import Simulation
from fedsa_secure.types import Role

MakeFederation = Callable[..., Any]
PRIVATE = {
    "dp_epsilon": 8.0,
    "dp_noise_multiplier": 1.0,
    "dp_dataset_id": "pool",
    "rounds": 3,
    "local_steps": 2,
    "personal_steps": 2,
    "cross_rows": 0,
}


class Crash(BaseException):
    """The process ends here; nothing catches it."""


class Machine:
    """A federation whose runs can end at any call, and everything that they ever sent.

    Args:
        made: the federation.
        patch: undone at the end of the test.
    """

    def __init__(self, made: Any, patch: pytest.MonkeyPatch) -> None:
        self.made, self.patch = made, patch
        self.home = made.folder / "home"
        self.sent: list[tuple[int, int, str]] = []
        self.calls: Counter[str] = Counter()
        self.crash: tuple[str, int] | None = None
        write = MaskedVector.write

        def spy(
            vector: MaskedVector, each: Contribution, number: int, bound: float, out: np.ndarray
        ) -> None:
            content = each.update.numpy().tobytes() + each.rounding_key
            self.sent.append((each.client, number, hashlib.sha256(content).hexdigest()))
            write(vector, each, number, bound, out)

        patch.setattr(MaskedVector, "write", spy)
        for owner, name in POINTS.values():
            self._watch(owner, name)

    def _watch(self, owner: type, name: str) -> None:
        original = owner.__dict__[name]
        point = f"{owner.__name__}.{name}"

        def watched(*arguments: Any, **options: Any) -> Any:
            self.calls[point] += 1
            if self.crash == (f"before {point}", self.calls[point]):
                raise Crash
            result = original(*arguments, **options)
            if self.crash == (f"after {point}", self.calls[point]):
                raise Crash
            return result

        self.patch.setattr(owner, name, watched)

    def begin(self, name: str, **options: Any) -> RunSummary:
        """A new run, which may crash."""
        options = {"dp_home": str(self.home)} | options
        config = self.made.config.replace(output_dir=str(self.made.folder / name), **options)
        return self._run(
            Simulation(config, self.made.model, self.made.data, RunFolder.create(config))
        )

    def resume(self, name: str) -> RunSummary:
        """Go on with it."""
        folder, config = RunFolder.open(self.made.folder / name)
        simulation = Simulation(config, self.made.model, self.made.data, folder)
        simulation.restore()
        return self._run(simulation)

    def _run(self, simulation: Simulation) -> RunSummary:
        with closing(simulation):  # the locks of a process that ends are free
            return simulation.run()

    def events(self, name: str) -> list[LedgerEvent]:
        """Of the run's own ledger."""
        path = self.made.folder / name / "ledger.jsonl"
        return read_ledger(path) if path.exists() else []

    def lifetime(self, client: int) -> list[LedgerEvent]:
        """Of the ledger of a client's data set."""
        found = list(self.home.glob(f"ledgers/pool-client-{client}-*.jsonl"))
        return read_ledger(found[0]) if found else []


POINTS: dict[str, tuple[type, str]] = {
    "store": (UploadStore, "put"),
    "silo": (DataSetLedger, "append"),
    "run": (Ledger, "append"),
    "keep": (StateStore, "put"),
    "commit": (StateStore, "commit"),
    "forget": (UploadStore, "forget"),
    "result": (RunFolder, "write_summary"),
}


def check_counted(machine: Machine, name: str) -> None:
    """Every upload that was sent is counted in both ledgers, and stayed one and the same."""
    events = machine.events(name)
    by_turn = {(event.client, event.round): event for event in events}
    assert len(by_turn) == len(events)  # one event, and so one noise, a turn
    assert len({event.id for event in events}) == len(events)
    for client, number, digest in machine.sent:
        assert by_turn[client, number].upload == digest
    for client in {event.client for event in events}:
        own = [event for event in events if event.client == client]
        whole = machine.lifetime(client)
        assert [event for event in whole if event.run == name][: len(own)] == own
        assert len({event.id for event in whole}) == len(whole)


@pytest.fixture(scope="module")
def four(federation: MakeFederation) -> Any:
    """Four clients, two of them in a stack."""
    return federation(**PRIVATE, clients_per_pass=2)


@pytest.mark.parametrize("call", [pytest.param(1, marks=pytest.mark.slow), 6])
@pytest.mark.parametrize(
    "point",
    [
        "before UploadStore.put",
        "after UploadStore.put",  # and before the silo's ledger
        "after DataSetLedger.append",  # and before the run's
        "after Ledger.append",  # of the silo by odd, of the run by even calls
        "after StateStore.put",  # counted, and not sent
    ],
)
def test_a_crash_between_storing_counting_and_sending(
    four: Any, monkeypatch: pytest.MonkeyPatch, point: str, call: int
) -> None:
    check_crash(four, monkeypatch, point, call)


@pytest.mark.parametrize("call", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    "point",
    [
        "before StateStore.commit",
        "after StateStore.commit",
        "after UploadStore.forget",
    ],
)
def test_a_crash_around_a_checkpoint(
    four: Any, monkeypatch: pytest.MonkeyPatch, point: str, call: int
) -> None:
    check_crash(four, monkeypatch, point, call)


def test_a_crash_before_the_result(four: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_crash(four, monkeypatch, "before RunFolder.write_summary", 1)


def check_crash(four: Any, monkeypatch: pytest.MonkeyPatch, point: str, call: int) -> None:
    machine = Machine(replace(four, folder=four.folder / f"{point} {call}"), monkeypatch)
    machine.crash = (point, call)
    with pytest.raises(Crash):
        machine.begin("run", rounds=2)
    check_counted(machine, "run")
    stored = {
        path.name: path.read_bytes()
        for path in (machine.made.folder / "run" / "uploads").glob("*.safetensors")
    }
    before, machine.crash = list(machine.sent), None
    summary = machine.resume("run")
    check_counted(machine, "run")
    assert len(machine.events("run")) == 2 * 4
    assert len({turn[:2] for turn in machine.sent}) == 2 * 4
    assert {turn for turn in machine.sent if turn[:2] in {t[:2] for t in before}} == set(before)
    for name, content in stored.items():  # what was stored is what was sent
        client, number = name.removesuffix(".safetensors").split("-")[1:]
        event = next(e for e in machine.events("run") if name == _stored_name(e))
        assert (event.client, event.round) == (int(client), int(number[1:]))
        assert event.upload.encode() in content
    step = Event(steps=4, sampling_rate=0.25, noise_multiplier=1.0)
    assert summary.privacy.epsilon == pytest.approx(certified_epsilon([step], 1e-5))
    assert not list((machine.made.folder / "run" / "uploads").iterdir())


def _stored_name(event: LedgerEvent) -> str:
    return f"client-{event.client:05d}-r{event.round}.safetensors"


def client_ledgers(home: Path) -> dict[str, list[LedgerEvent]]:
    """Everything that a silo has counted, by data set."""
    events = [event for path in home.glob("ledgers/*.jsonl") for event in read_ledger(path)]
    return {
        name: [event for event in events if event.data_set == name]
        for name in {event.data_set for event in events}
    }


def budget(rounds: int) -> float:
    """A lifetime ε that pays for this many rounds and not for one more."""
    step = Event(steps=2 * rounds, sampling_rate=0.25, noise_multiplier=1.0)
    return certified_epsilon([step], 1e-5) * 1.001


def test_a_second_run_spends_from_the_same_budget(
    four: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(replace(four, folder=four.folder / "second"), monkeypatch)
    first = machine.begin("first", rounds=2, dp_lifetime_epsilon=budget(3))
    assert max(first.privacy.lifetime.values()) == pytest.approx(budget(2), rel=2e-3)
    machine.sent.clear()
    with pytest.raises(BudgetExceededError, match=r"'pool/client-0': has spent epsilon"):
        machine.begin("second", rounds=2, dp_lifetime_epsilon=budget(3))
    check_counted(machine, "second")
    for client in range(4):
        events = machine.lifetime(client)
        assert [event.run for event in events] == ["first", "first", "second"]
        assert spent(events, 1e-5) <= budget(3)
    summary = RunFolder(machine.made.folder / "second").read_summary()
    assert "lifetime budget" in summary.privacy.stopped
    assert not list((machine.made.folder / "second" / "uploads").iterdir())
    assert summary.privacy.epsilon == pytest.approx(budget(1), rel=2e-3)
    assert max(summary.privacy.lifetime.values()) == pytest.approx(budget(3), rel=2e-3)
    # Another data set, or another home, has a budget of its own.
    machine.begin("other", rounds=1, dp_lifetime_epsilon=budget(1), dp_dataset_id="other")


def test_a_run_that_stops_early_keeps_its_last_good_model(
    four: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise the one that a run planned for that many rounds ends with, personal part aside."""
    machine = Machine(replace(four, folder=four.folder / "stopped"), monkeypatch)
    options = {"schedule": "constant", "personal_steps": 0}
    machine.patch.setattr(Release, "_secret", same_secret)
    machine.begin("whole", rounds=1, dp_home=str(four.folder / "elsewhere"), **options)
    with pytest.raises(BudgetExceededError):
        machine.begin("run", rounds=2, dp_lifetime_epsilon=budget(1), **options)
    whole, stopped = (
        Simulation(config, four.model, four.data, folder)
        for folder, config in (
            RunFolder.open(machine.made.folder / name) for name in ("whole", "run")
        )
    )
    for simulation in (whole, stopped):
        simulation.restore()
    for client in range(4):
        expected, found = whole.client_tensors(client), stopped.client_tensors(client)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def same_secret(self: Release, client: int, round_number: int) -> TurnSecret:
    """Noise that can be had twice, but that counts as if it were secret."""
    seed = bytes([client, round_number]).ljust(32, b"\0")
    return TurnSecret(seed, private=True)


def test_a_client_whose_data_set_can_pay_no_more_stops_the_round_before_it_begins(
    four: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other client spends anything for a round that cannot be finished."""
    machine = Machine(replace(four, folder=four.folder / "one"), monkeypatch)
    machine.begin("first", rounds=1)
    [path] = machine.home.glob("ledgers/pool-client-3-*.jsonl")
    for client in range(3):
        [other] = machine.home.glob(f"ledgers/pool-client-{client}-*.jsonl")
        other.unlink()
    assert path.read_text()
    with pytest.raises(BudgetExceededError, match="pool/client-3"):
        machine.begin("second", rounds=2, dp_lifetime_epsilon=budget(1))
    assert machine.events("second") == []
    assert [machine.lifetime(client) for client in range(3)] == [[]] * 3


def test_a_data_set_is_spent_from_by_one_run_at_a_time(
    four: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(replace(four, folder=four.folder / "two"), monkeypatch)
    machine.home.mkdir(parents=True)
    with closing(DataSetLedger.open(machine.home, "pool/client-1")):
        with pytest.raises(CheckpointError, match=r"pool-client-1-\w+\.jsonl is in use"):
            machine.begin("run", rounds=1)
        assert not machine.sent
    machine.resume("run")
    check_counted(machine, "run")
    assert len(machine.events("run")) == 4


def api_options(
    tiny_bert: Any, tiny_tokenizer: Any, small_dataset: Any, place: Path
) -> dict[str, Any]:
    """A private run through the public interface: a model folder and a csv file."""
    tiny_bert().save_pretrained(place / "model")
    tiny_tokenizer.save_pretrained(place / "model")
    small_dataset(rows=150).to_csv(place / "rows.csv", index=False)
    return {
        "model": str(place / "model"),
        "dataset": str(place / "rows.csv"),
        "label_names": ["0", "1", "2"],
        "target_modules": ["query"],
        "clients": 5,
        "partition": "iid",
        "participation": 0.8,
        "rounds": 4,
        "local_steps": 2,
        "batch_size": 8,
        "max_length": 16,
        "clients_per_pass": 2,
        "common_rows": 0,
        "cross_rows": 0,
        "dp_epsilon": 8.0,
        "dp_dataset_id": "pool",
        "dp_noise_multiplier": 2.0,
        "personal_steps": 4,
    }


@pytest.fixture
def options(
    tiny_bert: Any, tiny_tokenizer: Any, small_dataset: Any, tmp_path: Path
) -> dict[str, Any]:
    return api_options(tiny_bert, tiny_tokenizer, small_dataset, tmp_path)


def test_an_exhausted_run_can_be_loaded(options: dict[str, Any], tmp_path: Path) -> None:
    step = Event(steps=4, sampling_rate=0.25, noise_multiplier=2.0)
    limit = certified_epsilon([step], 1e-5) * 1.001
    options |= {"participation": 1.0, "dp_lifetime_epsilon": limit, "dp_home": str(tmp_path / "h")}
    place = tmp_path / "run"
    with pytest.raises(BudgetExceededError, match="lifetime budget"):
        fedsa_secure.train(**options, output_dir=str(place))
    run = fedsa_secure.load(place)
    assert len(run.history) == 2
    assert run.epsilon <= limit
    assert "lifetime budget" in run.privacy.stopped
    assert len(run.clients[0].predict(["w1 w4", "w2"])) == 2
    for client in range(5):
        assert (place / f"adapters/client-{client:05d}/adapter_model.safetensors").exists()
    assert all(name in run.client_tensors(0) for name in run._model.names([Role.B, Role.HEAD]))
    again = fedsa_secure.resume(place)  # it is finished: nothing more is spent
    assert again.privacy == run.privacy
    # Nothing left at all: nothing is spent, there is no model, and it is said again on resume.
    with pytest.raises(BudgetExceededError, match="has spent epsilon"):
        fedsa_secure.train(**options, output_dir=str(tmp_path / "late"))
    with pytest.raises(CheckpointError, match="not finished"):
        fedsa_secure.load(tmp_path / "late")
    with pytest.raises(BudgetExceededError, match="has spent epsilon"):
        fedsa_secure.resume(tmp_path / "late")
    for events in client_ledgers(tmp_path / "h").values():
        assert [event.run for event in events] == ["run", "run"]
    assert not list((tmp_path / "late" / "uploads").glob("*"))


def test_killed_at_any_instant(zygote: Any, options: dict[str, Any], tmp_path: Path) -> None:
    check_kills(zygote, options, tmp_path, runs=1, kills=4)


@pytest.mark.slow
def test_killed_sixty_times(zygote: Any, options: dict[str, Any], tmp_path: Path) -> None:
    check_kills(zygote, options, tmp_path, runs=15, kills=4)


def check_kills(zygote: Any, options: dict[str, Any], place: Path, runs: int, kills: int) -> None:
    """Runs that are killed and resumed some times each, all on one data set."""
    home = place / "kills"
    options = options | {"dp_home": str(home)}
    status, seconds = zygote.call("train", output_dir=str(place / "whole"), **options)
    assert status == 0
    stream, killed = random.Random(), 0
    for trial in range(runs):
        folder, note = place / f"trial{trial}", str(place / f"sent{trial}")
        for _ in range(kills):
            begun = (folder / "split.key").exists()
            call = ("resume", {"path": str(folder)}) if begun else ("train", _new(options, folder))
            delay = stream.uniform(0.1, 0.8) * seconds
            status, _ = zygote.call(call[0], delay, sent=note, **call[1])
            killed += status == -signal.SIGKILL
            check_ledgers(home, folder, Path(note))
        begun = (folder / "split.key").exists()
        call = ("resume", {"path": str(folder)}) if begun else ("train", _new(options, folder))
        status, _ = zygote.call(call[0], sent=note, **call[1])
        assert status == 0
        check_ledgers(home, folder, Path(note))
        run = fedsa_secure.load(folder)
        assert len(run.history) == 4
        assert run.epsilon <= 8.0
    assert killed > 0
    every = [event for events in client_ledgers(home).values() for event in events]
    assert len({event.id for event in every}) == len(every)


def _new(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Begin again; what a kill left before there was anything to resume is in nobody's way."""
    shutil.rmtree(folder, ignore_errors=True)
    return {**options, "output_dir": str(folder)}


def check_ledgers(home: Path, folder: Path, note: Path) -> None:
    """Whatever was sent is counted under its digest, in both ledgers, and nothing twice."""
    path = folder / "ledger.jsonl"
    events = read_ledger(path) if path.exists() else []
    by_turn = {(event.client, event.round): event for event in events}
    assert len(by_turn) == len(events) == len({event.id for event in events})
    lines = note.read_text().splitlines() if note.exists() else []
    for client, number, digest in map(json.loads, lines):
        assert by_turn[client, number].upload == digest
    counted = {event.id: event for own in client_ledgers(home).values() for event in own}
    assert all(counted[event.id] == event for event in events)
