"""Ledgers: nothing acknowledged is lost, nothing damaged is read over, nothing overspent."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import stat
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedsa_secure.errors import BudgetExceededError, CheckpointError, ConfigError, PrivacyError
from fedsa_secure.privacy.accounting import Event, certified_epsilon
from fedsa_secure.privacy.ledger import (
    DataSetLedger,
    Ledger,
    LedgerEvent,
    home_folder,
    ledger_name,
    read_ledger,
    require_budget,
    spent,
)


def event(number: int, **changes: object) -> LedgerEvent:
    standard: dict[str, object] = {
        "id": f"{number:016x}",
        "run": "run-1",
        "data_set": "wards",
        "client": 0,
        "round": number,
        "steps": 2,
        "sampling_rate": 0.25,
        "noise_multiplier": 1.1,
        "clip_norm": 0.1,
        "upload": hashlib.sha256(b"%d" % number).hexdigest(),
    }
    return LedgerEvent.model_validate({**standard, **changes})


def skellam(number: int, **changes: object) -> LedgerEvent:
    grid = {"variance": 9.0, "sensitivity_l1": 30.0, "sensitivity_l2": 4.0}
    whole = {"mechanism": "skellam", "sampling_rate": 1.0, "steps": 1}
    return event(number, **{**whole, **grid, **changes})


def test_events_come_back_as_they_were(tmp_path: Path) -> None:
    events = [event(0, noise_multiplier=0.1 + 0.2), skellam(1), event(2, private=False)]
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(events[:1])
    ledger.append(events[1:])
    assert ledger.events() == events
    assert read_ledger(ledger.path) == events
    ledger.close()
    assert Ledger(ledger.path).events() == events
    lines = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    assert [line["id"] for line in lines] == [e.id for e in events]


def test_an_event_is_written_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append([event(0), event(1), event(0)])
    before = ledger.path.read_bytes()
    ledger.append([event(1), event(0)])
    ledger.append([])
    assert ledger.path.read_bytes() == before
    ledger.append([event(1), event(2)])
    assert ledger.path.read_bytes().startswith(before)
    assert ledger.events() == [event(0), event(1), event(2)]


def test_one_noise_block_for_two_events_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append([event(0)])
    before = ledger.path.read_bytes()
    for other in ({"upload": "f" * 64}, {"round": 9}, {"noise_multiplier": 5.0}):
        with pytest.raises(PrivacyError, match="0000000000000000.*draw new noise"):
            ledger.append([event(1), event(0, **other)])
    assert ledger.path.read_bytes() == before


@pytest.mark.parametrize("kept", [1, 40, -2, -1])
def test_an_unfinished_last_line_is_cut_off(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append([event(0)])
    whole = path.read_bytes()
    ledger.append([event(1)])
    ledger.close()
    path.write_bytes(whole + path.read_bytes()[len(whole) :][:kept])
    assert read_ledger(path) == [event(0)]
    again = Ledger(path)
    assert path.read_bytes() == whole
    again.append([event(1), event(2)])
    again.close()
    assert read_ledger(path) == [event(0), event(1), event(2)]


def test_a_failed_append_leaves_nothing_that_the_next_one_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append([event(0)])

    def disk_is_full(path: Path, line: str) -> int:
        with open(path, "ab") as file:
            file.write(line.encode()[:30])
        raise CheckpointError("no space")

    with monkeypatch.context() as patch:
        patch.setattr("fedsa_secure.privacy.ledger.append_line", disk_is_full)
        with pytest.raises(CheckpointError, match="no space"):
            ledger.append([event(1)])
    assert ledger.events() == [event(0)]
    ledger.append([event(2)])
    assert read_ledger(ledger.path) == [event(0), event(2)]


@pytest.mark.parametrize("line", [0, 1, 2])
@pytest.mark.parametrize("damage", ["cut", "garbage", "number", "empty"])
def test_a_damaged_line_is_named(tmp_path: Path, line: int, damage: str) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append([event(0), event(1), event(2)])
    ledger.close()
    lines = path.read_bytes().splitlines()
    lines[line] = {
        "cut": lines[line][:-5],
        "garbage": b"\xff\x00" + lines[line],
        "number": lines[line].replace(b'"steps":2', b'"steps":-2'),
        "empty": b"",
    }[damage]
    path.write_bytes(b"\n".join(lines) + b"\n")
    damaged = path.read_bytes()
    for opened in (Ledger, read_ledger):
        with pytest.raises(CheckpointError, match=rf"ledger\.jsonl: line {line + 1} is damaged"):
            opened(path)
    assert path.read_bytes() == damaged


def test_one_id_with_two_contents_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text("".join(event(0, steps=k).model_dump_json() + "\n" for k in (1, 2)))
    with pytest.raises(CheckpointError, match="line 2 is damaged"):
        Ledger(path)


def test_lines_that_vanish_are_noticed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append([event(0), event(1)])
    os.truncate(ledger.path, 10)
    with pytest.raises(CheckpointError, match="lost events"):
        ledger.append([event(2)])
    ledger.path.unlink()
    with pytest.raises(CheckpointError, match="cannot write"):
        ledger.append([event(2)])


# Forked, because a new interpreter takes seconds to import the accountants.
FORKED = multiprocessing.get_context("fork")


def open_elsewhere(home: Path, answers: Connection) -> None:
    try:
        DataSetLedger.open(home, "wards")
    except CheckpointError as error:
        answers.send(str(error))
    else:
        answers.send("opened")


def test_two_processes_cannot_spend_the_same_budget(tmp_path: Path) -> None:
    def other() -> str:
        receive, send = FORKED.Pipe(duplex=False)
        process = FORKED.Process(target=open_elsewhere, args=(tmp_path, send))
        process.start()
        answer = receive.recv()
        process.join()
        return str(answer)

    ledger = DataSetLedger.open(tmp_path, "wards")
    assert "is in use by another run" in other()
    with pytest.raises(CheckpointError, match="in use"):
        DataSetLedger.open(tmp_path, "wards")
    DataSetLedger.open(tmp_path, "other").close()
    ledger.close()
    assert other() == "opened"


def append_for_ever(path: Path, acknowledge: Connection) -> None:
    ledger = Ledger(path)
    number = len(ledger.events())
    while True:
        ledger.append([event(number), event(number + 1)])
        number += 2
        acknowledge.send(number)


def test_a_kill_loses_nothing_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for waited_for in (1, 5, 17):
        receive, send = FORKED.Pipe(duplex=False)
        process = FORKED.Process(target=append_for_ever, args=(path, send))
        process.start()
        send.close()
        acknowledged = [receive.recv() for _ in range(waited_for)]
        process.kill()
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                acknowledged.append(receive.recv())
        ledger = Ledger(path)
        assert len(ledger.events()) >= acknowledged[-1]
        assert ledger.events() == [event(k) for k in range(len(ledger.events()))]
        ledger.close()


@pytest.mark.parametrize("option", ["deep/er", None])
def test_only_the_owner_reads_a_silos_ledgers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str | None
) -> None:
    monkeypatch.setenv("FEDSA_SECURE_HOME", str(tmp_path / "home"))
    home = home_folder(str(tmp_path / option) if option else None)
    ledger = DataSetLedger.open(home, "wards")
    ledger.append([event(0)])
    assert home == tmp_path / (option or "home")
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE(ledger.path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600


def test_the_home_folder_without_option_and_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSA_SECURE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert home_folder(None) == Path("/home/someone/.fedsa_secure")


def test_a_home_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        DataSetLedger.open(tmp_path / "file" / "home", "wards")


@given(st.text(min_size=1), st.text(min_size=1))
def test_any_id_makes_a_safe_name_of_its_own(one: str, other: str) -> None:
    name = ledger_name(one)
    assert all(c.isascii() and (c.isalnum() or c in "-.") for c in name)
    assert name[0].isalnum()
    assert len(name) < 90
    assert (name.lower() == ledger_name(other).lower()) == (one == other)


@pytest.mark.parametrize("data_set", ["../../etc/passwd", "a/b", "..", "\0", "ward 7 – Köln", "A"])
def test_a_ledger_stays_in_its_folder(tmp_path: Path, data_set: str) -> None:
    ledger = DataSetLedger.open(tmp_path, data_set)
    assert ledger.path.parent == tmp_path / "ledgers"
    assert list((tmp_path / "ledgers").iterdir()) == [ledger.path]


def test_a_data_set_has_a_name_and_only_its_own_events(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dp_dataset_id"):
        DataSetLedger.open(tmp_path, " ")
    ledger = DataSetLedger.open(tmp_path, "wards")
    with pytest.raises(PrivacyError, match="wards.*other"):
        ledger.append([event(0), event(1, data_set="other")])
    assert ledger.events() == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": "not hex!"},
        {"upload": "ab"},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": float("inf")},
        {"steps": 0},
        {"mechanism": "skellam"},
        {"variance": 4.0},
        {"surprise": 1},
    ],
)
def test_an_impossible_event_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        event(0, **wrong)


def test_what_is_not_private_is_kept_and_counts_nothing() -> None:
    events = [event(0, private=False), event(1, private=False, noise_multiplier=0.0)]
    assert [e.event for e in events] == [None, None]
    assert spent(events, 1e-5) == 0.0
    private = Event(steps=2, sampling_rate=0.25, noise_multiplier=1.1)
    assert spent([*events, event(2)], 1e-5) == certified_epsilon([private], 1e-5)


def test_two_mechanisms_share_delta_and_add_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[tuple[float, float, float]], float]] = []

    def of_skellam(rounds: list[tuple[float, float, float]], delta: float) -> float:
        asked.append((list(rounds), delta))
        return 0.75

    monkeypatch.setattr("fedsa_secure.privacy.ledger.skellam_epsilon_of", of_skellam)
    gaussian = certified_epsilon([Event(steps=2, sampling_rate=0.25, noise_multiplier=1.1)], 5e-6)
    events = [event(0), skellam(1), skellam(2, steps=2), skellam(3, private=False)]
    assert spent(events, 1e-5) == gaussian + 0.75
    assert spent(events[1:], 1e-5) == 0.75
    one = (9.0, 30.0, 4.0)
    assert asked == [([one] * 3, 5e-6), ([one] * 3, 1e-5)]


def test_a_budget_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    ledger = DataSetLedger.open(tmp_path, "wards")
    ledger.append([event(0)])
    before = ledger.path.read_bytes()
    past = spent([event(0)], 1e-5)
    planned = [event(1), Event(steps=6, sampling_rate=0.25, noise_multiplier=1.1)]
    both = spent([event(0), *planned], 1e-5)
    assert past < both
    assert require_budget(ledger, planned, 1e-5, both) == both
    assert require_budget(ledger, planned, 1e-5, None) == both
    with pytest.raises(BudgetExceededError) as refused:
        require_budget(ledger, planned, 1e-5, both - 1e-3)
    for part in ("'wards'", f"{past:.4g}", f"{spent(planned, 1e-5):.4g}", f"{both - 1e-3:g}"):
        assert part in str(refused.value)
    assert ledger.path.read_bytes() == before


def test_what_is_planned_and_written_counts_once(tmp_path: Path) -> None:
    """A run that goes on after a crash plans again what the ledger has already."""
    ledger = DataSetLedger.open(tmp_path, "wards")
    ledger.append([event(0), event(1)])
    assert require_budget(ledger, [event(1), event(2)], 1e-5, None) == spent(
        [event(0), event(1), event(2)], 1e-5
    )
