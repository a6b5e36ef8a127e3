"""What was spent, on disk before it is spent: an append-only file of one event a line.

A run keeps the ledger of its own events; a silo keeps one for each of its data sets, over all runs.
Whoever sends an upload appends its events first: a crash between the two counts too much, never
too little.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedsa_secure.errors import BudgetExceededError, CheckpointError, ConfigError, PrivacyError
from fedsa_secure.files import FileLock, append_line, sync_folder, write_atomic, writing
from fedsa_secure.privacy.accounting import Event, certified_epsilon
from fedsa_secure.privacy.discrete import skellam_epsilon_of

_HOME = "FEDSA_SECURE_HOME"

SkellamRound = tuple[float, float, float]
"""Variance, sensitivity in the l1 and in the l2 norm of one round, in steps of the grid."""


class LedgerEvent(BaseModel):
    """One upload of one client: the noised steps that went into it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    id: str = Field(pattern=r"^[0-9a-f]{8,128}$")
    """Of the noise block; no block is used twice, so no id is."""
    run: str
    data_set: str
    client: int = Field(ge=0)
    round: int = Field(ge=0)
    steps: int = Field(ge=1)
    sampling_rate: float = Field(gt=0, le=1)
    noise_multiplier: float = Field(ge=0)
    """Standard deviation over sensitivity; 0 in a control that is not private."""
    clip_norm: float = Field(gt=0)
    mechanism: Literal["gaussian", "skellam"] = "gaussian"
    release: Literal["update", "metric"] = "update"
    """What the noise is on."""
    upload: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the stored upload."""
    private: bool = True
    """False for noise from a seed: kept, but it promises nothing and so counts nothing."""
    variance: float | None = Field(None, gt=0)
    """Skellam: of the noise in the sum, in squared steps of the grid; so the two below."""
    sensitivity_l1: float | None = Field(None, gt=0)
    sensitivity_l2: float | None = Field(None, gt=0)
    table_epsilon: float = Field(0.0, ge=0)
    """Skellam: what the rounding of its table costs."""

    @model_validator(mode="after")
    def _fits_its_mechanism(self) -> "LedgerEvent":
        on_grid = (self.variance, self.sensitivity_l1, self.sensitivity_l2)
        if self.mechanism == "skellam" and (None in on_grid or self.sampling_rate != 1):
            raise ValueError("a skellam event needs variance and sensitivities, and no sampling")
        if self.mechanism == "gaussian" and on_grid != (None, None, None):
            raise ValueError("a gaussian event has no grid")
        if self.private and self.noise_multiplier == 0:
            raise ValueError("an event without noise is not private")
        return self

    @property
    def event(self) -> Event | None:
        """For the accountant of Gaussian noise; None if that does not count this event."""
        if not self.private or self.mechanism != "gaussian":
            return None
        return Event(
            steps=self.steps,
            sampling_rate=self.sampling_rate,
            noise_multiplier=self.noise_multiplier,
        )

    @property
    def skellam_rounds(self) -> list[SkellamRound]:
        """For the accountant of Skellam noise; empty if that does not count this event."""
        grid = (self.variance, self.sensitivity_l1, self.sensitivity_l2)
        if not self.private or None in grid:
            return []
        return [(float(grid[0] or 0), float(grid[1] or 0), float(grid[2] or 0))] * self.steps


class Ledger:
    """An append-only file of events, open in one place at a time.

    What a crash left of an unfinished line is cut off: its append did not return, so nothing that
    it counts has been sent.

    Args:
        path: made, with mode 0600, if it does not exist.

    Raises:
        CheckpointError: if another process has the file open, a line of it is damaged, or it cannot
            be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                self._lock = FileLock(path)
            except BlockingIOError:
                raise CheckpointError(
                    f"{path} is in use by another run; two could spend the same budget: wait for "
                    "the other one to end"
                ) from None
            sync_folder(path.parent)
        try:
            self._events, self._size = _read(path)
            self._cut()
        except CheckpointError:
            self.close()
            raise

    def append(self, events: Sequence[LedgerEvent]) -> None:
        """Have events on disk before this returns; those that are there already stay as they are.

        Raises:
            PrivacyError: if an id is there with another content: a noise block was used twice.
            CheckpointError: if they cannot be written; then none of them may be spent.
        """
        new: dict[str, LedgerEvent] = {}
        for event in events:
            known = self._events.get(event.id) or new.get(event.id)
            if known is None:
                new[event.id] = event
            elif known != event:
                raise PrivacyError(
                    f"noise block {event.id}",
                    f"{self.path} counts it for another event",
                    "draw new noise for everything that is computed again",
                )
        if new:
            self._cut()
            lines = "\n".join(event.model_dump_json(exclude_none=True) for event in new.values())
            self._size = append_line(self.path, lines)
            self._events |= new

    def events(self) -> list[LedgerEvent]:
        """All events, in the order in which they were appended."""
        return list(self._events.values())

    def close(self) -> None:
        """Give the file free for another run."""
        self._lock.release()

    def _cut(self) -> None:
        """Cut off what an append that failed has left behind the last event."""
        with writing(self.path):
            size = self.path.stat().st_size
            if size < self._size:
                raise CheckpointError(f"{self.path} has lost events since it was opened")
            if size > self._size:
                with open(self.path, "r+b") as file:
                    file.truncate(self._size)
                    os.fsync(file.fileno())


class DataSetLedger(Ledger):
    """All that was ever spent on one data set at this silo.

    Args:
        path: its file; ``open`` finds it.
        data_set: the id of the data set; any text.
    """

    def __init__(self, path: Path, data_set: str) -> None:
        super().__init__(path)
        self.data_set = data_set

    @classmethod
    def open(cls, home: Path, data_set: str) -> "DataSetLedger":
        """The ledger of a data set in a silo's home folder, made if it does not exist.

        Raises:
            ConfigError: if the id is empty.
            CheckpointError: as ``Ledger`` does.
        """
        if not data_set.strip():
            raise ConfigError("dp_dataset_id", "is empty", "name the data set")
        with writing(home):
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
        return cls(home / "ledgers" / ledger_name(data_set), data_set)

    def budget(self, given: float | None) -> float | None:
        """Most ε over all runs: what was given last, now or in an earlier run; None for no limit.

        Args:
            given: by the run that asks; it is remembered for later ones that give none.
        """
        path = self.path.with_suffix(".budget")
        if given is not None:
            write_atomic(path, repr(given).encode(), mode=0o600)
        elif path.exists():
            return float(path.read_text())
        return given

    def append(self, events: Sequence[LedgerEvent]) -> None:
        """As ``Ledger.append``; and every event has to be of this data set."""
        for event in events:
            if event.data_set != self.data_set:
                raise PrivacyError(
                    f"data set {self.data_set!r}",
                    f"its ledger was given an event of {event.data_set!r}",
                )
        super().append(events)


def read_ledger(path: Path) -> list[LedgerEvent]:
    """The events of a ledger, to look at; an unfinished last line is left out.

    Raises:
        CheckpointError: if a line is damaged.
    """
    return list(_read(path)[0].values())


def home_folder(option: str | None) -> Path:
    """Where a silo keeps its ledgers: the option, else $FEDSA_SECURE_HOME, else ~/.fedsa_secure."""
    return Path(option or os.environ.get(_HOME) or "~/.fedsa_secure").expanduser()


def ledger_name(data_set: str) -> str:
    """A file name for any id: what can be read of it, and a hash so that no two ids share one."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", data_set)[:40].strip("-")
    digest = hashlib.sha256(data_set.encode()).hexdigest()[:32]
    return f"{readable}-{digest}.jsonl".lstrip("-")


def spent(
    events: Sequence[LedgerEvent | Event],
    delta: float,
) -> float:
    """Certified ε of all events of one data set together.

    Gaussian and Skellam events are accounted for apart, at δ/2 each, and their ε added (basic
    composition; Dwork and Roth 2014, Theorem 3.16). Events that are not private count nothing.

    The events' parameters may not depend on what earlier events released; a prefix of a plan is
    fine.

    Args:
        events: in any order.
        delta: probability that ε does not cover.

    Raises:
        PrivacyError: if delta is too small to certify.
    """
    logged = [event for event in events if isinstance(event, LedgerEvent)]
    gaussian = [event for event in events if isinstance(event, Event)]
    gaussian += [counted for event in logged if (counted := event.event) is not None]
    skellam = [one for event in logged for one in event.skellam_rounds]
    if not skellam:
        return certified_epsilon(gaussian, delta)
    tables = sum(event.table_epsilon for event in logged if event.private)
    if not gaussian:
        return tables + skellam_epsilon_of(skellam, delta)
    return tables + certified_epsilon(gaussian, delta / 2) + skellam_epsilon_of(skellam, delta / 2)


def require_budget(
    ledger: DataSetLedger,
    planned: Sequence[LedgerEvent | Event],
    delta: float,
    budget: float | None,
) -> float:
    """Refuse a plan that would spend more on a data set than it may; nothing is written.

    Args:
        ledger: of the data set.
        planned: what is to come; events that the ledger has already are not counted again.
        delta: probability that ε does not cover.
        budget: most ε over all runs, or None for no limit.

    Returns:
        ε of the data set once the plan is carried out.

    Raises:
        BudgetExceededError: before anything is spent.
    """
    past = ledger.events()
    known = {event.id for event in past}
    new = [e for e in planned if not (isinstance(e, LedgerEvent) and e.id in known)]
    total = spent([*past, *new], delta)
    if budget is None or total <= budget:
        return total
    raise BudgetExceededError(
        f"data set {ledger.data_set!r}",
        f"has spent epsilon {spent(past, delta):.4g}, the plan costs "
        f"{spent(new, delta):.4g}, together {total:.4g} at delta {delta:g}, over "
        f"its lifetime budget of {budget:g}",
        "plan fewer steps or more noise, or stop using this data set",
    )


def _read(path: Path) -> tuple[dict[str, LedgerEvent], int]:
    """Events by id and the length of their lines; what follows the last line's end is left out."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    complete = content[: content.rfind(b"\n") + 1]
    events: dict[str, LedgerEvent] = {}
    for number, line in enumerate(complete.split(b"\n")[:-1], start=1):
        try:
            event = LedgerEvent.model_validate_json(line)
        except ValidationError as error:
            raise _damaged(path, number, str(error.errors()[0]["msg"])) from None
        if events.setdefault(event.id, event) != event:
            raise _damaged(path, number, f"the id {event.id} was there before with other content")
    return events, len(complete)


def _damaged(path: Path, number: int, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: line {number} is damaged ({problem}), so what was spent is unknown; restore the "
        "file from a copy, or count its data set as spent"
    )
