"""Medians of tasks that take turns, and the memory that one takes."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Task:
    """Something to time.

    Args:
        run: is timed; it takes what ``prepare`` gives.
        prepare: runs before it every time, off the clock.
    """

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = _nothing


def seconds_of(task: Task) -> float:
    """One run, in seconds."""
    prepared = task.prepare()
    begun = time.perf_counter()
    task.run(prepared)
    return time.perf_counter() - begun


def take_turns(
    tasks: Mapping[str, Task], repetitions: int, warm_up: bool = True, seconds: float = 3.0
) -> dict[str, float]:
    """The median of each task, in seconds.

    The tasks take turns, so that a busy machine slows all of them down alike and ratios of the
    medians mean something.

    Args:
        tasks: by name.
        repetitions: of each.
        warm_up: whether each runs once before, and that does not count.
        seconds: a task that has taken longer than this, and three turns, takes no more.
    """
    for task in tasks.values() if warm_up else ():
        seconds_of(task)
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repetitions):
        for name, task in tasks.items():
            if len(taken[name]) < 3 or sum(taken[name]) < seconds:
                taken[name].append(seconds_of(task))
    return {name: statistics.median(values) for name, values in taken.items()}


def forget_peak_memory() -> None:
    """Begin a new peak; where the system does not allow it the old one goes on."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return


def peak_memory() -> int:
    """Most bytes that this process has had in memory since the peak was forgotten."""
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024
