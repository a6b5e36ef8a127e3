"""Which backend an op runs on, and that it says why."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsa_kernels import dispatch, tables
from fedsa_kernels.dispatch import choose, runs_kernels, together_pays
from fedsa_kernels.launch import Tile, interpreted
from fedsa_kernels.tables import Measured, Problem, Table, in_force
from fedsa_kernels.tiles import default_tiles

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PROBLEM = Problem("lora_linear", torch.bfloat16, 8192, 4096, 4096, 16, 1)
TUNED = Tile(m=32, n=16, warps=2, splits=3)


def row(fastest: str, rows: int, width: int) -> Measured:
    problem = Problem("lora_linear", torch.bfloat16, rows, width, width, 16, 1)
    tiles = default_tiles(problem.dtype, problem.rank)
    return Measured(problem, fastest, replace(tiles, frozen=TUNED, both=None))


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with a table of two shapes."""
    rows = row("cublas", 8192, 4096), row("fused", 8192, 1024)
    Table(rows).write(tmp_path / "some-gpu.json")
    monkeypatch.setattr(tables, "TABLES", tmp_path)
    monkeypatch.setattr(dispatch, "device_name", lambda device: "some-gpu")


def test_a_cpu_takes_the_reference():
    choice = choose(PROBLEM, CPU)
    assert (choice.backend, choice.reason) == ("reference", "there are no kernels for cpu")


def test_a_device_that_was_not_measured_takes_the_reference(monkeypatch):
    monkeypatch.setattr(dispatch, "device_name", lambda device: "new-gpu")
    choice = choose(PROBLEM, GPU)
    assert (choice.backend, choice.reason) == ("reference", "nothing was measured on new-gpu")


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    ("rows", "width", "backend"),
    [(8192, 4096, "cublas"), (8192, 1024, "fused"), (4096, 5120, "cublas"), (16384, 768, "fused")],
)
def test_the_nearest_measured_shape_decides(rows, width, backend):
    problem = Problem("lora_linear", torch.bfloat16, rows, width, width, 9, 1)
    choice = choose(problem, GPU)
    assert choice.backend == backend
    assert "some-gpu" in choice.reason
    assert (choice.tiles.frozen, choice.tiles.both) == (TUNED, None)


@pytest.mark.usefixtures("measured")
def test_a_measured_rank_serves_smaller_ones():
    small = replace(PROBLEM, rank=1)
    assert choose(small, GPU).backend == "cublas"
    large = Measured(replace(PROBLEM, rank=64), "fused", default_tiles(PROBLEM.dtype, 64))
    both = Table((row("cublas", 8192, 4096), large))
    with in_force(both):
        assert choose(PROBLEM, GPU).backend == "cublas"  # the nearest rank
        assert choose(replace(PROBLEM, rank=17), GPU).backend == "fused"
        assert choose(replace(PROBLEM, rank=65), GPU).backend == "reference"
    with in_force(Table((large,))):
        assert choose(PROBLEM, GPU).backend == "fused"
        assert choose(replace(PROBLEM, rows=4 * 8192), GPU).backend == "fused"


@pytest.mark.usefixtures("measured")
def test_a_table_in_force_decides_for_all_threads_and_ends(monkeypatch):
    monkeypatch.setenv("FEDSA_KERNEL_TABLE", "no such file")
    with ThreadPoolExecutor(1) as pool:
        with in_force(Table((row("fused", 8192, 4096),))):
            assert pool.submit(choose, PROBLEM, GPU).result().backend == "fused"
            with in_force(Table()):
                assert choose(PROBLEM, GPU).backend == "reference"
            assert choose(PROBLEM, GPU).backend == "fused"
            assert choose(PROBLEM, CPU).backend == "reference"
        with pytest.raises(ValueError, match="no such file"):
            choose(PROBLEM, GPU)


def test_a_table_is_read_as_it_was_written_and_holds_one_row_of_a_problem(tmp_path):
    first, other, again = row("cublas", 8, 16), row("fused", 8, 32), row("fused", 8, 16)
    table = Table().with_row(first).with_row(other).with_row(again)
    table.write(tmp_path / "folder" / "table.json")
    assert set(Table.read(tmp_path / "folder" / "table.json").rows) == {other, again}


def test_a_table_that_could_not_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    before = Table((row("cublas", 8, 16),))
    before.write(path)

    def cut_short(part: Path, text: str, **_options: str) -> None:
        part.write_bytes(text.encode()[: len(text) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", cut_short)
    with pytest.raises(OSError, match="no space"):
        before.with_row(row("fused", 8, 32)).write(path)
    assert Table.read(path).rows == before.rows


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    "other",
    [
        Problem("vera_linear", torch.bfloat16, 8192, 4096, 4096, 16, 1),
        Problem("lora_linear", torch.float32, 8192, 4096, 4096, 16, 1),
        Problem("lora_linear", torch.bfloat16, 8192, 4096, 4096, 64, 1),
        Problem("lora_linear", torch.bfloat16, 8192, 4096, 4096, 16, 8),
        Problem("lora_linear", torch.bfloat16, 64, 4096, 4096, 16, 1),
        Problem("lora_linear", torch.bfloat16, 8192, 128, 4096, 16, 1),
        Problem("lora_linear", torch.bfloat16, 8192, 4100, 4096, 16, 1),
        Problem("lora_linear", torch.bfloat16, 8192, 4096, 4100, 16, 1),
    ],
)
def test_what_is_far_from_all_that_was_measured_takes_the_reference(other):
    choice = choose(other, GPU)
    assert choice.backend == "reference"
    assert "nothing near this problem" in choice.reason


def test_many_small_clients_are_no_few_large_ones():
    """A tile of rows would be nearly empty."""
    few = replace(PROBLEM, rows=4096, clients=8)
    assert few.distance(replace(few, rows=2048, clients=4)) < 1
    assert replace(few, clients=64).distance(few) > dispatch._FAR


def test_of_two_problems_as_near_the_one_of_fewer_rows_decides():
    rows = row("fused", 8192, 1024), row("cublas", 2048, 1024)
    problem = replace(PROBLEM, rows=4096, d_in=1024, d_out=1024)
    for table in (Table(rows), Table(rows[::-1])):
        near = dispatch._nearest(problem, table)
        assert near is not None
        assert near.fastest == "cublas"


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"d_in": 14336, "d_out": 152064}, "2³¹ frozen weights"),
        ({"rows": 0}, "no rows"),
    ],
)
def test_what_kernels_cannot_work_with_takes_the_reference_even_if_they_are_asked_for(
    change, named
):
    choice = choose(replace(PROBLEM, **change), GPU, "fused")
    assert (choice.backend, choice.reason) == ("reference", f"there are no kernels for {named}")


@pytest.mark.usefixtures("measured")
def test_argument_before_environment_before_table(monkeypatch):
    monkeypatch.setenv("FEDSA_KERNELS", "fused")
    by_environment = choose(PROBLEM, GPU)
    assert (by_environment.backend, "FEDSA_KERNELS" in by_environment.reason) == ("fused", True)
    by_argument = choose(PROBLEM, GPU, "reference")
    assert (by_argument.backend, "argument" in by_argument.reason) == ("reference", True)
    assert choose(PROBLEM, GPU, "auto").backend == "cublas"


@pytest.mark.parametrize("source", ["argument", "FEDSA_KERNELS"])
def test_an_unknown_backend_is_refused_by_name(source, monkeypatch):
    monkeypatch.setenv("FEDSA_KERNELS", "cudnn")
    with pytest.raises(ValueError, match=rf"{source}.*'cudnn'.*reference, cublas, fused and auto"):
        choose(PROBLEM, CPU, "cudnn" if source == "argument" else None)


@pytest.mark.skipif(interpreted(), reason="the interpreter runs kernels on a CPU")
def test_kernels_on_a_cpu_are_refused():
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        choose(PROBLEM, CPU, "fused")


def test_layers_go_together_where_a_table_says_so_and_on_a_cpu(tmp_path, monkeypatch):
    joint = Problem("lora_linears", torch.bfloat16, 8192, 1024, 3072, 48, 1)
    far = Problem("lora_linears", torch.bfloat16, 8192, 16384, 3 * 16384, 48, 1)
    tiles = default_tiles(joint.dtype, joint.rank)
    rows = Measured(joint, "cublas", tiles), Measured(far, "apart", tiles)
    Table(rows).write(tmp_path / "some-gpu.json")
    monkeypatch.setattr(tables, "TABLES", tmp_path)
    monkeypatch.setattr(dispatch, "device_name", lambda device: "some-gpu")
    assert together_pays(joint, GPU)
    assert together_pays(far, CPU)
    assert not together_pays(far, GPU)
    assert choose(far, GPU).backend == "reference"
    assert not together_pays(replace(joint, rows=64), GPU)  # not measured
    monkeypatch.setenv("FEDSA_KERNELS", "cublas")
    assert together_pays(replace(joint, rows=64), GPU)


def test_a_table_of_ones_own_comes_before_the_packages(tmp_path, monkeypatch):
    Table((row("fused", 8192, 4096),)).write(tmp_path / "mine.json")
    monkeypatch.setattr(dispatch, "device_name", lambda device: "unknown-gpu")
    monkeypatch.setenv("FEDSA_KERNEL_TABLE", str(tmp_path / "mine.json"))
    assert choose(PROBLEM, GPU).backend == "fused"


@pytest.mark.parametrize("text", [None, "{", '[{"op": "lora_linear"}]', '{"rows": 1}', "{}"])
def test_a_table_that_is_none_is_refused_by_its_path(text, tmp_path, monkeypatch):
    path = tmp_path / "broken.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(dispatch, "device_name", lambda device: "unknown-gpu")
    monkeypatch.setenv("FEDSA_KERNEL_TABLE", str(path))
    with pytest.raises(ValueError, match="broken.json"):
        choose(PROBLEM, GPU)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda row: row | {"fastest": "banana"}, "fastest is one of"),
        (lambda row: row | {"fastest": None}, "fastest is one of"),
        (lambda row: row | {"fastest": "apart"}, "fastest is one of"),
        (lambda row: row | {"op": "lora_liner"}, "op is one of"),
        (lambda row: row | {"dtype": "int8"}, "dtype is one of"),
        (lambda row: row | {"rows": True}, "rows is a positive integer, not True"),
        (lambda row: row | {"rank": 256}, "fused has no tile above rank 64"),
        (lambda row: row | {"rows": 0}, "rows is a positive integer, not 0"),
        (lambda row: row | {"d_in": "18"}, "d_in is a positive integer, not '18'"),
        (lambda row: with_tile(row, "frozen", None), "frozen has no other way"),
        (lambda row: with_tile(row, "frozen", {"group": 0}), "group of a tile"),
        (lambda row: with_tile(row, "fused", {"m": 24}), "m of a tile is a power of two"),
        (lambda row: with_tile(row, "both", {"warps": 0}), "warps of a tile is a power of two"),
        (lambda row: with_tile(row, "both", {"splits": -1}), "splits of a tile"),
    ],
)
def test_a_row_that_kernels_could_not_work_with_is_refused(change, match, tmp_path):
    """Some would crash far from here, and some give wrong numbers."""
    path = tmp_path / "edited.json"
    Table((row("fused", 8192, 4096),)).write(path)
    path.write_text(json.dumps([change(each) for each in json.loads(path.read_text())]))
    with pytest.raises(ValueError, match=f"edited.json is no table of measured kernels: {match}"):
        Table.read(path)


def with_tile(row: dict[str, Any], kernel: str, shape: dict[str, int] | None) -> dict[str, Any]:
    return row | {"tiles": row["tiles"] | {kernel: shape}}


@pytest.mark.skipif(interpreted(), reason="the interpreter runs kernels on a CPU")
def test_ops_of_one_kernel_refuse_what_cannot_run_and_follow_the_environment(monkeypatch):
    operand = torch.zeros(2)
    with pytest.raises(ValueError, match="clipped_grad: the backend triton needs a CUDA"):
        runs_kernels("clipped_grad", "triton", operand)
    with pytest.raises(ValueError, match="there is no backend 'fused', but triton and reference"):
        runs_kernels("clipped_grad", "fused", operand)
    monkeypatch.setenv("FEDSA_KERNELS", "fused")
    assert not runs_kernels("clipped_grad", None, operand)  # nothing here to run it on
    monkeypatch.setenv("FEDSA_KERNELS", "triton")
    with pytest.raises(ValueError, match="reference, cublas, fused and auto"):
        runs_kernels("clipped_grad", None, operand)
