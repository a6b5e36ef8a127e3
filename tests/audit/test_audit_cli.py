"""`fedsa-secure audit`: tables, files and the exit status."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import fedsa_secure.audit
from fedsa_secure.audit import Finding, NoiseFinding, RunFinding, points_of, rows_of
from fedsa_secure.cli import app
from fedsa_secure.errors import ConfigError
from fedsa_secure.reporting.audit import AuditPoint, _draw, plot_audit

COMMANDS = {
    "mechanism": "audit_mechanism",
    "run": "audit_run",
    "hidden-state": "audit_hidden_state",
}


def finding(proven: float, most: float = 9.0) -> Finding:
    return Finding(
        name="made up",
        claimed=8.0,
        proven=proven,
        most_provable=most,
        delta=1e-5,
        trials=100,
        false_alarm=0.05,
    )


def noise(value: float) -> NoiseFinding:
    return NoiseFinding(name="noise", value=value, low=0.9, high=1.1, samples=50, false_alarm=0.001)


def invoke(command: str, found: Any, patch: pytest.MonkeyPatch, *options: str) -> Any:
    """The command, with the audit's result given; as it sees it, a run has one finding."""
    if command == "run":
        found = RunFinding(
            **found[0].model_dump(exclude={"verdict"}), guesses=90, right=80, noise_multiplier=1.5
        )
    patch.setattr(fedsa_secure.audit, COMMANDS[command], lambda *_: found)
    return CliRunner().invoke(app, ["audit", command, *options])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("proven", "most", "verdict", "status"),
    [
        (7.5, 9.0, "holds", 0),
        (8.5, 9.0, "violated", 1),
        (2.0, 5.0, "inconclusive", 0),
    ],
)
def test_status_and_verdict(
    command: str,
    proven: float,
    most: float,
    verdict: str,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = invoke(command, [finding(proven, most)], monkeypatch)
    assert done.exit_code == status, done.output
    for shown in (verdict, "8.00", f"{proven:.2f}", f"{most:.2f}"):
        assert shown in done.output


@pytest.mark.parametrize(("value", "status"), [(1.0, 0), (0.5, 1), (1.5, 1)])
def test_noise_counts_for_the_status(
    value: float, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = invoke("mechanism", [finding(7.0), noise(value)], monkeypatch)
    assert done.exit_code == status
    assert f"{value:.3f}" in done.output


def test_files_are_written_also_if_something_is_violated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, figure = tmp_path / "rows.json", tmp_path / "audit.png"
    findings = [finding(8.5), noise(1.0)]
    options = ("--json", str(rows), "--plot", str(figure))
    assert invoke("mechanism", findings, monkeypatch, *options).exit_code == 1
    written = json.loads(rows.read_bytes())
    assert written == [row.model_dump() for row in rows_of(findings)]
    values = {row["name"]: row for row in written}
    assert values["made up: proven"]["value"] == 8.5
    assert values["made up: proven"]["baseline"] == "made up: claimed"
    assert values["made up: proven"]["ratio_to_baseline"] == 8.5 / 8.0
    assert values["made up: most provable"]["value"] == 9.0
    assert values["made up: proven"]["unit"] == "ε at δ=1e-05"
    assert values["noise: measured"]["ratio_to_baseline"] == pytest.approx(1 / 1.1)
    with Image.open(figure) as image:
        image.load()
        assert image.text == {}


def test_the_options_reach_the_audits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def note(result: Any) -> Any:
        return lambda *given: (seen.append(given), result)[1]

    run = RunFinding(
        **finding(1.0).model_dump(exclude={"verdict"}), guesses=9, right=8, noise_multiplier=0.0
    )
    for name, result in (
        ("audit_mechanism", [finding(1.0)]),
        ("audit_run", run),
        ("audit_hidden_state", [finding(1.0)]),
    ):
        monkeypatch.setattr(fedsa_secure.audit, name, note(result))
    for line in (
        "mechanism --trials 200 --epsilon 3",
        "run --epsilon 2 --canaries 500 --noise-multiplier 0",
        "hidden-state --epsilon 1,3 --trials 300",
    ):
        assert CliRunner().invoke(app, ["audit", *line.split()]).exit_code == 0
    (config, trials), given, claims = seen
    assert (config.dp_epsilon, trials) == (3.0, 200)
    assert given == (2.0, 500, 0.0)
    assert claims == ([1.0, 3.0], 300)


@pytest.mark.parametrize("command", COMMANDS)
def test_places_are_refused_before_anything_is_trained(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("it was trained")

    monkeypatch.setattr(fedsa_secure.audit, COMMANDS[command], never)
    for option in ("--json", "--plot"):
        done = CliRunner().invoke(app, ["audit", command, option, str(tmp_path / "no" / "file")])
        assert isinstance(done.exception, ConfigError)


def test_a_real_audit_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsa_secure.audit.mechanism._NOISE_SHAPE", (2, 3, 8))
    monkeypatch.setattr("fedsa_secure.audit.mechanism.calibrated", lambda *_: 2.1)
    rows = tmp_path / "rows.json"
    done = CliRunner().invoke(app, ["audit", "mechanism", "--trials", "100", "--json", str(rows)])
    # 15 findings, each wrong with a probability of at most one in a thousand.
    assert done.exit_code == 0, done.output
    assert len(json.loads(rows.read_bytes())) == 3 * 15


def test_the_figure_shows_what_is_given() -> None:
    points = [AuditPoint("a", 1.0, 0.6, 9.5), AuditPoint("a", 8.0, 7.8, 9.5)]
    points.append(AuditPoint("b", 8.0, 8.4, 40.0))
    figure = _draw(points)
    [axes] = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["a"].get_xdata()) == [1.0, 8.0]
    assert list(lines["a"].get_ydata()) == [0.6, 7.8]
    assert list(lines["b"].get_ydata()) == [8.4]
    assert set(lines["most provable: 9.50"].get_ydata()) == {9.5}
    top = axes.get_ylim()[1]
    assert set(lines["most provable: 40.00"].get_ydata()) == {top}  # beyond the axes
    low, high = lines["proven = claimed"].get_xydata()
    assert low[0] == low[1]
    assert high[0] == high[1] == top > 8.4
    shown = {text.get_text() for text in figure.legends[0].get_texts()}
    assert set(lines) == shown


def test_the_same_points_give_the_same_bytes(tmp_path: Path) -> None:
    points = points_of([finding(7.0), noise(1.0), finding(3.0)])
    assert len(points) == 2
    for name in ("a.png", "b.png"):
        plot_audit(points, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(ValueError, match="no audit"):
        plot_audit([], tmp_path / "none.png")
