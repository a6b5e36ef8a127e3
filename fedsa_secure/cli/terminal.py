"""The terminal, and what every command does with it."""

import logging
import os
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from fedsa_secure.errors import ConfigError

console = Console()

Number = TypeVar("Number", int, float)

Json = Annotated[Path | None, typer.Option(help="write the rows to this file")]


def numbers(option: str, given: str, kind: type[Number]) -> list[Number]:
    """What an option lists, such as "3,10"."""
    try:
        return [kind(number) for number in given.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ConfigError(option, f"{given!r} is no list of {what}", "write such as 1,8") from None


def require_places(**files: Path | None) -> None:
    """Refuse files that cannot be written before anything is measured; by option."""
    for option, path in files.items():
        if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
            raise ConfigError(
                option, f"cannot write {path}", "give a file in a folder that is there"
            )


def cell(value: float | int | None, form: str) -> str:
    """What stands in a table, or a dash."""
    return "–" if value is None else format(value, form)


def quiet_libraries() -> None:
    """Leave the screen to the progress bar."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
