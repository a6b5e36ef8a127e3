"""The figure of the similarity of A and of B across clients, layer by layer.

Source: Guo et al. (ICLR 2025, arXiv 2410.01463), figures 2-6. The dashed line, A without its common
start, is an addition.
"""

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedsa_secure.errors import MissingExtraError
from fedsa_secure.federation.similarity import LayerSimilarity
from fedsa_secure.files import write_atomic

if TYPE_CHECKING:
    import matplotlib.figure

_LOW, _HIGH = -0.05, 1.05
_INCHES_PER_LAYER, _INCHES_AROUND, _HEIGHT = 0.22, 1.2, 3.6
_DOTS_PER_INCH = 150
_STYLES = {
    "a": {"label": "A", "color": "tab:blue", "marker": "o", "linestyle": "-"},
    "b": {"label": "B", "color": "tab:orange", "marker": "s", "linestyle": "-"},
    "a_update": {
        "label": "A - A₀ (without the common start)",
        "color": "tab:blue",
        "marker": "^",
        "linestyle": "--",
    },
}


def plot_similarity(levels: Mapping[str, Sequence[LayerSimilarity]], path: Path) -> None:
    """Draw one panel per level of heterogeneity and write them as one PNG file.

    The same values give the same bytes (with one version of matplotlib), whatever style the caller
    has set; pyplot is not touched.

    Args:
        levels: the layers of every level, by the title of its panel; at least one level.
        path: the file to write, in a folder that exists.

    Raises:
        ValueError: if there is no level.
        MissingExtraError: if ``matplotlib`` is not installed.
        CheckpointError: if the file cannot be written.
    """
    if not levels:
        raise ValueError("there is no level of heterogeneity to plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "report")
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    with style.context("default"):
        figure = _draw(levels)
        FigureCanvasAgg(figure)
        # Without an entry for Software, which would name the version of matplotlib.
        figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def _draw(levels: Mapping[str, Sequence[LayerSimilarity]]) -> "matplotlib.figure.Figure":
    """The figure, with one axes per level."""
    from matplotlib.figure import Figure

    longest = max(len(layers) for layers in levels.values())
    width = _INCHES_AROUND + _INCHES_PER_LAYER * longest
    size = (max(width, _HEIGHT) * len(levels), _HEIGHT)
    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(1, len(levels), sharey=True, squeeze=False)[0]
    for axes, (title, layers) in zip(panels, levels.items(), strict=True):
        places = range(len(layers))
        for field, look in _STYLES.items():
            values = [getattr(layer, field) for layer in layers]
            axes.plot(places, values, markersize=4, linewidth=1.2, **look)
        axes.set_xticks(places, _short_names([s.layer for s in layers]), rotation=90, fontsize=7)
        axes.set(title=title, xlabel="layer")
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylim(_bottom(levels), _HIGH)
    panels[0].set_ylabel("mean pairwise cosine similarity")
    figure.legend(handles=panels[0].get_lines(), loc="outside upper center", ncols=len(_STYLES))
    return figure


def _bottom(levels: Mapping[str, Sequence[LayerSimilarity]]) -> float:
    """The lower end of the y axis: lower than usual where there are negative similarities."""
    values = [v for layers in levels.values() for s in layers for v in (s.a, s.b, s.a_update)]
    return min(_LOW, min(values, default=0.0) + _LOW)


def _short_names(paths: Sequence[str]) -> list[str]:
    """What tells the layers apart: their paths without the parts that all of them share."""
    parts = [path.split(".") for path in paths]
    if len({len(names) for names in parts}) != 1 or len(paths) == 1:
        return list(paths)
    telling = [k for k, names in enumerate(zip(*parts, strict=True)) if len(set(names)) > 1]
    return [" ".join(names[k] for k in telling) for names in parts]
