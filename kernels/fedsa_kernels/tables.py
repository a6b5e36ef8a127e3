"""What was measured on a device: one file of JSON for each, which the dispatcher reads.

``tuned/<device>.json`` comes with the package; the file that the environment variable
``FEDSA_KERNEL_TABLE`` names is read instead, whatever the GPU is. A CPU has none.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fedsa_kernels.launch import Tile, rank_block
from fedsa_kernels.tiles import KERNELS, LARGEST_FUSED_RANK, Tiles, default_tiles

VARIABLE = "FEDSA_KERNEL_TABLE"
BACKENDS = ("reference", "cublas", "fused")
"""That an op can run on, see ``fedsa_kernels.dispatch``."""
OPS = ("lora_linear", "vera_linear", "lora_linears")
"""Of which a table has rows."""
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

    @property
    def default_tiles(self) -> Tiles:
        """Tiles that are safe for it anywhere."""
        return default_tiles(self.dtype, self.rank, self.d_in, self.d_out)

    def distance(self, measured: "Problem") -> float:
        """The largest factor between rows, a client's rows, widths or ranks, as a logarithm.

        Ranks count as blocks. Infinite for another op, another width of numbers, between one client
        and many, between widths that are multiples of 16 and others, for which tiles spill that fit
        the former, and where the measured rank is smaller: its tiles need not fit a larger one.
        """
        same = (
            self.op == measured.op
            and self.dtype.itemsize == measured.dtype.itemsize
            and rank_block(self.rank) <= rank_block(measured.rank)
            and (self.clients > 1) == (measured.clients > 1)
            and self._aligned == measured._aligned
        )
        if not same:
            return math.inf
        pairs = zip(self._sizes(), measured._sizes(), strict=True)
        return max(abs(math.log(a / b)) for a, b in pairs)

    def _sizes(self) -> tuple[int, ...]:
        own = -(-self.rows // self.clients)
        return self.rows, own, self.d_in, self.d_out, rank_block(self.rank)

    @property
    def _aligned(self) -> bool:
        return not (self.d_in % 16 or self.d_out % 16)


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


@dataclass(frozen=True, eq=False)
class Table:
    """Everything that was measured on a device; a key by identity.

    Args:
        rows: in no order; empty if nothing was measured.
    """

    rows: tuple[Measured, ...] = ()

    def with_row(self, row: Measured) -> "Table":
        """With a row more, instead of the one of the same problem."""
        others = (each for each in self.rows if each.problem != row.problem)
        return Table((*others, row))

    @classmethod
    def read(cls, path: Path) -> "Table":
        """What ``write`` wrote.

        Raises:
            ValueError: if it is no table.
        """
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(rows, list):
                raise TypeError("it holds no list of rows")
            return cls(tuple(_from_json(row) for row in rows))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no table of measured kernels: {error}") from error

    def write(self, path: Path) -> None:
        """Keep it, instead of what was there, which stays if this is cut short."""
        text = json.dumps([_as_json(row) for row in self.rows], indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(path)


_in_force: list[Table] = []
"""Not a context variable: gradients are made by other threads."""


@contextmanager
def in_force(table: Table) -> Iterator[None]:
    """Let a table decide, whatever the device is and whatever the environment names."""
    _in_force.append(table)
    try:
        yield
    finally:
        _in_force.pop()


def read_table(device: str) -> Table:
    """The table for a device, by its name; empty for none. A file is read once.

    Raises:
        ValueError: if the file that the environment variable names is none, or no table.
    """
    if _in_force:
        return _in_force[-1]
    if not device:
        return _EMPTY
    named = os.environ.get(VARIABLE)
    return _read(named, True) if named else _read(str(TABLES / f"{device}.json"), False)


_EMPTY = Table()


@cache
def _read(name: str, required: bool) -> Table:
    path = Path(name)
    if path.is_file():
        return Table.read(path)
    if required:
        raise ValueError(f"{VARIABLE} names {path}, which is no file")
    return _EMPTY


def _as_json(row: Measured) -> dict[str, Any]:
    sizes = asdict(row.problem) | {"dtype": str(row.problem.dtype).removeprefix("torch.")}
    return {**sizes, "fastest": row.fastest, "tiles": asdict(row.tiles)}


def _from_json(row: dict[str, Any]) -> Measured:
    """A kernel that the row does not name has its default tile."""
    _one_of(row, "op", OPS)
    _one_of(row, "dtype", ("float16", "bfloat16", "float32"))
    _one_of(row, "fastest", (*BACKENDS, APART) if row["op"] == "lora_linears" else BACKENDS)
    sizes = (_positive(row, name) for name in _SIZES)
    problem = Problem(row["op"], getattr(torch, row["dtype"]), *sizes)
    given = problem.default_tiles
    tiles = {name: getattr(given, name) for name in KERNELS} | {
        name: _tile(name, shape) for name, shape in row["tiles"].items()
    }
    if problem.rank > LARGEST_FUSED_RANK and tiles["fused"] is not None:
        raise ValueError(f"fused has no tile above rank {LARGEST_FUSED_RANK}")
    return Measured(problem, row["fastest"], Tiles(**tiles))


def _one_of(row: dict[str, Any], name: str, known: Sequence[str]) -> None:
    if row[name] not in known:
        raise ValueError(f"{name} is one of {', '.join(known)}, not {row[name]!r}")


_SIZES = ("rows", "d_in", "d_out", "rank", "clients")


def _positive(row: dict[str, Any], name: str) -> int:
    size = row[name]
    if type(size) is not int or size < 1:
        raise ValueError(f"{name} is a positive integer, not {size!r}")
    return size


def _tile(kernel: str, shape: dict[str, int] | None) -> Tile | None:
    if shape is not None:
        return Tile(**shape)
    if kernel not in ("both", "fused"):
        raise ValueError(f"{kernel} has no other way: it needs a tile")
    return None
