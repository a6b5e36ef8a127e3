"""The figure of what audits prove, beside what is claimed."""

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedsa_secure.errors import MissingExtraError
from fedsa_secure.files import write_atomic

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

_SIZE = (7.2, 4.2)
_DOTS_PER_INCH = 150
_ABOVE = 1.3
_MARKERS = "osD^v<>ph*"


@dataclass(frozen=True)
class AuditPoint:
    """What one audit found out.

    Args:
        name: of the audit.
        claimed: ε that is promised.
        proven: its lower bound.
        most_provable: the largest bound that the audit could have given.
    """

    name: str
    claimed: float
    proven: float
    most_provable: float


def plot_audit(points: Sequence[AuditPoint], path: Path) -> None:
    """Draw proven against claimed ε, with the most provable values as lines, as a PNG file.

    A point above the diagonal is a broken promise; a claim that no line reaches is inconclusive.
    The same values give the same bytes (with one version of matplotlib).

    Args:
        points: at least one.
        path: the file to write, in a folder that exists.

    Raises:
        ValueError: if there is no point.
        MissingExtraError: if ``matplotlib`` is not installed.
        CheckpointError: if the file cannot be written.
    """
    if not points:
        raise ValueError("there is no audit to plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "report")
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    with style.context("default"):
        figure = _draw(points)
        FigureCanvasAgg(figure)
        # Without an entry for Software, which would name the version of matplotlib.
        figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def _draw(points: Sequence[AuditPoint]) -> "matplotlib.figure.Figure":
    """The figure, with one axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    top = _ABOVE * max(max(point.claimed, point.proven) for point in points)
    axes.fill_between([0, top], [0, top], top, color="tab:red", alpha=0.08, linewidth=0)
    axes.plot([0, top], [0, top], color="tab:red", linewidth=1, label="proven = claimed")
    _draw_most_provable(axes, points, top)
    names = list(dict.fromkeys(point.name for point in points))
    for number, name in enumerate(names):
        own = [point for point in points if point.name == name]
        axes.plot(
            [point.claimed for point in own],
            [point.proven for point in own],
            linestyle="none",
            marker=_MARKERS[number % len(_MARKERS)],
            color=f"C{number % 10}",
            label=name,
        )
    axes.set(xlim=(0, top), ylim=(0, top), xlabel="claimed ε", ylabel="proven ε")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def _draw_most_provable(
    axes: "matplotlib.axes.Axes", points: Sequence[AuditPoint], top: float
) -> None:
    """One line for each value; one that is beyond the axes shows at their end."""
    for value in sorted({round(point.most_provable, 2) for point in points}):
        axes.axhline(
            min(value, top),
            color="black",
            linestyle="--",
            linewidth=1,
            label=f"most provable: {value:.2f}",
        )
