"""Who may watch a run: the command line's progress, TensorBoard, a user's own code."""

import importlib.util
from pathlib import Path
from typing import Protocol, runtime_checkable

from fedsa_secure.config import TrainConfig
from fedsa_secure.federation.history import RoundRecord, RoundTiming


@runtime_checkable
class Observer(Protocol):
    """Told of a run's progress, in this order: started, one call per round, finished."""

    def started(self, config: TrainConfig, folder: Path, rounds_done: int) -> None:
        """The run begins, or goes on after ``rounds_done`` rounds."""

    def round_finished(self, record: RoundRecord, timing: RoundTiming) -> None:
        """A round is complete."""

    def finished(self) -> None:
        """No more rounds will come, be it because of an error."""


class TensorBoard:
    """Writes loss, learning rate, accuracy and seconds as TensorBoard events.

    Args:
        folder: where the event files go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @staticmethod
    def available() -> bool:
        """Whether tensorboard is installed."""
        return importlib.util.find_spec("tensorboard") is not None

    def started(self, config: TrainConfig, folder: Path, rounds_done: int) -> None:
        """Open the event file; rounds that will be run again are purged from it."""
        from torch.utils.tensorboard import SummaryWriter  # an optional package

        self._writer = SummaryWriter(str(self._folder), purge_step=rounds_done + 1)

    def round_finished(self, record: RoundRecord, timing: RoundTiming) -> None:
        """Write the values of one round."""
        values = {
            "loss": record.loss,
            "learning_rate": record.learning_rate,
            "test_loss": record.test_loss,
            "accuracy": record.accuracy,
            "macro_f1": record.macro_f1,
            "seconds": timing.total,
        }
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, record.round)

    def finished(self) -> None:
        """Close the event file."""
        self._writer.close()
