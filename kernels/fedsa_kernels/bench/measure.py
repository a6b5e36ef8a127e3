"""Check, tune, time: the whole measurement of the adapter kernels on one device."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedsa_kernels.bench.ceilings import ceilings
from fedsa_kernels.bench.checks import CHECKED, Check, check
from fedsa_kernels.bench.inputs import draw
from fedsa_kernels.bench.orders import OURS, PLAIN
from fedsa_kernels.bench.roofline import Ceilings, predicted
from fedsa_kernels.bench.shapes import CPU, DRY, GPU, LAYERS, Shape
from fedsa_kernels.bench.timing import Times, take_turns
from fedsa_kernels.bench.work import draw_work, orders_of
from fedsa_kernels.launch import interpreted
from fedsa_kernels.tables import APART, VARIABLE, Measured, forget, write_table
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
    """

    shapes: tuple[Shape, ...]
    checked: tuple[Shape, ...]
    turns: int
    tiles: int | None


def plan_for(device: torch.device) -> Plan:
    """Everything on a GPU; PEFT's and our orders on a CPU; in the interpreter a dry run."""
    if device.type == "cuda":
        return Plan(GPU, CHECKED, 40, None)
    if interpreted():
        return Plan(DRY, DRY, 3, 2)
    return Plan(CPU, CHECKED[:3], 40, 0)


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
    """

    device: str
    checks: list[Check]
    ceilings: dict[str, Ceilings]
    timings: list[Timing]


class WrongResultError(RuntimeError):
    """An order of work gave wrong numbers, so nothing was timed."""


def run(
    plan: Plan,
    device: torch.device,
    table: Path,
    report: Report,
    seed: int,
    keep: Callable[[Findings], None] = lambda findings: None,
) -> Findings:
    """Check every order, tune the kernels, and time every order.

    Args:
        plan: what to do.
        device: where.
        table: where to keep the table for the dispatcher; it is in force from then on.
        report: told what comes next.
        seed: of the numbers that are checked.
        keep: given what was found of every shape at once, since the whole takes minutes.

    Raises:
        WrongResultError: if a check fails, naming every one that does.
    """
    checks = []
    for each in check(plan.checked, device, seed):
        checks.append(each)
        report(f"checked {each.order} on {each.shape}: {each.error:.1e}")
    require_passed(checks)
    tuned = _tuned(plan, device, report)
    if tuned:  # every backend with its tiles; which one is fastest is not known yet
        provisional = table.with_suffix(".tuning.json")
        write_table(provisional, _rows(tuned, {}))
        os.environ[VARIABLE] = str(provisional)
    top = {dtype: ceilings(device, dtype) for dtype in {s.torch_dtype for s in plan.shapes}}
    named = {str(dtype).removeprefix("torch."): found for dtype, found in top.items()}
    timings: list[Timing] = []
    for shape in plan.shapes:
        report(f"timing {shape}")
        found = time_orders(shape, device, top[shape.torch_dtype], plan.turns)
        timings += found
        keep(Findings(name_of(device), checks, named, found))
        if tuned:
            write_table(table, _rows(tuned, fastest(timings)))
    if tuned:
        os.environ[VARIABLE] = str(table)
        forget()
    return Findings(name_of(device), checks, named, timings)


def require_passed(checks: Sequence[Check]) -> None:
    """Refuse wrong numbers.

    Raises:
        WrongResultError: naming every check that failed.
    """
    failed = [
        f"{c.order} on {c.shape} in {c.arithmetic}: error {c.error:.2e}, "
        f"{'the same' if c.same else 'other'} bits in a second run"
        for c in checks
        if not c.passed
    ]
    if failed:
        raise WrongResultError("\n".join(failed))


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


def fastest(timings: Sequence[Timing]) -> dict[Shape, str]:
    """The fastest of our backends for each shape, or that its layers are faster apart."""
    best: dict[Shape, Timing] = {}
    for each in timings:
        if each.order in (*OURS, APART):
            held = best.get(each.shape)
            if held is None or each.times.p50 < held.times.p50:
                best[each.shape] = each
    return {shape: each.order for shape, each in best.items()}


def best_plain(timings: Sequence[Timing], shape: Shape) -> Timing:
    """The fastest order of plain torch for a shape."""
    plain = [each for each in timings if each.shape == shape and each.order in PLAIN]
    return min(plain, key=lambda each: each.times.p50)


def as_one(shape: Shape) -> Shape:
    """The single layer whose kernels are those of layers together: one of their joint rank."""
    if shape.op != "lora_linears":
        return shape
    return replace(shape, op="lora_linear", d_out=shape.d_out // LAYERS)


def name_of(device: torch.device) -> str:
    """The device as results name it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return "interpreter" if interpreted() else f"cpu, {torch.get_num_threads()} threads"


def _tuned(plan: Plan, device: torch.device, report: Report) -> dict[Shape, Tiles]:
    if plan.tiles == 0:
        return {}
    from fedsa_kernels.bench.tuning import compile_ahead, tune  # not every machine has Triton

    if device.type == "cuda":
        # Rows make no other machine code; widths and ranks may.
        kinds = dict.fromkeys(as_one(replace(s, rows=s.clients * 512)) for s in plan.shapes)
        small = [draw(each, device, 0) for each in kinds]
        report(f"compiled {compile_ahead(small, os.cpu_count() or 1, plan.tiles)} kernels")
    found = {}
    for shape in plan.shapes:
        report(f"tuning {shape}")
        count = sets_of(shape, device)
        found[shape] = tune(
            [draw(as_one(shape), device, seed) for seed in range(count)], plan.tiles
        )
    return found


def _rows(tuned: dict[Shape, Tiles], fastest: dict[Shape, str]) -> list[Measured]:
    return [
        Measured(shape.problem, fastest.get(shape, "reference"), tiles)
        for shape, tiles in tuned.items()
    ]
