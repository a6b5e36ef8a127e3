"""How far a training is."""

import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedsa_secure.cli import terminal
from fedsa_secure.config import TrainConfig


class RoundProgress:
    """A bar on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._bar: Progress | None = None

    def started(self, config: TrainConfig, folder: Path, rounds_done: int) -> None:
        """Say what begins, and show the bar."""
        self._rounds, self._begun = config.rounds, time.perf_counter()
        terminal.console.print(
            f"{config.method}-{config.adapter}: {config.clients} clients, {config.rounds} rounds "
            f"of {config.local_steps} local steps; run folder {folder}",
            highlight=False,
            markup=False,
        )
        if terminal.console.is_terminal:
            self._bar = Progress(
                TextColumn("round"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=terminal.console,
            )
            self._task = self._bar.add_task("", total=config.rounds, completed=rounds_done)
            self._bar.start()

    def round_finished(self, record: Any, timing: Any) -> None:
        """One round on, with its figures."""
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
            terminal.console.print(f"round {record.round}/{self._rounds}  {text}", highlight=False)

    def finished(self) -> None:
        """Take the bar away and keep the time."""
        self.seconds = time.perf_counter() - self._begun
        if self._bar is not None:
            self._bar.stop()
