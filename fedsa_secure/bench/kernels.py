"""The adapter kernels on the device at hand, as rows."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from fedsa_kernels.bench import Findings, Timing, plan_for, run
from fedsa_kernels.dispatch import VARIABLE
from fedsa_kernels.launch import interpreted
from fedsa_kernels.tables import Table, in_force
from fedsa_secure.bench.training_steps import DRY, GPU, Workload, bench_training_steps
from fedsa_secure.errors import ConfigError
from fedsa_secure.reporting.rows import Row


def device_here() -> torch.device:
    """What is measured: a GPU if there is one, and the CPU under ``TRITON_INTERPRET=1``."""
    return torch.device("cuda" if torch.cuda.is_available() and not interpreted() else "cpu")


def names_here() -> list[str]:
    """Of all shapes and training steps that are measured."""
    device = device_here()
    return [*map(str, plan_for(device).shapes), *map(str, _workloads(device))]


def _workloads(device: torch.device) -> tuple[Workload, ...]:
    return GPU if device.type == "cuda" else DRY


def bench_kernels(
    table: Path,
    report: Callable[[str], None],
    seed: int,
    keep: Callable[[Findings], None] = lambda findings: None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> tuple[Findings, Iterator[list[Row]]]:
    """Check every op, tune the kernels where there are any, and time every order of work.

    On a GPU everything; on a CPU PEFT's and our order; under ``TRITON_INTERPRET=1`` a dry run of
    what a GPU would do, at sizes that a CPU can interpret.

    Args:
        table: where to keep the table for the dispatcher.
        report: told what comes next.
        seed: of the numbers that are checked.
        keep: given what was found of every shape at once.
        wanted: whether a shape or a workload of that name is measured.

    Returns:
        What was found, and whole training steps beside PEFT's, measured as they are taken: those of
        one workload after the other.

    Raises:
        ConfigError: if the environment names one backend for everything.
        WrongResultError: if an op gives wrong numbers; nothing is timed then.
    """
    named = os.environ.get(VARIABLE) or "auto"
    if named != "auto":
        raise ConfigError(VARIABLE, f"is {named!r}", "unset it: every backend is measured")
    device = device_here()
    plan = plan_for(device)
    plan = replace(plan, shapes=tuple(s for s in plan.shapes if wanted(str(s))))
    findings = run(plan, device, table, report, seed, keep)
    return findings, _training_steps(findings.table, device, report, wanted)


def _training_steps(
    table: Table,
    device: torch.device,
    report: Callable[[str], None],
    wanted: Callable[[str], bool],
) -> Iterator[list[Row]]:
    workloads = tuple(w for w in _workloads(device) if wanted(str(w)))
    with in_force(table):
        turns = 15 if device.type == "cuda" else 3
        yield from bench_training_steps(workloads, device, turns, report)


def rows_of(findings: Findings) -> list[Row]:
    """Median times of all orders, beside the frozen layer's and beside the roofline's."""
    frozen = {each.shape: each for each in findings.timings if each.order == "frozen"}
    return [_row(each, frozen[each.shape]) for each in findings.timings]


def _row(timing: Timing, frozen: Timing) -> Row:
    itself = timing is frozen
    found, least = timing.times.p50, timing.predicted
    return Row(
        name=f"{timing.shape}: {timing.order}",
        n=timing.shape.clients,
        value=found,
        unit="s",
        baseline=None if itself else f"{timing.shape}: frozen",
        ratio_to_baseline=None if itself else found / frozen.times.p50,
        ratio_to_bound=None if least is None else found / least,
    )
