"""The command line. The only place that prints."""

import inspect
import logging
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedsa_secure.config import TrainConfig, read_options
from fedsa_secure.errors import FedSAError

# torch, transformers and datasets take seconds to import; --help and typing errors do not wait for
# them, so what needs them is imported where it is used.

_app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Federated LoRA in which only the A matrices leave a client.",
)
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
        shown = "" if field.default_factory else f" [default: {default}]"
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


_app.command("train")(_with_options(_train))


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
        text = f"loss {record.loss:.3f}"
        if record.accuracy is not None:
            text += f"  accuracy {record.accuracy:.1%}"
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=text)
        else:
            _console.print(f"round {record.round}/{self._rounds}  {text}", highlight=False)

    def finished(self) -> None:
        self.seconds = time.perf_counter() - self._begun
        if self._bar is not None:
            self._bar.stop()


def _show(run: Any, seconds: float | None) -> None:
    """The table at the end of a run."""
    sent = run.history[-1].uplink_bytes
    table = Table(title=f"personal models, {run.config.method}-{run.config.adapter}")
    # Short names: the table fits into 80 characters.
    for column in ("client", "train", "test", "acc.", "F1", "majority", "common", "bytes up"):
        table.add_column(column, justify="right")
    for m in run.metrics:
        table.add_row(
            str(m.client),
            str(m.train_rows),
            str(m.test_rows),
            *_shares(m.accuracy, m.macro_f1, m.majority, m.common_accuracy),
            f"{sent:,}",
        )
    table.add_section()
    table.add_row(
        "mean",
        f"{sum(m.train_rows for m in run.metrics) / len(run.metrics):.0f}",
        f"{sum(m.test_rows for m in run.metrics) / len(run.metrics):.0f}",
        *_shares(run.accuracy, run.macro_f1, run.majority, run.common_accuracy),
        f"{sent:,}",
    )
    _console.print(table)
    _console.print(
        "train, test: rows; acc., F1: accuracy and macro F1 on the client's own test rows; "
        "majority: accuracy of always answering their most frequent class; common: accuracy on "
        "class-balanced test rows that are the same for all; bytes up: sent per round",
        highlight=False,
    )
    if seconds is not None:
        _console.print(f"{seconds:.0f} s for the rounds run now", highlight=False)
    _console.print(
        f"personal adapters in PEFT's format: {run.path / 'adapters'}",
        highlight=False,
        markup=False,
    )


def _shares(*values: float | None) -> list[str]:
    return ["–" if value is None else f"{value:.1%}" for value in values]


def _quiet_libraries() -> None:
    """Leave the screen to the progress bar."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
