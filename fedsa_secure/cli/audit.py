"""``fedsa-secure audit``."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedsa_secure.cli import terminal
from fedsa_secure.config import TrainConfig

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Attack what dp_epsilon promises; status 1 if something is violated.",
)

Plot = Annotated[Path | None, typer.Option(help="draw proven against claimed ε into this PNG")]


@app.command("mechanism")
def _audit_mechanism(
    epsilon: Annotated[float, typer.Option(help="for the size of the noise that is tested")] = 8.0,
    trials: Annotated[int, typer.Option(min=100, help="releases in each of two worlds")] = 10_000,
    json: terminal.Json = None,
    plot: Plot = None,
) -> None:
    """Single releases through clip, noise, mask and sum; size and independence of the noise."""
    config = TrainConfig.build(dp_epsilon=epsilon)
    terminal.require_places(json=json, plot=plot)
    from fedsa_secure.audit import audit_mechanism

    with terminal.console.status("training"):
        findings = audit_mechanism(config, trials)
    _conclude(findings, json, plot)


@app.command("run")
def _audit_run(
    epsilon: Annotated[float, typer.Option(help="the claim")] = 8.0,
    canaries: Annotated[
        int | None, typer.Option(help="by default enough to refute the claim")
    ] = None,
    noise_multiplier: Annotated[
        float | None,
        typer.Option(min=0.0, help="train with this noise: 0 has to be caught", show_default=False),
    ] = None,
    json: terminal.Json = None,
    plot: Plot = None,
) -> None:
    """One real training with canaries in it, made for the audit only; minutes."""
    TrainConfig.build(dp_epsilon=epsilon)
    terminal.require_places(json=json, plot=plot)
    from fedsa_secure.audit import audit_run

    terminal.quiet_libraries()
    with terminal.console.status("training"):
        finding = audit_run(epsilon, canaries, noise_multiplier)
    terminal.console.print(
        f"{finding.right} of {finding.guesses} guesses right about {finding.trials} canaries; "
        f"noise multiplier {finding.noise_multiplier:g}",
        highlight=False,
    )
    _conclude([finding], json, plot)


@app.command("hidden-state")
def _audit_hidden_state(
    epsilon: Annotated[str, typer.Option(metavar="E,E,…", help="the claims")] = "1,8",
    trials: Annotated[int, typer.Option(min=100, help="trainings in each of two worlds")] = 4000,
    json: terminal.Json = None,
    plot: Plot = None,
) -> None:
    """The worst case: can state without noise carry a record into A? Every mode of protection."""
    claims = terminal.numbers("epsilon", epsilon, float)
    terminal.require_places(json=json, plot=plot)
    from fedsa_secure.audit import audit_hidden_state

    with terminal.console.status("training"):
        findings = audit_hidden_state(claims, trials)
    _conclude(findings, json, plot)


def _conclude(findings: Any, json: Path | None, plot: Path | None) -> None:
    """Table, files and exit status of an audit."""
    from fedsa_secure.audit import Finding, points_of, rows_of
    from fedsa_secure.reporting.audit import plot_audit
    from fedsa_secure.reporting.rows import write_rows

    claims = [each for each in findings if isinstance(each, Finding)]
    noise = [each for each in findings if not isinstance(each, Finding)]
    terminal.console.print(_claims_table(claims))
    if noise:
        terminal.console.print(_noise_table(noise))
    if json is not None:
        write_rows(json, rows_of(findings))
    if plot is not None:
        plot_audit(points_of(findings), plot)
    if any(each.verdict == "violated" for each in findings):
        raise typer.Exit(1)


def _claims_table(findings: Any) -> Table:
    rates = sorted({f"{each.false_alarm:g}" for each in findings})
    table = Table(title="ε", caption=f"false-alarm rate of each: {', '.join(rates)}")
    for heading in ("", "claimed", "proven", "most provable", "trials", "verdict"):
        table.add_column(heading, justify="left" if heading in ("", "verdict") else "right")
    for each in findings:
        figures = (each.claimed, each.proven, each.most_provable)
        cells = [format(figure, ".2f") for figure in figures]
        table.add_row(each.name, *cells, str(each.trials), each.verdict)
    return table


def _noise_table(findings: Any) -> Table:
    table = Table(caption=f"false-alarm rate of each: {findings[0].false_alarm:g}")
    for heading in ("", "value", "least", "largest", "verdict"):
        table.add_column(heading, justify="left" if heading in ("", "verdict") else "right")
    for each in findings:
        cells = [format(figure, ".3f") for figure in (each.value, each.low, each.high)]
        table.add_row(each.name, *cells, each.verdict)
    return table
