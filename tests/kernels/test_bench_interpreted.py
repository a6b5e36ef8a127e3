"""A dry run of what a GPU would do: check, tune, time, and a table that the dispatcher reads."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsa_kernels.bench import Plan, Shape, WrongResultError, measure, other_checks, plan_for, run
from fedsa_kernels.bench.checks import compared
from fedsa_kernels.bench.inputs import Inputs
from fedsa_kernels.bench.shapes import ragged
from fedsa_kernels.launch import Tile, interpreted
from fedsa_kernels.lora_linear import triton
from fedsa_kernels.tables import BACKENDS, Table, read_table
from fedsa_kernels.tiles import default_tiles

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")


CPU = torch.device("cpu")
SMALL = Shape(48, 32, 36, 4, dtype="float16")
THREE = Shape(48, 3 * 32, 36, 3 * 4, op="lora_linears", dtype="float16")


def test_a_dry_run_checks_tunes_and_times_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(CPU)
    plan = replace(plan, shapes=plan.shapes[1:], checked=plan.checked[1:], turns=2)
    kept = []
    findings = run(plan, CPU, tmp_path / "table.json", lambda _: None, 11, kept.append)
    assert all(check.passed for check in findings.checks)
    assert {check.order for check in findings.checks} >= {"reference", "cublas", "fused", "peft"}
    assert {check.shape for check in findings.checks} >= set(map(ragged, plan.shapes))
    assert [t for part in kept for t in part.timings] == findings.timings
    assert findings.table.rows == Table.read(tmp_path / "table.json").rows
    for shape in plan.shapes:
        timed = {t.order: t.times.p50 for t in findings.timings if t.shape == shape}
        assert set(timed) >= {"frozen", "peft", "reference", "cublas", "fused"}
        ours = {name: timed[name] for name in (*BACKENDS, "apart") if name in timed}
        (row,) = (row for row in findings.table.rows if row.problem == shape.problem)
        assert row.fastest == min(ours, key=ours.get)


def spoil(monkeypatch: pytest.MonkeyPatch, bad: set[Tile]) -> None:
    """Kernels whose numbers are wrong at certain tiles."""
    sound = triton.forward

    def forward(*operands: Any) -> tuple[torch.Tensor, torch.Tensor]:
        y, xa = sound(*operands)
        *_, tiles, fused = operands
        return (y * 1.1 if fused and tiles.fused in bad else y), xa

    monkeypatch.setattr(triton, "forward", forward)


@pytest.mark.parametrize("also_default", [False, True])
def test_tuned_tiles_that_give_wrong_numbers_do_not_get_into_the_table(
    also_default: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = default_tiles(SMALL.torch_dtype, SMALL.rank)
    quick = replace(default, fused=replace(default.fused, n=16))
    spoil(monkeypatch, {quick.fused, *([default.fused] if also_default else [])})
    monkeypatch.setattr(measure, "_tuned", lambda *_: quick)
    told: list[str] = []
    plan = Plan((SMALL,), (), 2, 2)
    if also_default:
        with pytest.raises(WrongResultError, match=re.escape(f"fused on {SMALL}")):
            run(plan, CPU, tmp_path / "table.json", told.append, 3)
        assert not (tmp_path / "table.json").exists()
        return
    findings = run(plan, CPU, tmp_path / "table.json", told.append, 3)
    assert findings.table.rows[0].tiles == default
    assert any("wrong with" in line and str(quick) in line for line in told)
    assert all(check.passed for check in findings.checks)


def test_layers_apart_are_timed_as_the_table_has_single_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[Shape, dict[str, str]] = {}
    sound = measure.time_orders

    def timed(shape: Shape, *others: Any) -> list[measure.Timing]:
        seen[shape] = {row.problem.op: row.fastest for row in read_table("").rows}
        return sound(shape, *others)

    monkeypatch.setattr(measure, "time_orders", timed)
    monkeypatch.setattr(measure, "_tuned", lambda shape, *_: default_tiles(torch.float16, 12))
    path = tmp_path / "table.json"
    first = run(Plan((SMALL,), (), 2, 2), CPU, path, lambda _: None, 3).table.rows[0]
    run(Plan((THREE,), (), 2, 2), CPU, path, lambda _: None, 3)
    assert seen[THREE] == {"lora_linear": first.fastest, "lora_linears": "reference"}
    assert {row.problem for row in Table.read(path).rows} == {SMALL.problem, THREE.problem}
    assert read_table("").rows == ()


def test_what_is_not_timed_is_checked_too_and_refused_if_wrong(monkeypatch) -> None:
    found = list(other_checks.check_others(CPU, 3))
    assert all(each.passed for each in found)
    assert {(each.shape.op, each.order) for each in found} == {
        *(
            (op, f"{backend} with dropout")
            for op in ("lora_linear", "vera_linear")
            for backend in ("cublas", "fused")
        ),
        ("clipped_grad", "kernel"),
    }
    sound = other_checks.clipped_sum

    def off(*operands: Any, backend: str) -> torch.Tensor:
        return sound(*operands, backend=backend) * (1.001 if backend == "triton" else 1.0)

    monkeypatch.setattr(other_checks, "clipped_sum", off)
    wrong = [each for each in other_checks.check_others(CPU, 4) if not each.passed]
    assert {each.shape.op for each in wrong} == {"clipped_grad"}
    monkeypatch.undo()
    drawn = other_checks._dropping

    def other_mask(inputs: Inputs, keys: torch.Tensor, backend: str) -> Any:
        one = torch.arange(len(keys), dtype=torch.int32) == 7
        return drawn(inputs, keys ^ one if backend == "fused" else keys, backend)

    monkeypatch.setattr(other_checks, "_dropping", other_mask)
    wrong = [each for each in other_checks.check_others(CPU, 4) if not each.passed]
    assert {each.order for each in wrong} == {"fused with dropout"}


def test_words_of_a_device_are_those_of_the_host(monkeypatch) -> None:
    """On a CPU both are the host's; what counts is that another word is noticed."""
    masked = other_checks._masked(CPU, 3)
    expected = [each.double() for each in masked()]
    same = compared(other_checks.WORDS, "kernel", "words", masked, expected)
    assert same.passed
    assert 0 < expected[1] < other_checks.WORDS.rows  # some values are cut off
    expected[2][17] += 1
    assert not compared(other_checks.WORDS, "kernel", "words", masked, expected).passed
