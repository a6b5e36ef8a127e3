"""What was measured on a device: one file of JSON for each, which the dispatcher reads.

``tuned/<device>.json`` comes with the package; the file that the environment variable
``FEDSA_KERNEL_TABLE`` names is read instead, whatever the device is.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fedsa_kernels.launch import Tile, rank_block
from fedsa_kernels.tiles import KERNELS, Tiles, default_tiles

VARIABLE = "FEDSA_KERNEL_TABLE"
APART = "apart"
"""Stands in a table for a backend where layers of one x are faster one by one."""
TABLES = Path(__file__).parent / "tuned"


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

    def __str__(self) -> str:
        sizes = f"{self.rows} rows, {self.d_in} to {self.d_out}, rank {self.rank}"
        return f"{sizes}, {self.clients} clients, {str(self.dtype).removeprefix('torch.')}"

    def distance(self, other: "Problem") -> float:
        """The largest factor between their rows or either of their widths, as a logarithm.

        Infinite for another op, another width of numbers, another block of ranks, and between one
        client and many.
        """
        same = (
            self.op == other.op
            and self.dtype.itemsize == other.dtype.itemsize
            and rank_block(self.rank) == rank_block(other.rank)
            and (self.clients > 1) == (other.clients > 1)
        )
        if not same:
            return math.inf
        ours, theirs = (self.rows, self.d_in, self.d_out), (other.rows, other.d_in, other.d_out)
        return max(abs(math.log(a / b)) for a, b in zip(ours, theirs, strict=True))


@dataclass(frozen=True)
class Measured:
    """One problem as it was measured.

    Args:
        problem: op and sizes.
        fastest: the backend, or ``APART``.
        tiles: the fastest shape of every kernel's work.
    """

    problem: Problem
    fastest: str
    tiles: Tiles


def write_table(path: Path, rows: Sequence[Measured]) -> None:
    """Keep a table, over the one that was there."""
    text = json.dumps([_as_json(row) for row in rows], indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True, eq=False)
class Table:
    """Everything that was measured on a device; a key by identity.

    Args:
        rows: in no order; empty if nothing was measured.
    """

    rows: tuple[Measured, ...] = ()


def read_table(device: str) -> Table:
    """The table for a device, by its name. A file is read once, see ``forget``.

    Raises:
        ValueError: if the file that the environment variable names is none, or no table.
    """
    named = os.environ.get(VARIABLE)
    return _read(named, True) if named else _read(str(TABLES / f"{device}.json"), False)


def forget() -> None:
    """Read files again."""
    _read.cache_clear()


@cache
def _read(name: str, required: bool) -> Table:
    path = Path(name)
    if not path.is_file():
        if required:
            raise ValueError(f"{VARIABLE} names {path}, which is no file")
        return Table()
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return Table(tuple(_from_json(row) for row in rows))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no table of measured kernels: {error}") from error


def _as_json(row: Measured) -> dict[str, Any]:
    sizes = asdict(row.problem) | {"dtype": str(row.problem.dtype).removeprefix("torch.")}
    return {**sizes, "fastest": row.fastest, "tiles": asdict(row.tiles)}


def _from_json(row: dict[str, Any]) -> Measured:
    """A kernel that the row does not name has its default tile."""
    sizes = {name: row[name] for name in ("op", "rows", "d_in", "d_out", "rank", "clients")}
    dtype: torch.dtype = getattr(torch, row["dtype"])
    given = default_tiles(dtype, row["rank"])
    tiles = {name: getattr(given, name) for name in KERNELS} | {
        name: None if shape is None else Tile(**shape) for name, shape in row["tiles"].items()
    }
    return Measured(Problem(dtype=dtype, **sizes), row["fastest"], Tiles(**tiles))
