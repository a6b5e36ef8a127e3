"""What every launch of a Triton kernel has to decide besides its operands."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """The shape of a program's work.

    Args:
        m: rows; at least 16.
        n: columns; at least 16.
        k: summands that are loaded together; at least 16.
        warps: of 32 threads (AMD: 64).
        stages: loads in flight.
        splits: parts of the sum that programs of their own add up; 0 for as many as give every
            multiprocessor two programs.
        group: blocks of rows that are worked off together, so that they find W in the cache.

    Raises:
        ValueError: for numbers that no kernel could work with, naming one.
    """

    m: int = 64
    n: int = 64
    k: int = 32
    warps: int = 4
    stages: int = 2
    splits: int = 0
    group: int = 8

    def __post_init__(self) -> None:
        blocks = (("m", self.m, 16), ("n", self.n, 16), ("k", self.k, 16), ("warps", self.warps, 1))
        for name, size, least in blocks:
            if not isinstance(size, int) or size < least or size & (size - 1):
                raise ValueError(f"{name} of a tile is a power of two from {least} on, not {size}")
        for name, count, least in (
            ("stages", self.stages, 1),
            ("splits", self.splits, 0),
            ("group", self.group, 1),
        ):
            if not isinstance(count, int) or count < least:
                raise ValueError(f"{name} of a tile is an integer from {least} on, not {count}")


@dataclass(frozen=True)
class Dropout:
    """Adapter dropout as a kernel needs it.

    Args:
        keys: one int32 word per row, see ``fedsa_kernels.dropout``. [row]
        p: probability of dropping an element.
    """

    keys: Tensor
    p: float

    @classmethod
    def of(cls, keys: Tensor | None, p: float) -> "Dropout | None":
        """None where nothing is dropped."""
        return None if keys is None or p == 0.0 else cls(keys, p)

    @property
    def factor(self) -> float:
        """What survives is multiplied by this."""
        return 1.0 / (1.0 - self.p)


@dataclass(frozen=True)
class Launch:
    """One launch, with all that decides which machine code it runs.

    Args:
        kernel: the function under ``triton.jit``.
        grid: programs in each dimension.
        arguments: operands, in order.
        options: compile-time constants, ``num_warps`` and ``num_stages``.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Keep launches instead of running them, so that tensors may be on the meta device."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a kernel, or keep its launch, see ``recording``."""
    launches = _recorded.get()
    if launches is None:
        # Triton launches on the current device, which need not be that of the operands.
        first = next(each for each in arguments if isinstance(each, Tensor))
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            kernel[grid](*arguments, **options)
    else:
        launches.append(Launch(kernel, grid, arguments, options))


def within_reach(x: Tensor) -> Tensor:
    """A matrix whose columns are less than 2³¹ elements apart, which is how far a kernel counts."""
    return x if x.stride(1) * x.shape[1] < 2**31 else x.contiguous()


def split_span(total: int, step: int, programs: int, splits: int, device: torch.device) -> int:
    """How much of a sum over ``total`` one program takes, a multiple of ``step``.

    Args:
        total: summands.
        step: of a program's loop.
        programs: that there are without splitting.
        splits: see ``Tile``.
        device: where they run; the same device gives the same parts, and so the same sums.
    """
    steps = max(1, -(-total // step))
    wanted = splits or max(1, -(-2 * _multiprocessors(device) // programs))
    return -(-steps // min(wanted, steps)) * step


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    if find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def upcasts(x: Tensor) -> bool:
    """Whether a kernel has to widen what it loads.

    The interpreter takes bfloat16 for the integer with the same bits as soon as it computes with
    it (triton-lang/triton#11584).
    """
    return interpreted() and x.dtype == torch.bfloat16


def precision(x: Tensor) -> str:
    """How products of float32 are taken: torch's own switch decides.

    It has an old name (``allow_tf32``) and a new one. What is set by either can be read by the new
    one, and reading the old one fails where both were used.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def rank_block(rank: int) -> int:
    """The rank as a block: a power of two that tensor cores take."""
    return max(16, 1 << (rank - 1).bit_length())
