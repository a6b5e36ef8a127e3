"""The measurement: it compares the same work, counts it right, and refuses wrong numbers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fedsa_kernels.bench import (
    GPU,
    H200,
    Ceilings,
    Plan,
    Shape,
    WrongResultError,
    checks,
    measure,
    orders,
    predicted,
    run,
    tuning,
)
from fedsa_kernels.bench.inputs import SCALING, Inputs, draw
from fedsa_kernels.bench.timing import Times
from fedsa_kernels.bench.work import draw_work, orders_of, results_of
from fedsa_kernels.launch import Tile, interpreted
from fedsa_kernels.tiles import KERNELS, default_tiles
from fedsa_secure.bench import kernels as bench_kernels
from fedsa_secure.bench.training_steps import DRY, bench_training_steps
from fedsa_secure.cli import app

pytestmark = pytest.mark.skipif(interpreted(), reason="test_bench_interpreted.py does more")

CPU = torch.device("cpu")
SHAPES = [
    Shape(19, 11, 24, 3, clients=clients, op=op, dtype="float64")
    for op in ("lora_linear", "vera_linear")
    for clients in (1, 3)
]
BLOCKS = [
    Shape(19, 33, 24, 9, clients=clients, op="lora_linears", dtype="float64") for clients in (1, 3)
]


def by_formula(inputs: Inputs) -> list[torch.Tensor]:
    """Output and gradients, client by client, with ΔW written out."""
    leaves = [each.detach().requires_grad_() for each in inputs.trained]
    x, first, second = leaves
    size, parts = inputs.shape.rows // inputs.shape.clients, []
    for c in range(inputs.shape.clients):
        if inputs.d is None:
            change = SCALING * second[c] @ first[c]
        else:
            change = torch.diag(second[c]) @ inputs.B @ torch.diag(first[c]) @ inputs.A
        rows = x[c * size : (c + 1) * size]
        parts.append(rows @ (inputs.weight + change).T + inputs.bias)
    y = torch.cat(parts)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs.dy)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("order", ["peft", "base first", "reference"])
def test_all_orders_do_the_same_work(order: str, shape: Shape) -> None:
    possible = orders.orders(shape.op, CPU)
    if order not in possible:
        pytest.skip("there is no such order of VeRA")
    inputs = draw(shape, CPU, seed=3)
    found = orders.joined(possible[order](inputs)(), inputs)
    for ours, expected in zip(found, by_formula(inputs), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", BLOCKS, ids=str)
@pytest.mark.parametrize("order", ["peft", "apart", "reference"])
def test_layers_of_one_x_do_the_same_work_in_every_order(order: str, shape: Shape) -> None:
    block = draw_work(shape, CPU, seed=3)
    found = results_of(orders_of(shape.op, CPU)[order](block)(), block)
    ys, dxs, dAs, dBs = zip(*(by_formula(each) for each in block.layers), strict=True)
    expected = [*ys, sum(dxs), *dAs, *dBs]
    for ours, right in zip(found, expected, strict=True):
        assert torch.allclose(ours, right, rtol=1e-10, atol=1e-10)


def test_a_cpu_without_the_interpreter_has_no_kernels() -> None:
    assert set(orders.orders("lora_linear", CPU)) == {"frozen", "peft", "base first", "reference"}


@pytest.mark.parametrize(("rows", "turns"), [(4096, 40), (1024, 40), (600, 40), (128, 320)])
def test_shapes_of_few_rows_take_more_turns_where_the_plan_says_so(rows: int, turns: int) -> None:
    shape, plan = Shape(48, 32, rows), Plan((), (), 40, 0)
    assert plan.turns_of(shape) == 40
    assert replace(plan, steady=1024).turns_of(shape) == turns


def _wrong(inputs: Inputs) -> orders.Step:
    step = orders._ours("reference", inputs)
    return lambda: [[each * 1.001 for each in step()[0]]]


def _unwritten(inputs: Inputs) -> orders.Step:
    step = orders._ours("reference", inputs)
    return lambda: [[torch.empty_like(each) for each in step()[0]]]


def _changing(inputs: Inputs) -> orders.Step:
    step, calls = orders._ours("reference", inputs), []

    def changing() -> orders.Results:
        calls.append(None)
        y, *others = step()[0]
        return [[y + 1e-7 * len(calls), *others]]

    return changing


@pytest.mark.parametrize(
    ("planted", "said"), [(_wrong, "1.0"), (_unwritten, "nan"), (_changing, "other bits")]
)
def test_wrong_numbers_are_refused_before_anything_is_timed(
    planted, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sound = orders.orders

    def spoiled(op: str, device: torch.device) -> dict:
        found = sound(op, device)
        return {**found, "cublas": planted}

    monkeypatch.setattr(checks, "orders_of", spoiled)
    monkeypatch.setattr(measure, "time_orders", pytest.fail)
    shape = Shape(19, 11, 24, 3)
    with pytest.raises(WrongResultError, match=rf"cublas on lora 19→11.*{said}"):
        run(Plan((shape,), (shape,), 2, 0), CPU, tmp_path / "table", lambda _: None, 5)


@pytest.mark.parametrize(("order", "passes"), [("peft", 16), ("base first", 10), ("reference", 6)])
@pytest.mark.parametrize("width", [2048, 4096, 14336])
def test_the_roofline_agrees_with_the_passes_over_the_rows(
    order: str, passes: int, width: int
) -> None:
    """With a rank of nothing, each pass of M·d values costs F / (2·BW·d) of the frozen layer."""
    top = Ceilings(790e12, 4.3e12, launch=0.0)
    shape = Shape(width, width, 2**22 // width * 8, rank=1)
    frozen, found = predicted(shape, "frozen", top), predicted(shape, order, top)
    expected = 1 + passes * top.flops / (2 * top.bandwidth * width)
    assert found / frozen == pytest.approx(expected, rel=0.02)


def test_the_frozen_layer_takes_its_operations_or_its_bytes() -> None:
    shape = Shape(4096, 4096, 8192)
    compute, memory = Ceilings(1e12, 1e30, 0.0), Ceilings(1e30, 1e9, 0.0)
    assert predicted(shape, "frozen", compute) == pytest.approx(4 * 8192 * 4096**2 / 1e12)
    moved = 2 * 2 * (2 * 8192 * 4096 + 4096**2)
    assert predicted(shape, "frozen", memory) == pytest.approx(moved / 1e9)


def test_every_order_of_every_shape_is_bounded_by_the_frozen_layer() -> None:
    for shape in GPU:
        least = predicted(shape, "frozen", H200)
        for order in ("peft", "base first", "cublas", "fused"):
            found = predicted(shape, order, H200)
            assert found is None or found > least


def test_tuning_keeps_the_fastest_tile_of_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(Shape(32, 32, 32, 4, dtype="bfloat16"), CPU, 0)
    seen: dict[str, list[Tile]] = {}
    wanted = {}
    for kernel in KERNELS:
        seen[kernel] = tuning._tried(kernel, inputs.shape, None)
        wanted[kernel] = seen[kernel][len(kernel) % len(seen[kernel])]
    spilling = next(tile for tile in seen["frozen"] if tile != wanted["frozen"])
    broken = {kernel: tiles[0] for kernel, tiles in seen.items() if tiles[0] != wanted[kernel]}

    def kernel_steps(_inputs: Inputs) -> dict:
        return {kernel: lambda tile, kernel=kernel: (kernel, tile) for kernel in KERNELS}

    def seconds(steps, _device) -> float | None:
        kernel, tile = steps[0]()
        assert tile != spilling or kernel != "frozen"
        if broken.get(kernel) == tile:
            return None
        return 1.0 if tile == wanted[kernel] else 2.0

    def turns(tasks, _device, _turns) -> dict[str, Times]:
        """The kernel that does both loses; the fused one wins."""
        return {
            name: Times(
                0.0, 0.0 if ("both=None" in name and "fused=None" not in name) else 1.0, 1.0
            )
            for name in tasks
        }

    monkeypatch.setattr(tuning, "kernel_steps", kernel_steps)
    monkeypatch.setattr(tuning, "whole_step", lambda *_: ("all of them", None))
    monkeypatch.setattr(tuning, "runs", lambda step: step()[1] != spilling)
    monkeypatch.setattr(tuning, "_seconds", seconds)
    monkeypatch.setattr(tuning, "take_turns", turns)
    found = tuning.tune([inputs])
    assert found == replace(default_tiles(torch.bfloat16, 4), **wanted | {"both": None})


def test_tiles_with_which_a_whole_step_cannot_run_are_not_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = draw(Shape(32, 32, 32, 4, dtype="bfloat16"), CPU, 0)
    one = default_tiles(torch.bfloat16, 4)
    monkeypatch.setattr(tuning, "runs", lambda step: False)
    assert tuning._faster(one, replace(one, both=None), [inputs], fused=False) is one


def test_a_tile_that_does_not_fit_falls_out() -> None:
    def fails() -> None:
        raise RuntimeError("out of shared memory")

    assert tuning._seconds([fails], CPU) is None
    assert tuning._seconds([lambda: None], CPU) is not None


def test_training_steps_are_compared_with_pefts() -> None:
    rows = [row for rows in bench_training_steps(DRY, CPU, 2, lambda _: None) for row in rows]
    named = {(row.name.split(": ")[1], row.n): row for row in rows}
    assert set(named) == {(name, n) for name in ("PEFT", "reference") for n in (1, 2)}
    for (name, n), row in named.items():
        ratio = row.ratio_to_baseline
        assert (ratio is None) == (name == "PEFT")
        if ratio is not None:
            assert row.value == pytest.approx(ratio * named["PEFT", n].value)


def test_the_command_writes_every_order_with_its_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Shape(19, 11, 24, 3, dtype="float32")
    monkeypatch.setattr(bench_kernels, "plan_for", lambda _: Plan((small,), (small,), 2, 0))
    path = tmp_path / "rows.json"
    done = CliRunner().invoke(app, ["bench", "kernels", "--json", str(path)])
    assert done.exit_code == 0, done.output
    rows = {row["name"]: row for row in json.loads(path.read_bytes())}
    frozen = rows.pop(f"{small}: frozen")
    for order in ("peft", "base first", "reference"):
        row = rows[f"{small}: {order}"]
        assert row["baseline"] == frozen["name"]
        assert math.isclose(row["ratio_to_baseline"], row["value"] / frozen["value"])
        assert row["ratio_to_bound"] > 0


def test_the_command_says_what_was_wrong_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise WrongResultError("fused on some shape")

    monkeypatch.setattr(bench_kernels, "run", refuse)
    done = CliRunner().invoke(app, ["bench", "kernels"])
    assert done.exit_code == 1
    assert "fused on some shape" in done.output


@pytest.mark.parametrize(
    ("given", "environment", "named"),
    [
        ([], {"FEDSA_KERNELS": "fused"}, "unset it: every backend is measured"),
        (["--seed", str(2**70)], {}, "--seed"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(
    given: list[str], environment: dict[str, str], named: str
) -> None:
    done = CliRunner().invoke(app, ["bench", "kernels", *given], env=environment)
    assert done.exit_code != 0
    assert not isinstance(done.exception, OverflowError | RuntimeError)
    assert named in " ".join((done.output + str(done.exception)).split())


def test_the_command_says_that_a_cpu_gets_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Shape(19, 11, 24, 3, dtype="float32")
    monkeypatch.setattr(bench_kernels, "plan_for", lambda _: Plan((small,), (), 2, 0))
    path = tmp_path / "mine.json"
    done = CliRunner().invoke(app, ["bench", "kernels", "--table", str(path)])
    assert not path.exists()
    assert "was not written: nothing is tuned on a CPU" in " ".join(done.output.split())
