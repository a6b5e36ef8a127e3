"""``benchmarks/kernels/measure.py``: nothing that was measured is lost, and losses are named."""

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedsa_kernels.bench import Ceilings, Plan, Shape, measure
from fedsa_kernels.bench.timing import Times
from fedsa_kernels.launch import interpreted
from fedsa_kernels.tables import Table
from fedsa_secure.bench import kernels as bench_kernels
from fedsa_secure.bench.training_steps import DRY

pytestmark = pytest.mark.skipif(interpreted(), reason="no kernel is run here")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "kernels" / "measure.py"
    spec = importlib.util.spec_from_file_location("measure", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_measurement_that_was_cut_short_goes_on(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shapes = tuple(Shape(19, 11, 24, rank, dtype="float32") for rank in (3, 4, 5))
    monkeypatch.setattr(bench_kernels, "plan_for", lambda _: Plan(shapes, shapes[:1], 2, 0))
    timed, sound = [], measure.time_orders

    def cut_short(shape: Shape, *others: Any) -> list[measure.Timing]:
        timed.append(shape)
        if len(timed) == 2:
            raise KeyboardInterrupt
        return sound(shape, *others)

    monkeypatch.setattr(measure, "time_orders", cut_short)
    monkeypatch.setattr(sys, "argv", ["measure.py", "--out", str(tmp_path), "--resume"])
    with pytest.raises(KeyboardInterrupt):
        script.main()
    script.main()
    assert timed == [shapes[0], shapes[1], shapes[1], shapes[2]]
    script.main()
    assert len(timed) == 4
    rows = script.read_rows(tmp_path / "kernels.csv")
    assert [r["order"] for r in rows] == ["frozen", "peft", "base first", "reference"] * 3
    assert list(script.by_layer(rows)) == [str(shape) for shape in shapes]
    steps = script.read_rows(tmp_path / "kernels_steps.csv")
    assert [r["name"].split(": ")[0] for r in steps] == [str(w) for w in DRY for _ in range(2)]
    printed = capsys.readouterr().out
    assert all(f"{shape}: reference" in printed for shape in shapes)
    monkeypatch.setattr(sys, "argv", ["measure.py", "--out", str(tmp_path), "--only", "r=4"])
    script.main()
    assert timed[4:] == [shapes[1]]
    first = rows[:2]  # as if it had been cut short between two orders of the first shape
    (tmp_path / "kernels.csv").unlink()
    for row in first:
        script.append_row(tmp_path / "kernels.csv", row)
    monkeypatch.setattr(sys, "argv", ["measure.py", "--out", str(tmp_path), "--resume"])
    script.main()
    assert timed[5:] == list(shapes)
    assert len(script.read_rows(tmp_path / "kernels_steps.csv")) == len(steps)


def test_rows_fit_the_file_that_is_committed(script: ModuleType) -> None:
    """They are appended to it: another column would shift all others."""
    shape, top = Shape(19, 11, 24, 3, dtype="float32"), Ceilings(1e12, 1e11, 1e-6)
    timings = [
        measure.Timing(shape, name, Times(1.0, 2.0, 3.0), 0.5) for name in ("frozen", "peft")
    ]
    findings = measure.Findings("any", [], {"float32": top}, timings, Table())
    around = script.environment() | {"triton": ""}
    with open(script.RESULTS / "kernels.csv", newline="") as file:
        header = next(csv.reader(file))
    rows = [row | around for row in script.rows(findings)]
    assert [list(row) for row in rows] == [header] * 2
    assert {script.layer_of({k: str(v) for k, v in row.items()}) for row in rows} == {str(shape)}


def test_a_layer_on_which_plain_torch_wins_is_named(script: ModuleType) -> None:
    wide, small = Shape(64, 64, 512), Shape(16, 16, 8, clients=2)

    def row(shape: Shape, order: str, taken: float, of_plain: float) -> dict[str, str]:
        sizes = {name: str(value) for name, value in vars(shape).items()}
        return sizes | {
            "order": order,
            "p50_us": str(taken),
            "of_frozen": str(taken / 10),
            "of_best_plain": str(of_plain),
            "best_plain": "base first",
        }

    found = [row(wide, "fused", 15, 0.75), row(wide, "cublas", 18, 0.9)]
    found += [row(small, "fused", 30, 1.5), row(small, "cublas", 22, 1.1)]
    assert script.verdict(found).splitlines() == [
        f"{wide}: fused 1.50 of frozen, 0.75 of base first",
        f"{small}: cublas 2.20 of frozen, 1.10 of base first",
        "plain torch is faster on 1 of 2:",
        f"  {small}: base first",
    ]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--only", "no such layer", "--out", "FOLDER"], "'no such layer' is in no name of"),
        (["--out", "FILE"], "is no folder"),
        (["--out", "RESULTS"], "name a folder of their own"),
        (["--resume", "--out", "FOLDER"], "needs to know the commit"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_measured(
    script: ModuleType,
    given: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    (tmp_path / "file").touch()
    places = {
        "FOLDER": str(tmp_path),
        "FILE": str(tmp_path / "file"),
        "RESULTS": str(script.RESULTS),
    }
    monkeypatch.setattr(sys, "argv", ["measure.py", *(places.get(each, each) for each in given)])
    monkeypatch.setattr(script, "interpreted", lambda: True)
    monkeypatch.setattr(script, "bench_kernels", None)
    monkeypatch.setenv("FEDSA_COMMIT", "unknown")
    with pytest.raises(SystemExit):
        script.main()
    assert named in capsys.readouterr().err
