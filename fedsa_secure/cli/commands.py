"""All commands: training here, the rest in files of their own."""

import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedsa_secure.cli import audit, bench, keys, terminal
from fedsa_secure.cli.progress import RoundProgress
from fedsa_secure.cli.results import show
from fedsa_secure.config import TrainConfig, read_options
from fedsa_secure.errors import FedSAError
from fedsa_secure.federation.privacy_report import PROMISE

# torch, transformers and datasets take seconds to import; --help and typing errors do not wait for
# them, so what needs them is imported where it is used.

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Federated LoRA in which only the A matrices leave a client.",
)
app.add_typer(keys.app, name="keys")
app.add_typer(bench.app, name="bench")
app.add_typer(audit.app, name="audit")

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="folder of the run")]


def main() -> None:
    """Entry point: errors of this library end with one line and status 2."""
    try:
        app()
    except FedSAError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
        sys.exit(2)


def _train(config: Path | None, **options: str | None) -> None:
    """Train; without arguments the embedded model on the embedded data, in minutes, offline."""
    given = read_options(config) if config is not None else {}
    given |= {name: value for name, value in options.items() if value is not None}
    TrainConfig.build(**given)  # a wrong option is refused at once
    from fedsa_secure.runtimes.api import train

    terminal.quiet_libraries()
    progress = RoundProgress()
    show(train(observers=[progress], **given), progress.seconds)


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


app.command("train", epilog=f"With dp_epsilon: {PROMISE}")(_with_options(_train))


@app.command("resume")
def _resume(run_dir: RunDir) -> None:
    """Go on with a run that was interrupted."""
    from fedsa_secure.runtimes.api import resume

    terminal.quiet_libraries()
    progress = RoundProgress()
    show(resume(run_dir, observers=[progress]), progress.seconds)


@app.command("evaluate")
def _evaluate(run_dir: RunDir) -> None:
    """Measure the personal models of a finished run again."""
    from fedsa_secure.runtimes.api import evaluate

    terminal.quiet_libraries()
    show(evaluate(run_dir), None)


@app.command("methods")
def _methods() -> None:
    """List what every method trains, sends and keeps, as a Markdown table."""
    from fedsa_secure.methods import methods_table

    typer.echo(methods_table())
