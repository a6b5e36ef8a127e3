"""What is compiled before a measurement: all that it will launch, each machine code once."""

from functools import partial
from random import Random
from types import SimpleNamespace

import pytest
import torch

from fedsa_kernels import dispatch, launch
from fedsa_kernels.bench import DRY, GPU, Shape, compiling, other_checks
from fedsa_kernels.bench.checks import launches_for_check
from fedsa_kernels.bench.compiling import compile_ahead, launches_of, runs
from fedsa_kernels.bench.other_checks import launches_for_others
from fedsa_kernels.bench.shapes import ragged
from fedsa_kernels.bench.tuning import launches_for
from fedsa_kernels.bench.work import draw_work, orders_of
from fedsa_kernels.launch import Launch, Tile, interpreted
from fedsa_kernels.products.shrink import shrink
from fedsa_kernels.tables import Measured, Table, in_force
from fedsa_kernels.tiles import KERNELS, Tiles, candidates, default_tiles

machine_code = pytest.importorskip("fedsa_kernels.aot").machine_code
pytestmark = pytest.mark.skipif(interpreted(), reason="the interpreter compiles nothing")

CPU, META = torch.device("cpu"), torch.device("meta")


def some_tiles(shape: Shape, seed: str) -> Tiles:
    """As tuning might have chosen them."""
    stream, default = Random(seed), default_tiles(shape.torch_dtype, shape.rank)
    drawn = {name: stream.choice(candidates(name, shape.rank)) for name in KERNELS}
    drawn["both"] = stream.choice([None, drawn["both"]])
    if shape.op == "vera_linear":
        drawn["both"] = drawn["both"] or default.both
    if default.fused is None or stream.random() < 0.5:
        drawn["fused"] = None
    return Tiles(**drawn)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are asked for on the meta device, with the multiprocessors of an H200."""
    monkeypatch.setattr(dispatch, "_require", lambda *_: None)
    monkeypatch.setattr(launch, "_multiprocessors", lambda _device: 132)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _kind: False)


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize("shape", GPU, ids=str)
def test_whatever_a_measurement_launches_was_compiled_ahead(shape: Shape) -> None:
    """Tuned tiles, on the shape and on the neighbour that is checked with them."""
    ahead = {machine_code(each) for each in launches_for(draw_work(shape, META, 0))}
    for seed in range(3):
        row = Measured(shape.problem, "reference", some_tiles(shape, f"{shape} {seed}"))
        with in_force(Table((row,))):
            for each in (shape, ragged(shape)):
                work = draw_work(each, META, 0)
                orders = orders_of(shape.op, CPU) | _kernels(shape.op)
                needed = launches_of(*(orders[name](work) for name in ("cublas", "fused")))
                assert needed
                assert {machine_code(one) for one in needed} <= ahead


def _kernels(op: str) -> dict:
    """The orders that a GPU has besides those of a CPU."""
    from fedsa_kernels.bench import blocks, orders

    made = blocks._together if op == "lora_linears" else orders._ours
    return {name: partial(made, name) for name in ("cublas", "fused")}


@pytest.mark.usefixtures("a_gpu")
def test_checks_are_compiled_ahead_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsa_kernels.bench import checks

    monkeypatch.setattr(checks, "orders_of", lambda op, _: _kernels(op))
    kernels = {each.kernel.__name__ for each in launches_for_check(DRY, CPU, 0)}
    assert kernels == {"_shrink", "_factor_grad", "_frozen_linear", "_add_parts"}


def one_launch(rows: int, width: int = 64, tile: Tile | None = None) -> Launch:
    """Of ``shrink``, in half precision."""
    z, P = (torch.empty(*size, dtype=torch.float16) for size in ((rows, width), (1, width, 16)))
    found, *_ = launches_of(lambda: shrink(z, P, 1.0, tile or Tile(splits=1)))
    return found


def test_machine_code_differs_by_what_a_compiler_is_told_alone() -> None:
    same = {machine_code(one_launch(rows)) for rows in (1, 16, 48, 100)}
    assert len(same) == 1
    others = [one_launch(48, 65), one_launch(48, tile=Tile(splits=1, warps=8))]
    others += [one_launch(48, tile=Tile(splits=1, m=32)), one_launch(48, tile=Tile(splits=2, n=16))]
    assert len(same | {machine_code(each) for each in others}) == 5


def test_what_is_recorded_keeps_no_memory_and_counts_once() -> None:
    z, P = torch.randn(64, 64), torch.randn(1, 64, 16)
    found = launches_of(*[lambda: shrink(z, P, 1.0, Tile(splits=1))] * 3)
    assert len(found) == 1
    tensors = [each for each in found[0].arguments if isinstance(each, torch.Tensor)]
    assert tensors
    assert all(each.numel() == 0 for each in tensors)


def test_every_machine_code_is_compiled_once_and_failures_are_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def compiled(given: Launch) -> object:
        seen.append(machine_code(given))
        return None if len(seen) == 1 else given

    monkeypatch.setattr(compiling, "compiled", compiled)
    monkeypatch.setattr(compiling.os, "cpu_count", lambda: 1)
    launches = [one_launch(rows, width) for rows in (16, 48) for width in (64, 65, 96)]
    assert compile_ahead(iter(launches)) == 1
    assert len(seen) == len(set(seen)) == 2


class DriverError(RuntimeError):
    """As a driver does."""


def kernel(spills: int = 0, loads: bool = True, compiles: bool = True) -> SimpleNamespace:
    """What Triton gives, of a device that is not here."""

    def load() -> None:
        if not loads:
            raise DriverError("too much shared memory")

    def warmup(*_arguments: object, **_options: object) -> SimpleNamespace:
        if not compiles:
            raise DriverError("registers")
        return SimpleNamespace(_init_handles=load, n_spills=spills)

    return SimpleNamespace(warmup=warmup)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (kernel(), True),
        (kernel(spills=8), False),
        (kernel(loads=False), False),
        (kernel(compiles=False), False),
    ],
)
def test_a_tile_that_does_not_fit_or_spills_is_not_run(
    made: SimpleNamespace, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = [Launch(each, (1,), (), {}) for each in (kernel(), made)]
    monkeypatch.setattr(compiling, "launches_of", lambda *_: launches)
    assert runs(lambda: None) == expected


def test_a_mistake_of_ours_is_not_taken_for_a_tile_that_does_not_fit() -> None:
    def warmup(*_arguments: object, **_options: object) -> None:
        raise TypeError("one argument too many")

    with pytest.raises(TypeError):
        compiling.compiled(Launch(SimpleNamespace(warmup=warmup), (1,), (), {}))


@pytest.mark.usefixtures("a_gpu")
def test_what_is_checked_but_not_timed_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "interpreted", lambda: True)  # kernels on a CPU's operands
    monkeypatch.setattr(other_checks, "interpreted", lambda: True)  # small ones
    kernels = {each.kernel.__name__ for each in launches_for_others(CPU, 0)}
    adapters = {"_shrink", "_factor_grad", "_frozen_linear", "_add_parts"}
    assert kernels == adapters | {"_token_sum", "_gram", "_weighted_sum"}
