"""Whether every op is right on this device, before anything is timed.

Each check draws fresh numbers, fills every output with NaN before it is written, compares with
float64, and runs twice for the same bits.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fedsa_kernels.bench.orders import PLAIN, Step
from fedsa_kernels.bench.shapes import Shape, ragged
from fedsa_kernels.bench.work import Work, draw_work, orders_of, results_of
from fedsa_kernels.launch import Launch
from fedsa_kernels.tables import BACKENDS

TOLERANCE = {"float32": 1e-5, "tf32": 4e-3, "float16": 4e-3, "bfloat16": 2e-2, "words": 0.0}
"""Largest error over the largest expected value, by the arithmetic of the products."""

CHECKED = (
    Shape(130, 70, 96, 1),
    Shape(192, 320, 130, 8),
    Shape(768, 768, 1024, 16),
    Shape(1000, 520, 513, 40),
    Shape(768, 768, 1030, 256),
    Shape(768, 776, 1032, 16, clients=8),
    Shape(200, 136, 120, 100, clients=3),
    Shape(768, 768, 1024, 256, op="vera_linear"),
    Shape(264, 136, 390, 33, clients=3, op="vera_linear"),
    Shape(264, 3 * 136, 390, 3 * 16, clients=3, op="lora_linears"),
)
"""Even and odd sizes, small and large ranks, one client and many."""


@dataclass(frozen=True)
class Check:
    """One order on one shape.

    Args:
        shape: of the layer.
        order: of work.
        arithmetic: a key of ``TOLERANCE``.
        error: the largest of output and gradients; NaN if something was not written.
        same: whether two runs gave the same bits.
    """

    shape: Shape
    order: str
    arithmetic: str
    error: float
    same: bool

    @property
    def passed(self) -> bool:
        """Within the tolerance, which NaN never is, and the same twice.

        Others may round four times as coarsely, and differ from run to run.
        """
        tolerance = TOLERANCE[self.arithmetic]
        if self.order in PLAIN and self.order != "reference":
            return self.error <= 4 * tolerance
        return self.error <= tolerance and self.same


def check(shapes: tuple[Shape, ...], device: torch.device, seed: int) -> Iterator[Check]:
    """Every order on every shape, in every arithmetic that the device has kernels for.

    Args:
        shapes: their dtype does not matter.
        device: what is checked.
        seed: of the numbers.
    """
    # One has no adapter, the other takes minutes.
    left_out = ("frozen", "peft compiled")
    for work, arithmetic in _works(shapes, device, seed):
        names = [name for name in orders_of(work.shape.op, device) if name not in left_out]
        yield from _check(work, arithmetic, names)


def launches_for_check(
    shapes: tuple[Shape, ...], device: torch.device, seed: int
) -> Iterator[Launch]:
    """All that ``check`` launches."""
    from fedsa_kernels.bench.compiling import launches_of  # not every machine has Triton

    for work, _ in _works(shapes, device, seed):
        possible = orders_of(work.shape.op, device)
        yield from launches_of(*(possible[name](work) for name in _KERNELS))


def check_tiles(shape: Shape, device: torch.device, seed: int) -> Iterator[Check]:
    """Our kernels with the tiles in force: on a shape, and on one whose edges no tile meets."""
    for each in (shape, ragged(shape)):
        yield from _check(draw_work(each, device, seed), shape.dtype, _KERNELS)


_KERNELS = [name for name in BACKENDS if name != "reference"]


def _works(
    shapes: tuple[Shape, ...], device: torch.device, seed: int
) -> Iterator[tuple[Work, str]]:
    """Operands in every arithmetic, which is in force while they are used."""
    for shape in shapes:
        for arithmetic in _arithmetics(device):
            dtype = "float32" if arithmetic == "tf32" else arithmetic
            with with_tf32(arithmetic == "tf32"):
                yield draw_work(replace(shape, dtype=dtype), device, seed), arithmetic


def _check(work: Work, arithmetic: str, names: Iterable[str]) -> Iterator[Check]:
    exact = work.double()
    possible = orders_of(work.shape.op, exact.device)
    expected = results_of(possible["reference"](exact)(), exact)
    for name in names:
        run = partial(_run, possible[name](work), work)
        yield compared(work.shape, name, arithmetic, run, expected)


def _run(step: Step, work: Work) -> list[Tensor]:
    return results_of(step(), work)


def compared(
    shape: Shape,
    order: str,
    arithmetic: str,
    run: Callable[[], list[Tensor]],
    expected: list[Tensor],
) -> Check:
    """What two runs make, on memory that starts as NaN, beside what they should."""
    with _poisoned():
        first, second = run(), run()
    errors = [_error(found, right) for found, right in zip(first, expected, strict=True)]
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return Check(shape, order, arithmetic, max(errors, key=_worst), same)


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def _worst(error: float) -> float:
    return float("inf") if error != error else error


def _arithmetics(device: torch.device) -> list[str]:
    """Without a GPU float32 alone: in half precision a CPU's own products differ."""
    every = ["float32", "tf32", "float16", "bfloat16"]
    return every if device.type == "cuda" else every[:1]


@contextmanager
def with_tf32(allowed: bool) -> Iterator[None]:
    """Products of float32 in TF32 or in full, whatever the process has set."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before


@contextmanager
def _poisoned() -> Iterator[None]:
    """Torch fills new memory with NaN while only deterministic algorithms are allowed."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
