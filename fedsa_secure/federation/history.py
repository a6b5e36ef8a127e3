"""One record per round, as JSON lines.

``history.jsonl`` holds what is a function of the configuration: a resumed run ends with the same
bytes as one that was never interrupted. ``timings.jsonl`` holds how long things took.
"""

import json
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from fedsa_secure.errors import CheckpointError
from fedsa_secure.files import append_line, writing

HISTORY, TIMINGS = "history.jsonl", "timings.jsonl"


class RoundRecord(BaseModel):
    """What happened in one round.

    Args:
        round: counted from 1.
        clients: who was invited.
        learning_rate: at the first step of the round; of the head if only that is trained.
        loss: mean over the survivors of their mean training loss, each counted as 64 at most
            in secure aggregation; None if the round was lost, and in private runs.
        uplink_bytes: of the vector that each of them sent.
        downlink_bytes: that each of them received.
        test_loss: mean over all clients of the personal model on its own test part, if measured.
        accuracy: likewise.
        macro_f1: likewise, for classification.
        survivors: whose updates are in the mean; nobody's if the round was lost.
        attempts: how often the round was tried.
        aborts: why attempts ended, in order.
        clipped: values of all updates that were beyond the range of the fixed point; not sent, and
            0, in a private run.
        epsilon: certified ε of the client that has released most so far; None without
            differential privacy, or where noise was not secret.
        noised_accuracy: mean of what clients sent with dp_metrics; unlike all other scores it is
            covered by ε.
        statement: in the last record of a private run, what it promises, in words.
    """

    model_config = ConfigDict(frozen=True)

    round: int
    clients: tuple[int, ...]
    learning_rate: float
    loss: float | None
    uplink_bytes: int
    downlink_bytes: int
    test_loss: float | None = None
    accuracy: float | None = None
    macro_f1: float | None = None
    survivors: tuple[int, ...] = ()
    attempts: int = 1
    aborts: tuple[str, ...] = ()
    clipped: int = 0
    epsilon: float | None = None
    noised_accuracy: float | None = None
    statement: str | None = None


def best_round(records: list[RoundRecord]) -> RoundRecord | None:
    """The evaluated round with the best accuracy, or with the least test loss without one.

    It is chosen by looking at the test rows, so its numbers are optimistic. They are reported
    beside those of the last round because many papers report nothing else.
    """
    measured = [record for record in records if record.test_loss is not None]
    if not measured:
        return None

    def merit(record: RoundRecord) -> tuple[float, float]:
        return (record.accuracy or 0.0, -(record.test_loss or 0.0))

    return max(measured, key=merit)


class RoundTiming(BaseModel):
    """Seconds of wall time that the phases of a round took, and what the protocol cost.

    Args:
        round: counted from 1.
        train: seconds of local training.
        aggregate: seconds from the updates to the new shared tensors.
        evaluate: seconds.
        checkpoint: seconds.
        exchanges: between clients and server, those of setup included, but not the opening of the
            session.
        overhead_bytes: all that all clients sent in them besides their vectors.
    """

    model_config = ConfigDict(frozen=True)

    round: int
    train: float
    aggregate: float
    evaluate: float
    checkpoint: float
    exchanges: int = 0
    overhead_bytes: int = 0

    @property
    def total(self) -> float:
        """Seconds of the whole round."""
        return self.train + self.aggregate + self.evaluate + self.checkpoint


class History:
    """The records of a run folder, append-only.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._timings = folder / HISTORY, folder / TIMINGS

    @property
    def length(self) -> int:
        """Bytes of the records so far, which a checkpoint remembers."""
        return self._path.stat().st_size if self._path.exists() else 0

    def append(self, record: RoundRecord) -> int:
        """Write a record; returns the length of the file, which a checkpoint remembers."""
        return append_line(self._path, record.model_dump_json())

    def append_timing(self, timing: RoundTiming) -> None:
        """Write how long a round took."""
        append_line(self._timings, timing.model_dump_json())

    def cut(self, length: int) -> None:
        """Forget the records after a checkpoint.

        Raises:
            CheckpointError: if the file is shorter than it was at the checkpoint.
        """
        found = self.length
        if found < length:
            raise CheckpointError(
                f"{self._path} has {found} bytes, but the checkpoint was taken at {length}; "
                "restore it from a backup or start the run again"
            )
        if found > length:
            with writing(self._path):
                os.truncate(self._path, length)

    def records(self) -> list[RoundRecord]:
        """All records.

        Raises:
            CheckpointError: if a line is not a record.
        """
        if not self._path.exists():
            return []
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
            return [RoundRecord.model_validate_json(line) for line in lines]
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            raise CheckpointError(f"{self._path} is damaged: {error}") from error

    def timings(self) -> dict[int, RoundTiming]:
        """Timings by round; of a round that was run again, the last."""
        if not self._timings.exists():
            return {}
        found = {}
        for line in self._timings.read_text(encoding="utf-8").splitlines():
            try:
                timing = RoundTiming(**json.loads(line))
            except (ValueError, TypeError):
                continue  # a crash may cut a line off; timings are a comfort, not a record
            found[timing.round] = timing
        return found
