"""Times: percentiles of steps that take turns, on a GPU as graphs."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedsa_kernels.bench import timing
from fedsa_kernels.bench.timing import Times, take_turns

CPU = torch.device("cpu")


def test_times_are_percentiles_and_tasks_take_turns() -> None:
    assert Times.of([float(k) for k in range(101)]) == Times(20.0, 50.0, 80.0)
    order: list[str] = []
    tasks = {name: [lambda name=name: order.append(name)] for name in ("a", "b")}
    take_turns(tasks, CPU, 40)
    assert order[:2] == ["a", "b"]  # warm up
    turns = ["".join(order[k : k + 2]) for k in range(2, 2 + 2 * 40, 2)]
    assert set(turns) == {"ab", "ba"}


class Clock:
    """A GPU of the simplest kind: a graph takes one second for every step it holds."""

    def __init__(self) -> None:
        self.now, self.graph, self.ran = 0.0, None, 0

    def step(self) -> None:
        self.ran += 1
        if self.graph is not None:
            self.graph.steps += 1

    def capture(self, graph: Any) -> Any:
        @contextmanager
        def capturing() -> Iterator[None]:
            self.graph, graph.steps, graph.clock = graph, 0, self
            yield
            self.graph = None

        return capturing()


class Graph:
    """What ``Clock`` captures."""

    def replay(self) -> None:
        self.clock.now += self.steps


def test_a_graph_holds_the_steps_after_they_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    class Event:
        def record(self) -> None:
            self.at = clock.now

        def elapsed_time(self, end: "Event") -> float:
            return (end.at - self.at) * 1e3

    stub = SimpleNamespace(
        Stream=lambda: SimpleNamespace(wait_stream=lambda _: None),
        current_stream=lambda: SimpleNamespace(wait_stream=lambda _: None),
        stream=lambda _: nullcontext(),
        CUDAGraph=Graph,
        graph=clock.capture,
        Event=lambda enable_timing: Event(),
        synchronize=lambda: None,
    )
    monkeypatch.setattr(timing.torch, "cuda", stub)
    one, three = [clock.step], [clock.step, clock.step, lambda: (clock.step(), clock.step())]
    times = take_turns({"one": one, "three": three}, torch.device("cuda"), 5)
    assert clock.ran == 4 * (1 + 4)  # three times to warm up, once to be captured
    assert times == {"one": Times(1.0, 1.0, 1.0), "three": Times(4 / 3, 4 / 3, 4 / 3)}
    assert clock.now == (1 + 5) * (1 + 4)  # a first time that is not counted
