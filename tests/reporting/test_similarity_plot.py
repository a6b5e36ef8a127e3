"""The figure of similarity: what it shows, and that the same values give the same bytes."""

import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from fedsa_secure.errors import CheckpointError, MissingExtraError
from fedsa_secure.federation.similarity import LayerSimilarity
from fedsa_secure.reporting.similarity import _draw, plot_similarity

PATHS = [f"bert.layer.{k}.self.{part}" for k in (0, 1) for part in ("query", "value")]
NAMES = ["0 query", "0 value", "1 query", "1 value"]
LEVELS = {
    "iid": [LayerSimilarity(p, 0.99 - k / 100, 0.7 - k / 10, 0.8) for k, p in enumerate(PATHS)],
    "dirichlet:0.5": [LayerSimilarity(p, 0.95, k / 7, k / 5) for k, p in enumerate(PATHS)],
}


def test_lines_show_the_values_given() -> None:
    panels = _draw(LEVELS).axes
    assert [panel.get_title() for panel in panels] == list(LEVELS)
    for panel, layers in zip(panels, LEVELS.values(), strict=True):
        drawn = {line.get_label()[:6].strip(): line for line in panel.get_lines()}
        assert list(drawn) == ["A", "B", "A - A₀"]
        for line, field in zip(drawn.values(), ("a", "b", "a_update"), strict=True):
            assert list(line.get_xdata()) == [0, 1, 2, 3]
            assert list(line.get_ydata()) == [getattr(layer, field) for layer in layers]
            assert line.get_marker() not in ("", "None")
        assert [line.get_linestyle() for line in drawn.values()] == ["-", "-", "--"]
        assert [text.get_text() for text in panel.get_xticklabels()] == NAMES


def test_the_legend_names_every_line_as_it_is_drawn() -> None:
    figure = _draw(LEVELS)
    [legend] = figure.legends
    for shown, line in zip(legend.get_lines(), figure.axes[1].get_lines(), strict=True):
        assert shown.get_label() == line.get_label()
        assert to_hex(shown.get_color()) == to_hex(line.get_color())
        assert shown.get_linestyle() == line.get_linestyle()


@pytest.mark.parametrize(("lowest", "bottom"), [(0.3, -0.05), (-0.02, -0.07), (-0.8, -0.85)])
def test_panels_share_an_axis_that_holds_all_values(lowest: float, bottom: float) -> None:
    low = {**LEVELS, "low": [LayerSimilarity("x", 0.9, lowest, 0.5)]}
    for panel in _draw(low).axes:
        assert panel.get_ylim() == pytest.approx((bottom, 1.05))


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["enc.0.query"], ["enc.0.query"]),
        (["enc.0.query", "enc.11.query"], ["0", "11"]),
        (["enc.0.query", "dec.query"], ["enc.0.query", "dec.query"]),
    ],
    ids=["one layer", "equal depth", "unequal depth"],
)
def test_ticks_name_what_tells_the_layers_apart(paths: list[str], names: list[str]) -> None:
    [panel] = _draw({"iid": [LayerSimilarity(path, 1.0, 0.5, 0.5) for path in paths]}).axes
    assert [text.get_text() for text in panel.get_xticklabels()] == names


def test_the_file_is_a_png_without_words_about_its_making(tmp_path: Path) -> None:
    plot_similarity(LEVELS, tmp_path / "similarity.png")
    with Image.open(tmp_path / "similarity.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.text == {}
        assert len(image.getcolors(maxcolors=1 << 24)) > 50  # more than an empty sheet
    assert [path.name for path in tmp_path.iterdir()] == ["similarity.png"]


def test_the_same_values_give_the_same_bytes_in_any_style(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would raise
    files = [tmp_path / name for name in ("first.png", "styled.png", "other.png")]
    plot_similarity(LEVELS, files[0])
    for option, value in {"lines.linewidth": 9, "font.size": 20, "savefig.dpi": 30}.items():
        monkeypatch.setitem(matplotlib.rcParams, option, value)
    plot_similarity(LEVELS, files[1])
    plot_similarity({**LEVELS, "iid": LEVELS["dirichlet:0.5"]}, files[2])
    first, styled, other = (file.read_bytes() for file in files)
    assert first == styled
    assert first != other
    assert matplotlib.rcParams["font.size"] == 20  # the caller's style is as it was


def test_no_level_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no level"):
        plot_similarity({}, tmp_path / "similarity.png")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        plot_similarity(LEVELS, tmp_path / "none" / "similarity.png")


def test_missing_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"matplotlib.*fedsa-secure\[report\]"):
        plot_similarity(LEVELS, tmp_path / "similarity.png")
