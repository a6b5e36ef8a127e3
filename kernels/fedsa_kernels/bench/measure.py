"""Check, tune, time: the whole measurement of the adapter kernels on one device."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch

from fedsa_kernels.bench.ceilings import ceilings
from fedsa_kernels.bench.checks import CHECKED, Check, check, check_tiles, launches_for_check
from fedsa_kernels.bench.orders import OURS, PLAIN
from fedsa_kernels.bench.other_checks import check_others, launches_for_others
from fedsa_kernels.bench.roofline import Ceilings, predicted
from fedsa_kernels.bench.shapes import CPU, DRY, GPU, Shape
from fedsa_kernels.bench.timing import Times, take_turns
from fedsa_kernels.bench.work import draw_work, orders_of
from fedsa_kernels.launch import interpreted
from fedsa_kernels.tables import APART, Measured, Table, in_force
from fedsa_kernels.tiles import Tiles

Report = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        shapes: that are timed.
        checked: shapes that are checked before.
        turns: measurements of each order.
        tiles: tried per kernel; None for all, 0 for no tuning.
        steady: shapes of fewer rows take so many more turns, or one disturbance meets them all.
    """

    shapes: tuple[Shape, ...]
    checked: tuple[Shape, ...]
    turns: int
    tiles: int | None
    steady: int = 0

    def turns_of(self, shape: Shape) -> int:
        """Measurements of each order on a shape."""
        return self.turns * max(1, self.steady // shape.rows)


def plan_for(device: torch.device) -> Plan:
    """Everything on a GPU; PEFT's and our orders on a CPU; in the interpreter a dry run."""
    if device.type == "cuda":
        return Plan(GPU, CHECKED, 40, None)
    if interpreted():
        return Plan(DRY, DRY, 3, 2)
    return Plan(CPU, CHECKED[:3], 40, 0, steady=1024)


@dataclass(frozen=True)
class Timing:
    """One order on one shape.

    Args:
        shape: of the layer.
        order: of work.
        times: of forward and backward.
        predicted: least seconds by the roofline, at the ceilings of the same run.
    """

    shape: Shape
    order: str
    times: Times
    predicted: float | None


@dataclass(frozen=True)
class Findings:
    """Everything that a run found.

    Args:
        device: its name.
        checks: each order on each checked shape.
        ceilings: by dtype.
        timings: each order on each shape.
        table: for the dispatcher; empty where nothing was tuned.
    """

    device: str
    checks: list[Check]
    ceilings: dict[str, Ceilings]
    timings: list[Timing]
    table: Table


class WrongResultError(RuntimeError):
    """An order of work gave wrong numbers; no time of it was taken."""


def run(
    plan: Plan,
    device: torch.device,
    table: Path,
    report: Report,
    seed: int,
    keep: Callable[[Findings], None] = lambda findings: None,
) -> Findings:
    """Check every order; then tune, check again and time shape by shape.

    Args:
        plan: what to do.
        device: where.
        table: where to keep the table for the dispatcher, row by row; what it holds of other
            problems stays.
        report: told what comes next.
        seed: of the numbers that are checked.
        keep: given what was found of every shape at once, since the whole takes minutes.

    Raises:
        WrongResultError: if a check fails, naming every one that does.
        ValueError: if ``table`` is there and no table.
    """
    tunes = plan.tiles != 0
    held = Table.read(table) if tunes and table.exists() else Table()
    if device.type == "cuda" and tunes:
        _compile_ahead(plan, device, seed, report)
    checks = []
    others = check_others(device, seed) if device.type == "cuda" or interpreted() else ()
    for each in chain(check(plan.checked, device, seed), others):
        checks.append(each)
        report(f"checked {each.order} on {each.shape}: {each.error:.1e}")
    require_passed(checks)
    top = {dtype: ceilings(device, dtype) for dtype in {s.torch_dtype for s in plan.shapes}}
    named = {str(dtype).removeprefix("torch."): found for dtype, found in top.items()}
    timings: list[Timing] = []
    for shape in plan.shapes:
        row = Measured(shape.problem, "reference", shape.problem.default_tiles)
        if tunes:
            report(f"tuning {shape}")
            row = replace(row, tiles=_tuned(shape, device, plan.tiles))
            row, found = _checked(row, shape, device, seed, report)
            checks += found
        report(f"timing {shape}")
        with in_force(held.with_row(row)):  # single layers are there, for those that go apart
            timed = time_orders(shape, device, top[shape.torch_dtype], plan.turns_of(shape))
        timings += timed
        if tunes:
            held = held.with_row(replace(row, fastest=fastest(timed)))
            held.write(table)
        keep(Findings(name_of(device), checks, named, timed, held))
    return Findings(name_of(device), checks, named, timings, held)


def _checked(
    row: Measured, shape: Shape, device: torch.device, seed: int, report: Report
) -> tuple[Measured, list[Check]]:
    """The row with tiles that give right numbers, and what was checked.

    Raises:
        WrongResultError: if the default tiles do not either.
    """
    safe = replace(row, tiles=shape.problem.default_tiles)
    for tried in (row, safe):
        with in_force(Table((tried,))):
            checks = list(check_tiles(shape, device, seed))
        failed = failures(checks)
        if not failed:
            return tried, checks
        report(f"wrong with {tried.tiles}:\n{failed}")
    raise WrongResultError(failed)


def require_passed(checks: Sequence[Check]) -> None:
    """Refuse wrong numbers.

    Raises:
        WrongResultError: naming every check that failed.
    """
    failed = failures(checks)
    if failed:
        raise WrongResultError(failed)


def failures(checks: Sequence[Check]) -> str:
    """What every check that failed found, in lines; empty if none did."""
    return "\n".join(
        f"{c.order} on {c.shape} in {c.arithmetic}: error {c.error:.2e}, "
        f"{'the same' if c.same else 'other'} bits in a second run"
        for c in checks
        if not c.passed
    )


def time_orders(shape: Shape, device: torch.device, top: Ceilings, turns: int) -> list[Timing]:
    """Every order on one shape; they take turns."""
    torch.compiler.reset()  # PEFT's compiled layers count together against a limit
    sets = [draw_work(shape, device, seed) for seed in range(sets_of(shape, device))]
    found = {
        name: [order(each) for each in sets] for name, order in orders_of(shape.op, device).items()
    }
    times = take_turns(found, device, turns)
    return [Timing(shape, name, each, predicted(shape, name, top)) for name, each in times.items()]


def sets_of(shape: Shape, device: torch.device) -> int:
    """So many sets of operands that a cache does not hold what it met one turn ago."""
    cache = 2**25
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    return 1 if interpreted() else min(max(2, math.ceil(3 * cache / shape.bytes)), 12)


def fastest(timings: Sequence[Timing]) -> str:
    """The fastest of our backends for a shape, or that its layers are faster apart."""
    ours = [each for each in timings if each.order in (*OURS, APART)]
    return min(ours, key=lambda each: each.times.p50).order


def best_plain(timings: Sequence[Timing], shape: Shape) -> Timing:
    """The fastest order of plain torch for a shape."""
    plain = [each for each in timings if each.shape == shape and each.order in PLAIN]
    return min(plain, key=lambda each: each.times.p50)


def name_of(device: torch.device) -> str:
    """The device as results name it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return "interpreter" if interpreted() else f"cpu, {torch.get_num_threads()} threads"


def _tuned(shape: Shape, device: torch.device, most: int | None) -> Tiles:
    from fedsa_kernels.bench.tuning import tune  # not every machine has Triton

    count = sets_of(shape, device)
    return tune([draw_work(shape, device, seed) for seed in range(count)], most)


def _compile_ahead(plan: Plan, device: torch.device, seed: int, report: Report) -> None:
    """All that will be checked and tuned; the timed orders then launch nothing new."""
    from fedsa_kernels.bench.compiling import compile_ahead
    from fedsa_kernels.bench.tuning import launches_for

    checked = launches_for_check(plan.checked, device, seed)
    works = (draw_work(shape, device, seed) for shape in plan.shapes)
    others = launches_for_others(device, seed)
    tried = chain.from_iterable(launches_for(work, plan.tiles) for work in works)
    report(f"compiled {compile_ahead(chain(checked, others, tried))} kernels")
