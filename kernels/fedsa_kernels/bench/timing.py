"""Times of steps that take turns: graphs on a GPU, the thread's own clock on a CPU."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

Step = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds of one step: the 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Times":
        """Of at least two measurements."""
        tenths = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(tenths[1], tenths[4], tenths[7])


def take_turns(
    tasks: Mapping[str, Sequence[Step]], device: torch.device, turns: int
) -> dict[str, Times]:
    """Time every task; each turn runs all of them, so that the machine's noise meets all alike.

    Their order is drawn for each turn: what one leaves in caches meets all others.

    Args:
        tasks: by name, the same step on as many sets of operands as the caches should not hold; a
            step must not synchronise with the device.
        device: where they run. A GPU's tasks are captured into one graph each, so that the host
            takes no part.
        turns: measurements of each.
    """
    if device.type == "cuda":
        return _of_graphs(tasks, turns)
    for steps in tasks.values():
        steps[0]()  # warms up
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for names in _orders(tasks, turns):
        for name in names:
            begun = _clock()
            for step in tasks[name]:
                step()
            taken[name].append((_clock() - begun) / len(tasks[name]))
    return {name: Times.of(seconds) for name, seconds in taken.items()}


def _orders(tasks: Mapping[str, object], turns: int) -> Iterator[list[str]]:
    """The tasks of every turn, by name; the same in every run."""
    stream = Random(0)  # noqa: S311 - no secret
    for _ in range(turns):
        yield stream.sample(list(tasks), len(tasks))


def _clock() -> float:
    """With one thread the time that it ran, which others on its core do not stretch."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _of_graphs(tasks: Mapping[str, Sequence[Step]], turns: int) -> dict[str, Times]:
    graphs = {name: graph_of(steps) for name, steps in tasks.items()}
    for graph in graphs.values():
        graph.replay()
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in tasks}
    for names in _orders(tasks, turns):
        for name in names:
            begin, end = event(), event()
            begin.record()
            graphs[name].replay()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {
        name: Times.of([begin.elapsed_time(end) / 1e3 / len(tasks[name]) for begin, end in pairs])
        for name, pairs in events.items()
    }


def event() -> Any:
    """A point in a GPU's time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def graph_of(steps: Sequence[Step]) -> Any:
    """All steps, one after the other, as one graph; they run three times before."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for step in steps:
                step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return graph
