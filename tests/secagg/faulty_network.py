"""A network of clients on disk folders and one honest server, whose every message may go wrong.

What goes wrong is a function of a seed and of the place of a message, so a run can be repeated:
``replay(seed)``. Keys and nonces stay random. Laws are checked while the rounds go on.
"""

import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from fedsa_secure import files
from fedsa_secure.errors import ProtocolError
from fedsa_secure.secagg import (
    ClientSession,
    Identity,
    Party,
    ServerSession,
    Terms,
    Thresholds,
    Update,
    open_session,
)
from fedsa_secure.secagg.journal import stored_session
from fedsa_secure.secagg.wire import MaskedInput, decode_client, decode_server

MODEL = bytes(range(32))
RETRIES = 3
LONGEST = 5
"""Exchanges of a round that is set up by itself."""
WRITE_POINTS = 20
"""A step passes at most 18 points at which its process can die while it writes."""
KINDS = ("drop", "delay", "duplicate", "truncate", "corrupt", "kill", "kill in fill")


class Killed(BaseException):
    """A client's process ended here."""


class BrokenLawError(AssertionError):
    """What may not happen, whatever the network does."""


class Place(NamedTuple):
    """Where a message is: which round, begun how often before, exchange, client, which way."""

    round: int
    begun: int
    exchange: int
    client: int
    to_server: bool
    index: int


class Fault(NamedTuple):
    """What happens to a message; what the amount says depends on the kind."""

    kind: str
    amount: int = 0


class Plan(Protocol):
    """What goes wrong, and in which order messages come."""

    def fault(self, place: Place) -> Fault | None:
        """What happens to the message at a place."""

    def shuffle(self, when: object, messages: list[Any]) -> None:
        """Bring messages of one exchange into the order in which they arrive."""


class Seeded:
    """Faults at a rate, drawn from the seed and the place alone."""

    def __init__(self, seed: int, rate: float) -> None:
        self.seed, self.rate = seed, rate

    def fault(self, place: Place) -> Fault | None:
        draw = random.Random(f"{self.seed}:{tuple(place)}")
        if draw.random() >= self.rate:
            return None
        return Fault(draw.choice(KINDS), draw.randrange(2**16))

    def shuffle(self, when: object, messages: list[Any]) -> None:
        draw = random.Random(f"{self.seed}:order:{when}")
        if draw.random() < 0.5:
            draw.shuffle(messages)


class Listed:
    """The faults of a list."""

    def __init__(self, faults: Mapping[Place, Fault] | None = None, reverse: bool = False) -> None:
        self._faults, self._reverse = faults or {}, reverse

    def fault(self, place: Place) -> Fault | None:
        return self._faults.get(place)

    def shuffle(self, when: object, messages: list[Any]) -> None:
        if self._reverse:
            messages.reverse()


QUIET = Listed()


class _DyingSystem:
    """Stands for ``os`` where files are written: the process dies at one of the calls.

    Data is not forced onto the disk, since the machine stays up.
    """

    def __init__(self, dies_at: int | None) -> None:
        self._left = dies_at

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _point(self) -> bool:
        if self._left is None:
            return False
        self._left -= 1
        return self._left == -1

    def open(self, *arguments: Any) -> int:
        if self._point():
            raise Killed
        return os.open(*arguments)

    def fsync(self, handle: int) -> None:
        if self._point():
            size = os.fstat(handle).st_size
            if size and handle_is_file(handle):
                os.ftruncate(handle, size // 2)
            raise Killed

    def replace(self, source: Path, target: Path) -> None:
        if self._point():
            raise Killed
        target.unlink(missing_ok=True)  # some file systems write a replaced file out at once
        os.replace(source, target)

    def close(self, handle: int) -> None:
        os.close(handle)
        if self._point():
            raise Killed


def handle_is_file(handle: int) -> bool:
    """Whether it is that of a file and not of a folder."""
    return os.path.isfile(f"/proc/self/fd/{handle}")


@contextmanager
def dying(at: int | None) -> Iterator[None]:
    """Within, whoever writes a file is killed at the given write point."""
    files.os = _DyingSystem(at)  # type: ignore[assignment, attr-defined]
    try:
        yield
    finally:
        files.os = os  # type: ignore[attr-defined]


@dataclass
class Tally:
    """What came of the rounds."""

    rounds: int = 0
    complete: int = 0
    given_up: int = 0
    aborted: int = 0
    partial: int = 0
    """Rounds with a sum over fewer than all."""
    faults: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Tally") -> None:
        for name in ("rounds", "complete", "given_up", "aborted", "partial"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.faults += other.faults
        self.refusals += other.refusals


class Outcome(NamedTuple):
    """A round: the last error, or the sum; of how many exchanges the last attempt was."""

    round: int
    error: ProtocolError | None
    total: np.ndarray | None
    survivors: tuple[int, ...]
    exchanges: int
    begun: int


Observe = Callable[[int | str], None]


class Network:
    """Clients 0 … n−1 on folders, one server, and the messages between them.

    Args:
        clients: n.
        folder: where the clients' folders are.
        size: values in a vector.
        seed: of the vectors.
        vector_of: vector of a client in a round; by default uniform.
        acting: told who computes next: a client's number or "server".
    """

    def __init__(
        self,
        clients: int,
        folder: Path,
        size: int = 5,
        seed: int = 0,
        vector_of: Callable[[int, int], np.ndarray] | None = None,
        acting: Observe | None = None,
    ) -> None:
        self.identities = {client: Identity.new() for client in range(clients)}
        roster = {client: each.public_key for client, each in self.identities.items()}
        self.terms = Terms(roster, Thresholds.of(clients), size, bytes(32))
        self.cohort = tuple(range(clients))
        self._folder, self._size, self._seed = folder, size, seed
        self._vector_of = vector_of or self._uniform
        self._acting = acting or (lambda who: None)
        self.clients = {client: self._start(client) for client in self.cohort}
        self.server = ServerSession(self.terms)
        self.tally = Tally()
        self.plan: Plan = QUIET
        self.round = 0
        self.clock = 0
        self.log: list[str] = []
        self.answers: dict[tuple[int, bytes], bytes] = {}
        """What each client gave back for each message."""
        self.vectors: dict[tuple[bytes, int, int, int], bytes] = {}
        """Masked inputs by session, round, attempt and client."""
        self._opened: dict[int, list[bytes]] = {}
        self._delayed: list[tuple[int, int, bool, bytes]] = []
        self._down: dict[int, int] = {}
        self._place = (0, 0, 0)
        self._quiet_before = 0

    def _uniform(self, client: int, round_number: int) -> np.ndarray:
        stream = np.random.default_rng([self._seed, client, round_number])
        return stream.integers(2**32, size=self._size, dtype=np.uint32)

    def folder(self, client: int) -> Path:
        """A client's own."""
        return self._folder / f"client-{client}"

    def _start(self, client: int) -> ClientSession:
        party = Party(self.terms, client, self.identities[client])
        return open_session(party, lambda _: self.cohort, self.folder(client))

    def restart(self, client: int) -> None:
        """The process ends and begins again: what is not on disk is gone."""
        self.clients[client].close()
        self.clients[client] = self._start(client)

    # Opening

    def open(self, plan: Plan = QUIET) -> None:
        """Open a session, again until everyone takes part; what goes wrong is over at last."""
        self._quiet_before = 0
        for trial in range(8):
            self.plan = plan if trial < 4 else QUIET
            self._wake(everyone=trial >= 4)
            self.server = ServerSession(self.terms)
            try:
                self._open_once(trial)
            except ProtocolError as error:
                self._note(f"opening {trial}: {error!r}")
                continue
            if set(self._opened) == set(self.cohort):
                return
        raise BrokenLawError("a session did not open without faults")

    def _open_once(self, trial: int) -> None:
        self._place = (0, trial, 0)
        commits = []
        for client in self.cohort:
            if client not in self._down:
                commits += self._commit(client)
        self._to_server(commits)
        self._carry(self.server.close(), (0, trial, 1))
        self._opened = self.server.close()
        self._carry(self._opened, (0, trial, 2))

    def _commit(self, client: int) -> list[tuple[int, bytes]]:
        fault = self.plan.fault(Place(*self._place, client, False, 0))
        kill = fault.amount if fault and fault.kind == "kill" else None
        self._acting(client)
        try:
            with dying(kill and kill % WRITE_POINTS):
                return [(client, self.clients[client].commit())]
        except Killed:
            self._note(f"client {client} is killed as it commits")
            self.restart(client)
            return []

    # Rounds

    def run_round(self, plan: Plan = QUIET) -> Outcome:
        """A round, tried again as often as is allowed. Checks the laws of its end.

        Raises:
            BrokenLawError: if one does not hold.
        """
        self.round += 1
        self.plan = plan
        quiet = plan is QUIET
        if quiet:  # whoever was late is lost now, and everybody is there and in time
            self._delayed.clear()
            self._wake(everyone=True)
        outcome = self._tries()
        self.tally.rounds += 1
        if outcome.total is None:
            self.tally.given_up += 1
        else:
            self.tally.complete += 1
            self.tally.partial += len(outcome.survivors) < len(self.cohort)
            self._check_sum(outcome)
        self._check_rejoined(outcome, quiet)
        self._check_disks()
        self._quiet_before = self._quiet_before + 1 if quiet else 0
        self._note(f"round {self.round}: {outcome.survivors} {outcome.error!r}")
        return outcome

    def _tries(self) -> Outcome:
        for begun in range(1 + RETRIES):
            exchanges, survivors = 0, ()
            try:
                self._acting("server")
                exchange = self.server.begin(self.round, self.cohort, MODEL, self.cohort)
                while exchange:
                    exchanges += 1
                    if exchanges > LONGEST:
                        raise BrokenLawError("the round does not end")
                    self._carry(self._and_opened(exchange), (self.round, begun, exchanges))
                    survivors = self.server.survivors or survivors
                    self._acting("server")
                    exchange = self.server.close()
            except ProtocolError as error:
                self.tally.aborted += 1
                self._note(f"attempt {begun} of round {self.round}: {error!r}")
                last = error
                continue
            total = self.server.total
            return Outcome(self.round, None, total, survivors, exchanges, begun + 1)
        if self.server.total is not None:
            raise BrokenLawError("a sum although the round was given up")
        return Outcome(self.round, last, None, (), exchanges, 1 + RETRIES)

    def _and_opened(self, exchange: dict[int, list[bytes]]) -> dict[int, list[bytes]]:
        """Whoever missed the last message of the opening gets it again."""
        missing = [
            client for client in exchange if self.clients[client].state.sid != self.server.sid
        ]
        return {
            client: (self._opened[client] if client in missing else []) + messages
            for client, messages in exchange.items()
        }

    # Laws

    def _check_sum(self, outcome: Outcome) -> None:
        expected = np.zeros(self._size, dtype=np.uint32)
        for client in outcome.survivors:
            expected += self._vector_of(client, outcome.round)
        if len(outcome.survivors) < self.terms.thresholds.survivors:
            raise BrokenLawError(f"a sum over {outcome.survivors} only")
        if outcome.total is None or not np.array_equal(outcome.total, expected):
            raise BrokenLawError(f"round {outcome.round}: not the sum over {outcome.survivors}")

    def _check_rejoined(self, outcome: Outcome, quiet: bool) -> None:
        """After one round without faults everyone is back."""
        if quiet and self._quiet_before and outcome.survivors != self.cohort:
            raise BrokenLawError(
                f"round {outcome.round} has {outcome.survivors} only, {self._quiet_before} rounds "
                f"after the last fault ({outcome.error!r})"
            )
        if quiet and self._quiet_before and (outcome.exchanges, outcome.begun) != (3, 1):
            raise BrokenLawError(f"{outcome.exchanges} exchanges, begun {outcome.begun} times")

    def _check_disks(self) -> None:
        """A client that is up would find itself on its disk as it is."""
        for client in set(self.cohort) - set(self._down):
            stored, _ = stored_session(self.folder(client))
            if stored is not None and stored != self.clients[client].state:
                raise BrokenLawError(f"client {client} is not as its disk has it")

    def _check_answer(self, client: int, request: bytes, answer: bytes) -> None:
        """One message has one answer, and one attempt one masked vector, for ever."""
        if self.answers.setdefault((client, request), answer) != answer:
            raise BrokenLawError(f"client {client} answered one message in two ways")
        message = decode_client(answer, self.terms).message
        if isinstance(message, MaskedInput):
            key = (message.sid, message.round, message.attempt, client)
            if self.vectors.setdefault(key, answer) != answer:
                raise BrokenLawError(f"client {client} masked twice in one attempt")

    # Messages

    def _carry(self, exchange: dict[int, list[bytes]], place: tuple[int, int, int]) -> None:
        """An exchange: to the clients, and what they answer to the server."""
        self.clock += 1
        self._place = place
        self._wake()
        arriving = self._due(to_server=False)
        for client, messages in exchange.items():
            for index, data in enumerate(messages):
                where = Place(*place, client, False, index)
                arriving += [(client, each, kill) for each, kill in self._faulty(data, where)]
        self.plan.shuffle(("clients", self.clock), arriving)
        answers: list[tuple[int, bytes]] = []
        for client, data, kill in arriving:
            if client not in self._down:
                answers += self._at_client(client, data, kill)
        self._to_server(answers)

    def _to_server(self, answers: Sequence[tuple[int, bytes]]) -> None:
        arriving = self._due(to_server=True)
        counts: Counter[int] = Counter()
        for client, data in answers:
            where = Place(*self._place, client, True, counts[client])
            counts[client] += 1
            arriving += [(client, each, None) for each, _ in self._faulty(data, where)]
        self.plan.shuffle(("server", self.clock), arriving)
        self._acting("server")
        for client, data, _ in arriving:
            try:
                self.server.receive(data)
            except ProtocolError as error:
                self.tally.refusals[type(error).__name__] += 1
                self._note(f"the server refuses client {client}: {error!r}")

    def _faulty(self, data: bytes, where: Place) -> list[tuple[bytes, Fault | None]]:
        """What arrives now in place of a message, and what kills its receiver."""
        fault = self.plan.fault(where)
        if fault is None or (where.to_server and fault.kind.startswith("kill")):
            return [(data, None)]
        self.tally.faults[fault.kind] += 1
        self._note(f"{where}: {fault}")
        kind, amount = fault
        if kind == "drop":
            return []
        if kind == "delay":
            due = self.clock + 1 + amount % 8
            self._delayed.append((due, where.client, where.to_server, bytes(data)))
            return []
        if kind == "duplicate":
            return [(data, None)] * (2 + amount % 2)
        if kind == "truncate":
            return [(data[: amount % len(data)], None)]
        if kind == "corrupt":
            broken = bytearray(data)
            broken[amount % len(data)] ^= 1 + amount % 255
            return [(bytes(broken), None)]
        return [(data, fault)]

    def _due(self, to_server: bool) -> list[tuple[int, bytes, Fault | None]]:
        arriving = [
            each for each in self._delayed if each[0] <= self.clock and each[2] == to_server
        ]
        self._delayed = [each for each in self._delayed if each not in arriving]
        return [(client, data, None) for _, client, _, data in arriving]

    def _at_client(self, client: int, data: bytes, kill: Fault | None) -> list[tuple[int, bytes]]:
        """A client's answer, if it comes to one and does not die on the way."""
        self._acting(client)
        try:
            answer = self._receive(client, data, kill)
        except ProtocolError as error:
            self.tally.refusals[type(error).__name__] += 1
            self._note(f"client {client} refuses: {error!r}")
            return []
        except Killed:
            return self._after_death(client, data, kill)
        if kill is not None and kill.kind == "kill":  # it is stored and not yet sent
            return self._after_death(client, data, kill)
        return [] if answer is None else [(client, answer)]

    def _receive(self, client: int, data: bytes, kill: Fault | None) -> bytes | None:
        round_number = self._round_of(data)

        def fill(values: np.ndarray) -> None:
            vector = self._vector_of(client, round_number)
            if kill is not None and kill.kind == "kill in fill":
                values[: kill.amount % (self._size + 1)] = vector[: kill.amount % (self._size + 1)]
                raise Killed
            values[:] = vector

        point = kill.amount % WRITE_POINTS if kill is not None and kill.kind == "kill" else None
        with dying(point):
            answer = self.clients[client].receive(data, Update(MODEL, fill))
        if answer is None:
            return None
        self._check_answer(client, bytes(data), bytes(answer))
        return bytes(answer)

    def _round_of(self, data: bytes) -> int:
        """The round whose vector a message asks for; it may be an earlier one that is late."""
        try:
            return getattr(decode_server(data, self.terms), "round", self.round)
        except ProtocolError:
            return self.round

    def _after_death(self, client: int, data: bytes, kill: Fault | None) -> list[tuple[int, bytes]]:
        """It starts at once and is sent the message again, or it stays away for a while."""
        self.restart(client)
        away = 0 if kill is None else kill.amount // WRITE_POINTS % 5
        self._note(f"client {client} is killed and away for {away}")
        if away:
            self._down[client] = self.clock + away
            return []
        return self._at_client(client, data, None)

    def _wake(self, everyone: bool = False) -> None:
        for client, until in list(self._down.items()):
            if everyone or until <= self.clock:
                del self._down[client]

    def _note(self, line: str) -> None:
        self.log.append(line)


def run_seed(seed: int, folder: Path, rounds: int = 8, most: int = 12) -> Network:
    """Some rounds under the faults of a seed, with calm stretches in between.

    Raises:
        BrokenLawError: if a law does not hold; and whatever a party raises that it may not. The
            error names the seed.
    """
    draw = random.Random(f"network {seed}")
    network = Network(draw.randint(3, most), folder, draw.randint(1, 9), seed)
    plan = Seeded(seed, draw.choice((0.005, 0.01, 0.03, 0.1)))
    try:
        network.open(plan)
        while network.tally.rounds < rounds:
            calm = draw.random() < 0.2
            for _ in range(2 if calm else draw.randint(1, 3)):
                network.run_round(QUIET if calm else plan)
            if draw.random() < 0.1:  # the server starts anew
                network.open(plan)
        return network
    except Exception as error:
        tail = "\n  ".join(network.log[-40:])
        error.add_note(
            f"replay({seed}, {rounds}, {most}) shows it again; what came before:\n  {tail}"
        )
        raise


def replay(seed: int, rounds: int = 8, most: int = 12) -> Network:
    """Run the faults of a seed again; ``log`` of what is returned tells what happened."""
    with tempfile.TemporaryDirectory() as folder:
        return run_seed(seed, Path(folder), rounds, most)
