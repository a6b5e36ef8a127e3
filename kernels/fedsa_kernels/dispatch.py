"""Which backend an op runs on, and why.

    reference   plain torch, in the order that reads the output once (the CPU path)
    cublas      the same order with Triton kernels for the narrow products
    fused       Triton kernels for the frozen product and the adapter's in one

Measured tables, see ``fedsa_kernels.tables``, decide. A device without one, a dtype or
a size far from everything that was measured, and the CPU get the reference: it is never wrong.
``backend=`` of an op, or the environment variable ``FEDSA_KERNELS``, decides instead.
"""

import math
import os
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from fedsa_kernels.launch import interpreted
from fedsa_kernels.tables import APART, BACKENDS, Measured, Problem, Table, read_table
from fedsa_kernels.tiles import Tiles

VARIABLE = "FEDSA_KERNELS"
_FAR = math.log(4.0)
"""A shape is taken for measured if a shape within this factor of it was, in rows and in size."""

_THERE_ARE = f"there are {', '.join(BACKENDS)} and auto"
_NEEDS = (
    "needs a CUDA or ROCm GPU; on a CPU it runs in Triton's interpreter alone (TRITON_INTERPRET=1)"
)


@dataclass(frozen=True)
class Choice:
    """What an op runs on.

    Args:
        backend: one of ``BACKENDS``.
        tiles: shapes of the kernels' work.
        reason: why, in words.
    """

    backend: str
    tiles: Tiles
    reason: str


def choose(problem: Problem, device: torch.device, backend: str | None = None) -> Choice:
    """The backend for a problem.

    Args:
        problem: op and sizes.
        device: where the operands are.
        backend: asked for by the caller; else the environment variable, else the table.

    Raises:
        ValueError: for a backend that does not exist, or that cannot run on the device.
    """
    asked, source = backend, "the argument backend"
    if asked is None:
        asked, source = os.environ.get(VARIABLE) or None, f"the environment variable {VARIABLE}"
    name = device_name(device) if device.type == "cuda" else ""
    if asked is not None and asked != "auto":
        _require(asked, source, device)
    else:
        asked = None
    return _choice(problem, device.type, name, read_table(name), asked, source)


def kernels_for(
    op: str, x: torch.Tensor, d_in: int, d_out: int, rank: int, clients: int, backend: str | None
) -> Choice | None:
    """What an op's kernels are to do; None where plain torch does the work.

    Args:
        op: its name.
        x: the rows, or what has as many. [vector, …]
        d_in: width of x.
        d_out: width of y.
        rank: of the adapters.
        clients: in the launch.
        backend: as for ``choose``.

    Raises:
        ValueError: as ``choose``.
    """
    # Without more ado where there is no choice: a small layer takes hardly longer than one.
    if backend == "reference" or (backend is None and x.is_cpu and not os.environ.get(VARIABLE)):
        return None
    choice = choose(Problem(op, x.dtype, len(x), d_in, d_out, rank, clients), x.device, backend)
    return None if choice.backend == "reference" else choice


@lru_cache(4096)
def _choice(
    problem: Problem,
    kind: str,
    name: str,
    table: Table,
    asked: str | None,
    source: str,
) -> Choice:
    nothing = _without_kernels(problem)
    if nothing:
        return Choice("reference", problem.default_tiles, f"there are no kernels for {nothing}")
    near = _nearest(problem, table)
    tiles = near.tiles if near else problem.default_tiles
    if asked is not None:
        return Choice(asked, tiles, f"{source} says so")
    if not name:
        return Choice("reference", tiles, f"there are no kernels for {kind}")
    if near is None:
        nothing = "nothing near this problem" if table.rows else "nothing"
        return Choice("reference", tiles, f"{nothing} was measured on {name}")
    if near.fastest == APART:
        return Choice("reference", tiles, f"layers are faster apart on {name} at {near.problem}")
    return Choice(near.fastest, tiles, f"fastest on {name} at {near.problem}")


def _without_kernels(problem: Problem) -> str:
    """What of a problem kernels cannot work with; empty for nothing."""
    if problem.dtype == torch.float64:
        return "float64"
    if problem.d_in * problem.d_out >= 2**31:  # they count the elements of W in 32 bits
        return "2³¹ frozen weights"
    return "" if problem.rows else "no rows"


def together_pays(problem: Problem, device: torch.device) -> bool:
    """Whether layers of one x are faster by one op than by one each.

    On a CPU they are, as ``fedsa-secure bench kernels`` shows. On a GPU the table says so, or
    whoever asks for a backend by the environment variable.
    """
    if device.type != "cuda" or os.environ.get(VARIABLE, "auto") not in ("", "auto"):
        return True
    near = _nearest(problem, read_table(device_name(device))) if problem.rows else None
    return near is not None and near.fastest != APART


def runs_kernels(op: str, backend: str | None, *operands: torch.Tensor) -> bool:
    """Whether an op that has one kind of kernel runs on it, and not on its reference.

    Args:
        op: its name.
        backend: "triton" or "reference"; else the environment variable, where "cublas" and "fused"
            mean kernels where these can run; else the reference, until a table says otherwise.
        operands: what it works on. Kernels take no float64, and on the CPU only interpreted ones
            run.

    Raises:
        ValueError: for another name, or for kernels that cannot run here.
    """
    runs = operands[0].is_cuda or interpreted()
    if backend is None:
        name = os.environ.get(VARIABLE) or "auto"
        if name not in (*BACKENDS, "auto"):
            raise ValueError(f"{VARIABLE} asks for {name!r}; {_THERE_ARE}")
        asked = name not in ("reference", "auto")
    elif backend not in ("triton", "reference"):
        raise ValueError(f"{op}: there is no backend {backend!r}, but triton and reference")
    else:
        asked = backend == "triton"
        if asked and not runs:
            raise ValueError(f"{op}: the backend triton {_NEEDS}")
    return asked and runs and all(each.dtype != torch.float64 for each in operands)


@cache
def device_name(device: torch.device) -> str:
    """The name of a GPU as its table is called, such as ``nvidia-h200``."""
    return str(torch.cuda.get_device_name(device)).lower().replace(" ", "-")


def _require(asked: str, source: str, device: torch.device) -> None:
    if asked not in BACKENDS:
        raise ValueError(f"{source} asks for {asked!r}; {_THERE_ARE}")
    runs = device.type == "cuda" or (device.type == "cpu" and interpreted())
    if asked != "reference" and not runs:
        raise ValueError(f"{source} asks for {asked!r}, which {_NEEDS}")


@lru_cache(4096)
def _nearest(problem: Problem, table: Table) -> Measured | None:
    """The nearest measured problem, if one is near; of two the one of fewer rows."""

    def place(row: Measured) -> tuple[float, int]:
        return problem.distance(row.problem), row.problem.rows

    near = min(table.rows, key=place, default=None)
    return near if near is not None and problem.distance(near.problem) <= _FAR else None
