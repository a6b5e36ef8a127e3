"""Which backend an op runs on, and why.

    reference   plain torch, in the order that reads the output once (the CPU path)
    cublas      the same order with Triton kernels for the narrow products
    fused       one Triton kernel for the frozen product and the adapter's

Measured tables, one file for each device in ``tuned/``, decide. A device without one, a dtype or
a size far from everything that was measured, and the CPU get the reference: it is never wrong.
``backend=`` of an op, or the environment variable ``FEDSA_KERNELS``, decides instead.
"""

import json
import math
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fedsa_kernels.launch import Tile, interpreted, rank_block
from fedsa_kernels.tiles import Tiles, default_tiles

BACKENDS = ("reference", "cublas", "fused")
VARIABLE = "FEDSA_KERNELS"
TABLES = Path(__file__).parent / "tuned"
_FAR = math.log(4.0)
"""A shape is taken for measured if a shape within this factor of it was, in rows and in size."""


@dataclass(frozen=True)
class Problem:
    """What a choice depends on.

    Args:
        op: name of the op.
        dtype: of the products.
        rows: of x, of all clients.
        d_in: width of x.
        d_out: width of y.
        rank: of the adapters.
        clients: in the launch.
    """

    op: str
    dtype: torch.dtype
    rows: int
    d_in: int
    d_out: int
    rank: int
    clients: int


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
    tiles = default_tiles(problem.dtype, problem.rank)
    asked, source = backend, "the argument backend"
    if asked is None:
        asked, source = os.environ.get(VARIABLE) or None, f"the environment variable {VARIABLE}"
    if asked is not None and asked != "auto":
        _require(asked, source, device)
        entry = _nearest(problem, device, asked)
        return Choice(asked, entry.tiles if entry else tiles, f"{source} says so")
    if device.type != "cuda":
        return Choice("reference", tiles, f"there are no kernels for {device.type}")
    name = device_name(device)
    if not _table(name):
        return Choice("reference", tiles, f"nothing was measured on {name}")
    entry = _nearest(problem, device, None)
    if entry is None:
        return Choice("reference", tiles, f"nothing near this shape was measured on {name}")
    return Choice(entry.backend, entry.tiles, f"fastest on {name} at {entry.shape}")


def runs_kernels(op: str, backend: str | None, *operands: torch.Tensor) -> bool:
    """Whether an op that has one kind of kernel runs on it, and not on its reference.

    Args:
        op: its name.
        backend: "triton" or "reference"; else the environment variable, where "cublas" and "fused"
            mean kernels; else the reference, until a table says otherwise.
        operands: what it works on. Kernels take no float64, and on the CPU only interpreted ones
            run.

    Raises:
        ValueError: for another name.
    """
    name = backend or os.environ.get(VARIABLE) or "auto"
    if name not in (*BACKENDS, "triton", "auto"):
        raise ValueError(f"{op}: there is no backend {name!r}, but triton and reference")
    wide = any(operand.dtype == torch.float64 for operand in operands)
    runs = not wide and (operands[0].is_cuda or interpreted())
    return runs and name not in ("reference", "auto")


def device_name(device: torch.device) -> str:
    """The name of a GPU as its table is called, such as ``nvidia-h200``."""
    return str(torch.cuda.get_device_name(device)).lower().replace(" ", "-")


def _require(asked: str, source: str, device: torch.device) -> None:
    if asked not in BACKENDS:
        raise ValueError(f"{source} asks for {asked!r}; there are {', '.join(BACKENDS)} and auto")
    if asked != "reference" and device.type == "cpu" and not interpreted():
        raise ValueError(
            f"{source} asks for {asked!r}, which needs a GPU; on a CPU it runs in Triton's "
            "interpreter alone (TRITON_INTERPRET=1)"
        )


@dataclass(frozen=True)
class _Entry:
    """One measured row of a table."""

    backend: str
    tiles: Tiles
    shape: str
    distance: float


@cache
def _table(name: str) -> list[dict[str, Any]]:
    path = TABLES / f"{name}.json"
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def _nearest(problem: Problem, device: torch.device, backend: str | None) -> _Entry | None:
    """The nearest measured shape for which a backend was fastest, or for which it was tuned."""
    if device.type != "cuda":
        return None
    found = [
        _Entry(backend or row["fastest"], _tiles(row, backend), row["shape"], distance)
        for row in _table(device_name(device))
        if (distance := _distance(problem, row)) <= _FAR
    ]
    return min(found, key=lambda entry: entry.distance, default=None)


def _distance(problem: Problem, row: dict[str, Any]) -> float:
    """How far a measured row is: the largest factor in rows or in either width, as a logarithm."""
    same = (
        row["op"] == problem.op
        and row["dtype"] == str(problem.dtype).removeprefix("torch.")
        and rank_block(row["rank"]) == rank_block(problem.rank)
        and (row["clients"] > 1) == (problem.clients > 1)
    )
    if not same:
        return math.inf
    pairs = ((row[name], getattr(problem, name)) for name in ("rows", "d_in", "d_out"))
    return max(abs(math.log(measured / here)) for measured, here in pairs)


def _tiles(row: dict[str, Any], backend: str | None) -> Tiles:
    tuned = row["tiles"][backend or row["fastest"]]
    return Tiles(**{name: Tile(**shape) for name, shape in tuned.items()})
