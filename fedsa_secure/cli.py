"""The command line. The only place that prints."""

import inspect
import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedsa_secure.config import TrainConfig, read_options
from fedsa_secure.errors import ConfigError, FedSAError
from fedsa_secure.federation.privacy_report import PROMISE

# torch, transformers and datasets take seconds to import; --help and typing errors do not wait for
# them, so what needs them is imported where it is used.

_app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Federated LoRA in which only the A matrices leave a client.",
)
_keys = typer.Typer(no_args_is_help=True, help="Long-term identities of clients.")
_app.add_typer(_keys, name="keys")
_console = Console()

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="folder of the run")]


def main() -> None:
    """Entry point: errors of this library end with one line and status 2."""
    try:
        _app()
    except FedSAError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
        sys.exit(2)


def _train(config: Path | None, **options: str | None) -> None:
    """Train; without arguments the embedded model on the embedded data, in minutes, offline."""
    given = read_options(config) if config is not None else {}
    given |= {name: value for name, value in options.items() if value is not None}
    TrainConfig.build(**given)  # a wrong option is refused at once
    from fedsa_secure.runtimes.api import train

    _quiet_libraries()
    progress = _Progress()
    _show(train(observers=[progress], **given), progress.seconds)


def _with_options(function: Any) -> Any:
    """Give a command one option per field of ``TrainConfig``."""
    parameters = [
        inspect.Parameter(
            "config",
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None,
            annotation=Annotated[
                Path | None, typer.Argument(metavar="[CONFIG.toml]", help="options in a file")
            ],
        )
    ]
    for name, field in TrainConfig.model_fields.items():
        default = "none" if field.default is None else str(field.default)
        told = field.default_factory or "[default:" in (field.description or "")
        shown = "" if told else f" [default: {default}]"
        option = typer.Option(
            f"--{name.replace('_', '-')}",
            metavar="VALUE",
            help=f"{field.description}{shown}",
            show_default=False,
        )
        annotation = Annotated[str | None, option]
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
            )
        )
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


_app.command("train", epilog=f"With dp_epsilon: {PROMISE}")(_with_options(_train))


@_app.command("resume")
def _resume(run_dir: RunDir) -> None:
    """Go on with a run that was interrupted."""
    from fedsa_secure.runtimes.api import resume

    _quiet_libraries()
    progress = _Progress()
    _show(resume(run_dir, observers=[progress]), progress.seconds)


@_app.command("evaluate")
def _evaluate(run_dir: RunDir) -> None:
    """Measure the personal models of a finished run again."""
    from fedsa_secure.runtimes.api import evaluate

    _quiet_libraries()
    _show(evaluate(run_dir), None)


_bench_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Measure this library on this machine."
)
_app.add_typer(_bench_app, name="bench")


@_bench_app.command("secagg")
def _bench_secagg(
    clients: Annotated[
        str, typer.Option(metavar="N,N,…", help="cohort sizes, each at least 3")
    ] = "3,10,50,100,200,1000",
    values: Annotated[int, typer.Option(help="values in a vector")] = 1_000_000,
    large: Annotated[
        bool, typer.Option("--large", help="also the memory of masking 100 million values")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="write the rows to this file")] = None,
) -> None:
    """Time secure aggregation beside its bound and, where it is installed, Flower's SecAgg+."""
    from fedsa_secure.bench import bench_secagg, seed_note, write_rows

    try:
        sizes = [int(size) for size in clients.split(",")]
    except ValueError:
        raise ConfigError(
            "clients", f"{clients!r} is no list of numbers", "write such as 3,10,100"
        ) from None
    _require_places(json=json)
    with _console.status("") as status:
        rows = bench_secagg(sizes, values, large, status.update)
    _console.print(_bench_table("secure aggregation", rows, ("of Flower", "of bound")))
    for line in (*_BENCH_LEGEND, seed_note(rows)):
        _console.print(line, highlight=False)
    if json is not None:
        write_rows(json, rows)


@_bench_app.command("dp")
def _bench_dp(
    sizes: Annotated[
        str, typer.Option(metavar="TxB,…", help="tokens of a record x records of a batch")
    ] = "128x8,32x16,512x2,6x64",
    json: Annotated[Path | None, typer.Option(help="write the rows to this file")] = None,
) -> None:
    """Time a private training step beside the plain one, and Opacus' beside PEFT's."""
    from fedsa_secure.bench import write_rows
    from fedsa_secure.bench.dp import bench_dp, size_of

    wanted = [size_of(size) for size in sizes.split(",")]
    _require_places(json=json)
    with _console.status("") as status:
        rows = bench_dp(wanted, status.update)
    _console.print(_bench_table("a private training step", rows, ("of plain",)))
    if json is not None:
        write_rows(json, rows)


_BENCH_LEGEND = (
    "k: neighbours; of Flower: time over that of Flower's client with as many neighbours",
    "of bound: time over that of k + 1 AES-256-CTR streams and additions with as many threads",
)


def _bench_table(title: str, rows: Any, ratios: tuple[str, ...]) -> Table:
    table = Table(title=title)
    for heading in ("n", "", "value", "unit", *ratios):
        table.add_column(heading, justify="left" if heading in ("", "unit") else "right")
    last = None
    for row in rows:
        if last not in (None, row.n):
            table.add_section()
        last = row.n
        cells = (_cell(row.ratio_to_baseline, ".3f"), _cell(row.ratio_to_bound, ".2f"))
        table.add_row(
            str(row.n),
            row.name,
            f"{row.value:,.0f}" if row.value >= 1000 else f"{row.value:.3g}",
            row.unit,
            *cells[: len(ratios)],
        )
    return table


_audit_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Attack what dp_epsilon promises; status 1 if something is violated.",
)
_app.add_typer(_audit_app, name="audit")

Json = Annotated[Path | None, typer.Option(help="write the rows to this file")]
Plot = Annotated[Path | None, typer.Option(help="draw proven against claimed ε into this PNG")]


@_audit_app.command("mechanism")
def _audit_mechanism(
    epsilon: Annotated[float, typer.Option(help="for the size of the noise that is tested")] = 8.0,
    trials: Annotated[int, typer.Option(min=100, help="releases in each of two worlds")] = 10_000,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Single releases through clip, noise, mask and sum; size and independence of the noise."""
    config = TrainConfig.build(dp_epsilon=epsilon)
    _require_places(json=json, plot=plot)
    from fedsa_secure.audit import audit_mechanism

    with _console.status("training"):
        findings = audit_mechanism(config, trials)
    _conclude(findings, json, plot)


@_audit_app.command("run")
def _audit_run(
    epsilon: Annotated[float, typer.Option(help="the claim")] = 8.0,
    canaries: Annotated[
        int | None, typer.Option(help="by default enough to refute the claim")
    ] = None,
    noise_multiplier: Annotated[
        float | None,
        typer.Option(min=0.0, help="train with this noise: 0 has to be caught", show_default=False),
    ] = None,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """One real training with canaries in it, made for the audit only; minutes."""
    TrainConfig.build(dp_epsilon=epsilon)
    _require_places(json=json, plot=plot)
    from fedsa_secure.audit import audit_run

    _quiet_libraries()
    with _console.status("training"):
        finding = audit_run(epsilon, canaries, noise_multiplier)
    _console.print(
        f"{finding.right} of {finding.guesses} guesses right about {finding.trials} canaries; "
        f"noise multiplier {finding.noise_multiplier:g}",
        highlight=False,
    )
    _conclude([finding], json, plot)


@_audit_app.command("hidden-state")
def _audit_hidden_state(
    epsilon: Annotated[str, typer.Option(metavar="E,E,…", help="the claims")] = "1,8",
    trials: Annotated[int, typer.Option(min=100, help="trainings in each of two worlds")] = 4000,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """The worst case: can state without noise carry a record into A? Every mode of protection."""
    claims = _numbers("epsilon", epsilon)
    _require_places(json=json, plot=plot)
    from fedsa_secure.audit import audit_hidden_state

    with _console.status("training"):
        findings = audit_hidden_state(claims, trials)
    _conclude(findings, json, plot)


def _numbers(option: str, given: str) -> list[float]:
    try:
        return [float(number) for number in given.split(",")]
    except ValueError:
        raise ConfigError(option, f"{given!r} is no list of numbers", "write such as 1,8") from None


def _require_places(**files: Path | None) -> None:
    """Refuse files that cannot be written before anything is measured; by option."""
    for option, path in files.items():
        if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
            raise ConfigError(
                option, f"cannot write {path}", "give a file in a folder that is there"
            )


def _conclude(findings: Any, json: Path | None, plot: Path | None) -> None:
    """Table, files and exit status of an audit."""
    from fedsa_secure.audit import Finding, points_of, rows_of
    from fedsa_secure.reporting.audit import plot_audit
    from fedsa_secure.reporting.rows import write_rows

    claims = [each for each in findings if isinstance(each, Finding)]
    noise = [each for each in findings if not isinstance(each, Finding)]
    _console.print(_claims_table(claims))
    if noise:
        _console.print(_noise_table(noise))
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


@_app.command("methods")
def _methods() -> None:
    """List what every method trains, sends and keeps, as a Markdown table."""
    from fedsa_secure.methods import methods_table

    typer.echo(methods_table())


@_keys.command("new")
def _new_identity(
    path: Annotated[Path, typer.Argument(help="where the private key goes; mode 0600")],
) -> None:
    """Make the long-term identity of a client, and print its public key."""
    from fedsa_secure.secagg import Identity

    identity = Identity.new()
    identity.save(path)
    typer.echo(identity.public_key.hex())


@_keys.command("show")
def _show_identity(
    path: Annotated[Path, typer.Argument(help="file of a private key")],
) -> None:
    """Print the public key of an identity, for the other clients' rosters."""
    from fedsa_secure.secagg import Identity

    typer.echo(Identity.load(path).public_key.hex())


@_keys.command("register")
def _register_identity(
    roster: Annotated[Path, typer.Argument(help="the roster, made if it does not exist")],
    client: Annotated[int, typer.Argument(min=0, help="number of the client")],
    public_key: Annotated[str, typer.Argument(help="as 'keys show' prints it")],
) -> None:
    """Put a client on a roster. Every client keeps a roster of its own and sends it to nobody."""
    from fedsa_secure.secagg import register

    for number, key in sorted(register(roster, client, public_key).items()):
        typer.echo(f"{number}  {key.hex()}")


class _Progress:
    """A bar on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._bar: Progress | None = None

    def started(self, config: TrainConfig, folder: Path, rounds_done: int) -> None:
        self._rounds, self._begun = config.rounds, time.perf_counter()
        _console.print(
            f"{config.method}-{config.adapter}: {config.clients} clients, {config.rounds} rounds "
            f"of {config.local_steps} local steps; run folder {folder}",
            highlight=False,
            markup=False,
        )
        if _console.is_terminal:
            self._bar = Progress(
                TextColumn("round"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=_console,
            )
            self._task = self._bar.add_task("", total=config.rounds, completed=rounds_done)
            self._bar.start()

    def round_finished(self, record: Any, timing: Any) -> None:
        text = "lost" if not record.survivors else ""
        if record.loss is not None:
            text = f"loss {record.loss:.3f}"
        if record.epsilon is not None:
            text += f"  ε spent {record.epsilon:.2f}"
        if record.accuracy is not None:
            text += f"  accuracy {record.accuracy:.1%}"
        elif record.test_loss is not None:
            text += f"  test loss {record.test_loss:.3f}"
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=text)
        else:
            _console.print(f"round {record.round}/{self._rounds}  {text}", highlight=False)

    def finished(self) -> None:
        self.seconds = time.perf_counter() - self._begun
        if self._bar is not None:
            self._bar.stop()


# Columns of the table at the end of a run: heading, metric, format. Short headings: the table has
# to fit into 80 characters.
_COLUMNS = (
    ("train", "train_rows", ".0f"),
    ("test", "test_rows", ".0f"),
    ("loss", "loss", ".3f"),
    ("acc.", "accuracy", ".1%"),
    ("F1", "macro_f1", ".1%"),
    ("majority", "majority", ".1%"),
    ("others", "cross_accuracy", ".1%"),
    ("common", "common_accuracy", ".1%"),
    ("others' loss", "cross_loss", ".3f"),
    ("common loss", "common_loss", ".3f"),
)
_INSTEAD = {"cross_loss": "cross_accuracy", "common_loss": "common_accuracy"}
"""Losses that are shown where there is no accuracy."""
_LEGEND = {
    "train": "rows trained on",
    "test": "rows of the client's own test part",
    "loss": "cross-entropy there",
    "acc.": "accuracy there (generation: answers that are right)",
    "F1": "macro F1 there",
    "majority": "accuracy of always answering its most frequent class",
    "others": "accuracy of the same model on the other clients' test rows",
    "common": "accuracy on test rows that are the same for all",
    "others' loss": "loss of the same model on the other clients' test rows",
    "common loss": "loss on test rows that are the same for all",
}


def _show(run: Any, seconds: float | None) -> None:
    """What a run came to: a table of its personal models, best and last round, and where it is."""
    measured = {c[1] for c in _COLUMNS if any(getattr(m, c[1]) is not None for m in run.metrics)}
    columns = [c for c in _COLUMNS if c[1] in measured and _INSTEAD.get(c[1]) not in measured]
    table = Table(title=f"personal models, {run.config.method}-{run.config.adapter}")
    table.add_column("client", justify="right")
    for heading, _, _ in columns:
        table.add_column(heading, justify="right")
    for m in run.metrics:
        cells = [_cell(getattr(m, name), form) for _, name, form in columns]
        table.add_row(str(m.client), *cells)
    table.add_section()
    means = [_cell(_mean([getattr(m, name) for m in run.metrics]), f) for _, name, f in columns]
    table.add_row("mean", *means)
    _console.print(table)
    legend = "; ".join(f"{heading}: {_LEGEND[heading]}" for heading, _, _ in columns)
    _console.print(legend, highlight=False)
    for line in _rounds(run, seconds):
        _console.print(line, highlight=False)
    _console.print(
        f"personal adapters in PEFT's format: {run.path / 'adapters'}",
        highlight=False,
        markup=False,
    )


def _rounds(run: Any, seconds: float | None) -> list[str]:
    """Best and last round, bytes and time."""
    last, best = run.history[-1], run.best
    lines = [
        f"last round {last.round}: {_round_scores(last)}; best round {best.round}: "
        f"{_round_scores(best)} (chosen on the test rows themselves, so optimistic)",
        f"each client sends {last.uplink_bytes:,} bytes a round{_seen_by_server(run)}",
    ]
    lost = [record.round for record in run.history if not record.survivors]
    aborts = [abort for record in run.history for abort in record.aborts]
    if aborts:
        lines.append(
            f"attempts aborted: {len(aborts)}, rounds lost: {lost or 'none'}; {aborts[-1]}"
        )
    if run.privacy is not None:
        lines.append(run.privacy.statement)
        lines.append("the scores above are measured by the simulation and are not covered")
    if seconds is not None:
        lines.append(f"{seconds:.0f} s for the rounds run now")
    return lines


def _seen_by_server(run: Any) -> str:
    if not run.history[-1].uplink_bytes:
        return ""
    secure = run.config.secure_aggregation
    return ", masked: the server sees sums only" if secure else ", in the clear"


def _round_scores(record: Any) -> str:
    accuracy = "" if record.accuracy is None else f"accuracy {record.accuracy:.1%}, "
    return f"{accuracy}test loss {record.test_loss:.3f}"


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _cell(value: float | int | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _quiet_libraries() -> None:
    """Leave the screen to the progress bar."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
