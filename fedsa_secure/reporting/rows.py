"""One row per figure, the same for all measurements."""

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from fedsa_secure.files import write_atomic


class Row(BaseModel):
    """One measured figure.

    Args:
        name: what was measured, with its size.
        n: clients; of an audit trials.
        value: the figure.
        unit: of the figure.
        baseline: what it is compared with, or None.
        ratio_to_baseline: value over the baseline's; below 1 it is less than the baseline's.
        ratio_to_bound: value over what the same work takes at least in the same run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    n: int
    value: float
    unit: str
    baseline: str | None = None
    ratio_to_baseline: float | None = None
    ratio_to_bound: float | None = None


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows as a JSON list of objects, replacing the file in one step.

    Raises:
        CheckpointError: if it cannot be written.
    """
    content = json.dumps([row.model_dump() for row in rows], indent=1)
    write_atomic(path, content.encode() + b"\n")
