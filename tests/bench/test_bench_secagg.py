"""The measurements run, at any size, with and without Flower, and say what they are."""

import importlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedsa_secure.bench import Row, write_rows
from fedsa_secure.bench.large import masking_memory
from fedsa_secure.bench.rounds import Cohort, OneClient, sample_vector, whole_round
from fedsa_secure.bench.timing import Task, take_turns
from fedsa_secure.cli import app
from fedsa_secure.errors import ConfigError

KEYS = ["name", "n", "value", "unit", "baseline", "ratio_to_baseline", "ratio_to_bound"]
SMALL = ["bench", "secagg", "--clients", "3,5", "--values", "10000"]


@pytest.fixture
def without_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.import_module

    def refuse(name: str, package: str | None = None) -> Any:
        if name.split(".")[0] == "flwr":
            raise ImportError(name)
        return found(name, package)

    monkeypatch.setattr(importlib, "import_module", refuse)


def written(arguments: list[str], path: Path) -> tuple[str, list[dict[str, Any]]]:
    done = CliRunner().invoke(app, [*arguments, "--json", str(path)])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split()), json.loads(path.read_bytes())


def check_ratios(rows: list[dict[str, Any]]) -> None:
    """Ratios are the value over what they are named after, of the same run and cohort."""
    values = {(row["n"], row["name"]): row["value"] for row in rows}
    for row in rows:
        assert list(row) == KEYS
        assert row["value"] > 0
        of_bound = [v for (n, name), v in values.items() if n == row["n"] and "bound: " in name]
        if row["ratio_to_bound"] is not None:
            assert len(of_bound) == 2
            assert row["ratio_to_bound"] == pytest.approx(row["value"] / sum(of_bound))
        assert (row["baseline"] is None) == (row["ratio_to_baseline"] is None)
        if row["baseline"] is not None:
            compared = values[row["n"], row["baseline"]]
            assert row["ratio_to_baseline"] == pytest.approx(row["value"] / compared)


def test_the_command_writes_its_rows_and_says_how_weak_flowers_seeds_are(tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    output, rows = written(SMALL, tmp_path / "rows.json")
    check_ratios(rows)
    assert "seed of at most 28 bits" in output
    theirs = [row["name"] for row in rows if "client masking" in row["name"]]
    assert len(theirs) == 2
    assert all("28-bit seeds" in name for name in theirs)
    compared = [row["name"] for row in rows if row["baseline"] is not None]
    assert [name.split(",")[0] for name in compared] == ["client: masking step"] * 2
    # With three clients nobody may drop out.
    dropped = Counter(row["n"] for row in rows if "1 dropped" in row["name"])
    assert dropped == {5: 2}


@pytest.mark.usefixtures("without_flower")
def test_without_flower_its_rows_are_left_out_and_a_line_says_so(tmp_path: Path) -> None:
    output, rows = written(SMALL, tmp_path / "rows.json")
    check_ratios(rows)
    assert "not installed" in output
    assert "flower" in output
    assert not any("Flower" in row["name"] or row["baseline"] for row in rows)
    assert {row["n"] for row in rows} == {3, 5}


def test_flower_is_not_imported_before_it_is_measured() -> None:
    code = "import sys, fedsa_secure.bench, fedsa_secure.cli; sys.exit('flwr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("option", "given"), [("clients", "3,x"), ("clients", "2"), ("values", "0"), ("clients", "")]
)
def test_impossible_sizes_are_refused(option: str, given: str) -> None:
    done = CliRunner().invoke(app, [*SMALL, f"--{option}", given])
    assert isinstance(done.exception, ConfigError)


def test_a_place_for_the_rows_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere" / "rows.json"):
        done = CliRunner().invoke(app, [*SMALL, "--json", str(place)])
        assert isinstance(done.exception, ConfigError)
        assert "client: masking step" not in done.output


def test_the_measured_round_gives_the_sum() -> None:
    """Every client sends the same vector, so the sum's mean is that vector, up to one step."""
    cohort, vector = Cohort(5, 1000), sample_vector(1000)
    done = whole_round(cohort, vector)
    grid = cohort.grid
    mean = grid.decode(done.total, 5) / 5
    assert np.abs(mean - vector).max() <= grid.step


def test_the_measured_unmasking_takes_away_what_the_vectors_carry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From zeros it leaves minus the masks; with the masked vectors' sum that is the plain sum."""
    cohort = Cohort(5, 1000)
    plain = np.arange(1000, dtype=np.uint32)
    monkeypatch.setattr(cohort, "fill", lambda _: lambda out: np.copyto(out, plain))
    done = whole_round(cohort, sample_vector(1000))
    collected = done.collecting.total.copy()  # of all but the last
    unmasked = done.unmasking(1, 1000).close()
    assert (collected + unmasked == 4 * plain).all()
    everything = done.add().total
    assert (everything + done.unmasking(0, 1000).close() == 5 * plain).all()
    assert (done.total == 5 * plain).all()


def test_one_clients_upload_is_what_it_sends_in_a_whole_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cohort, sent = Cohort(5, 1000), Counter[int]()
    expected = OneClient(cohort, sample_vector(1000)).upload
    from fedsa_secure.bench import rounds

    read = rounds.decode_client

    def counting(data: Any, terms: Any) -> Any:
        signed = read(data, terms)
        if signed.message.client == 0:
            sent[type(signed.message).__name__] += len(data)
        return signed

    monkeypatch.setattr(rounds, "decode_client", counting)
    whole_round(cohort, sample_vector(1000))
    assert len(sent) == 5
    assert sum(sent.values()) == expected


def test_tasks_take_turns_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []
    tasks = {name: Task(lambda _, name=name: order.append(name)) for name in "ab"}
    take_turns(tasks, 3)
    assert order == ["a", "b"] * 4


def test_rows_are_written_as_they_are(tmp_path: Path) -> None:
    row = Row(name="x", n=3, value=1.5, unit="s", baseline="y", ratio_to_baseline=0.5)
    write_rows(tmp_path / "rows.json", [row])
    assert json.loads((tmp_path / "rows.json").read_bytes()) == [
        dict(zip(KEYS, ["x", 3, 1.5, "s", "y", 0.5, None], strict=True))
    ]
    with pytest.raises(ValueError, match="finite"):
        Row(name="x", n=3, value=float("nan"), unit="s")


def test_masking_takes_little_more_memory_than_its_vectors() -> None:
    few, _ = masking_memory(1000, 10)
    many, _ = masking_memory(4_000_000, 10)
    assert (many - few) / (4 * 4_000_000) < 2.5
