"""What differential privacy costs: a private step beside the plain one, and Opacus' beside PEFT's.

The steps take turns in one process; the memory of each is that of a process of its own.
"""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from fedsa_secure.bench import private_steps
from fedsa_secure.bench.private_steps import BASELINES, RANK, STEPS, Size
from fedsa_secure.bench.timing import Task, take_turns
from fedsa_secure.errors import ConfigError
from fedsa_secure.reporting.rows import Row

SIZES = (Size(128, 8), Size(32, 16), Size(512, 2), Size(6, 64))
_LONGEST, _TURNS = 512, 7


def bench_dp(
    sizes: Sequence[Size] = SIZES, report: Callable[[str], None] | None = None
) -> list[Row]:
    """Measure one training step of one client: LoRA of rank 8 on MiniLM's queries and values.

    Args:
        sizes: tokens of a record, and records of a batch.
        report: told what is measured next.

    Returns:
        For every size the median time of each step and its peak memory beyond the loaded model's.

    Raises:
        ConfigError: if a size is impossible.
    """
    for size in sizes:
        if not (1 <= size.tokens <= _LONGEST and size.rows >= 1):
            raise ConfigError("sizes", f"{size}; tokens go from 1 to {_LONGEST}, records from 1")
    rows = []
    for size in sizes:
        if report is not None:
            report(f"{size}: times")
        rows += _rows("", size, "s", step_times(size))
        if report is not None:
            report(f"{size}: memory")
        found = {name: step_memory(name, size) / 2**20 for name in STEPS}
        rows += _rows(" memory", size, "MiB", found)
    return rows


def size_of(text: str) -> Size:
    """The size that such as ``128x8`` stands for: tokens and records.

    Raises:
        ConfigError: if it is no size.
    """
    try:
        tokens, rows = (int(number) for number in text.split("x"))
    except ValueError:
        raise ConfigError("sizes", f"{text!r} is no size", "write such as 128x8") from None
    return Size(tokens, rows)


def step_times(size: Size) -> dict[str, float]:
    """Median seconds of each step; they take turns."""
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")  # of Opacus, about hooks on the first layer
        steps = {name: make(size, stack) for name, make in STEPS.items()}
        tasks = {name: Task(_call(step)) for name, step in steps.items()}
        return take_turns(tasks, _TURNS, seconds=6.0)


def step_memory(name: str, size: Size) -> int:
    """Peak memory of a step beyond what was loaded before, in bytes, in a process of its own."""
    arguments = [name, str(size.tokens), str(size.rows), str(torch.get_num_threads())]
    done = subprocess.run(  # noqa: S603 - a module of this package
        [sys.executable, "-m", private_steps.__name__, *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(json.loads(done.stdout))


def _call(step: Callable[[], object]) -> Callable[[object], object]:
    return lambda _: step()


def _rows(what: str, size: Size, unit: str, values: dict[str, float]) -> list[Row]:
    def named(name: str) -> str:
        return f"{name}{what}, {size}, r={RANK}"

    rows = []
    for name, value in values.items():
        other = BASELINES.get(name)
        rows.append(
            Row(
                name=named(name),
                n=1,
                value=value,
                unit=unit,
                baseline=None if other is None else named(other),
                ratio_to_baseline=None if other is None else value / values[other],
            )
        )
    return rows
