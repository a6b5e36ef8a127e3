"""A client over the rounds of a run: which attempt a message belongs to, and which are over.

docs/protocol.md §7, §9, §11.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import msgspec

from fedsa_secure.errors import (
    OutOfOrder,
    ProtocolError,
    ReplayedRound,
    RetryForbidden,
    SecretsLost,
    UnknownClient,
    WrongOpening,
    WrongTerms,
)
from fedsa_secure.secagg import client as steps
from fedsa_secure.secagg.client import Fill
from fedsa_secure.secagg.opening import check_opening, nonce_commitment, session_id
from fedsa_secure.secagg.states import (
    Aborted,
    AttemptState,
    HasAgreed,
    HasKeys,
    HasMasked,
    HasRevealed,
    HasShared,
    IsMasking,
    Party,
)
from fedsa_secure.secagg.terms import OPENINGS
from fedsa_secure.secagg.wire import (
    Advertised,
    Agreements,
    Commit,
    Commitments,
    Delivery,
    Invite,
    Open,
    Opened,
    ServerStep,
    Survivors,
    decode_server,
    sign,
)

MAX_ATTEMPTS = 16

Answer = bytes | memoryview
_Kept = TypeVar("_Kept")


class SessionState(msgspec.Struct, frozen=True):
    """What a client keeps between messages.

    Args:
        terms: hash of the terms; a state is good for these only.
        nonce: of the session being opened.
        participants: by commitment; None before they are known.
        sid: of the session; empty before it is open.
        openings: sessions that were begun in this run.
        closed: rounds up to this one are over for this client, for ever.
        begun: highest attempt that was begun, by round.
        sent: rounds and digests of the vectors sent.
        attempts: the live attempt of a round.
        requests: digest of the message that was answered last, by round.
    """

    terms: bytes
    nonce: bytes = b""
    participants: dict[int, bytes] | None = None
    sid: bytes = b""
    openings: int = 0
    closed: int = 0
    begun: dict[int, int] = {}
    sent: dict[int, bytes] = {}
    attempts: dict[int, AttemptState] = {}
    requests: dict[int, bytes] = {}

    def __repr__(self) -> str:
        return f"SessionState(closed={self.closed}, attempts={list(self.attempts.values())})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """For rich, which msgspec would show every field."""
        return [("closed", self.closed), ("attempts", list(self.attempts.values()))]


@runtime_checkable
class Journal(Protocol):
    """Where a client's state is kept, so that a crash cannot undo it."""

    def save(self, state: SessionState, round_number: int, answer: Answer | None) -> None:
        """Have the state, and an answer of a round, on disk before this returns."""

    def close(self) -> None:
        """Nothing more will be saved."""


class _NoJournal:
    """For clients that live and die with their process."""

    def save(self, state: SessionState, round_number: int, answer: Answer | None) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Update:
    """What a client has to say in a round.

    Args:
        model: hash of the public values that it was computed from, 32 bytes.
        fill: writes the vector in fixed point.
    """

    def __init__(self, model: bytes, fill: Fill) -> None:
        if len(model) != 32:
            raise ValueError(f"the hash of the public values has 32 bytes, not {len(model)}")
        self.model, self.fill = model, fill


class ClientSession:
    """One client of a session.

    Args:
        party: who it is.
        cohort_of: the clients of a round, as this client's own configuration has them.
        journal: where the state is kept; by default nowhere.
        state: what a journal has kept.
        answers: the answers that it has kept, by round.
        resend: whether answers are kept, to be sent again should a message come twice.

    Guarantee: the server and c colluding clients learn of this client's vectors sums over at least
    m − c honest clients only, one sum per round. Assumptions: docs/threat_model.md.
    """

    def __init__(
        self,
        party: Party,
        cohort_of: Callable[[int], Sequence[int]],
        journal: Journal | None = None,
        state: SessionState | None = None,
        answers: dict[int, Answer] | None = None,
        resend: bool = True,
    ) -> None:
        state = state or SessionState(party.terms.hash)
        if state.terms != party.terms.hash:
            raise WrongTerms("the stored state belongs to other terms; it was left as it is")
        self._party, self._cohort_of = party, cohort_of
        self._journal: Journal = journal or _NoJournal()
        self._answers: dict[int, Answer] = dict(answers or {})
        self._resend = resend
        self.state = state

    def __repr__(self) -> str:
        return f"ClientSession({self._party.client}, {self.state!r})"

    def close(self) -> None:
        """Give the journal free; this object is not used any more."""
        self._journal.close()

    def commit(self, nonce: bytes | None = None) -> bytes:
        """Begin a session: the commitment to a nonce (docs/protocol.md §7).

        What was going on in an earlier session is over; closed rounds stay closed.

        Args:
            nonce: 32 bytes, for simulations that have to be repeatable; by default fresh ones,
                without which the guarantee does not hold.

        Raises:
            ReplayedRound: if there were too many sessions in this run: each would let the server
                see another set of circles.
        """
        party, state, nonce = self._party, self.state, nonce or os.urandom(32)
        if state.openings >= OPENINGS:
            raise ReplayedRound(f"{OPENINGS} sessions were opened in this run; begin another run")
        begun = SessionState(
            party.terms.hash,
            nonce,
            openings=state.openings + 1,
            closed=state.closed,
            sent=state.sent,
        )
        self._save(begun)
        commitment = nonce_commitment(party.terms, party.client, nonce)
        return sign(Commit(party.terms.hash, party.client, commitment), party.identity)

    def receive(self, data: bytes | memoryview, update: Update | None = None) -> Answer | None:
        """Answer a message from the server.

        Args:
            data: the message.
            update: what to send, if the message is a delivery.

        Returns:
            The answer, if there is one. A message that was answered last gets the same bytes again.

        Raises:
            ProtocolError: naming what was refused. The attempt that the message names is over; if
                it cannot be read, every attempt is.
        """
        try:
            message = decode_server(data, self._party.terms)
        except ProtocolError as error:
            self._abort(None, error)  # it could have been of any attempt
            raise
        if isinstance(message, Commitments | Opened):
            return self._opening(message)
        if message.sid != self.state.sid:
            raise WrongTerms("a message of another session")
        try:
            return self._attempt(message, hashlib.sha256(data).digest(), update)
        except ProtocolError as error:
            self._abort((message.round, message.attempt), error)
            raise

    def _opening(self, message: Commitments | Opened) -> Answer | None:
        party, state = self._party, self.state
        if state.sid or not state.nonce:
            raise OutOfOrder("no session is being opened")
        if isinstance(message, Commitments):
            participants = check_opening(message, party.terms)
            if state.participants not in (None, participants):
                raise OutOfOrder("other commitments were shown before")
            own = nonce_commitment(party.terms, party.client, state.nonce)
            if participants.get(party.client) != own:
                raise WrongOpening("the own commitment is not as it was sent")
            self._save(msgspec.structs.replace(state, participants=participants))
            return sign(Open(party.terms.hash, party.client, state.nonce), party.identity)
        if state.participants is None:
            raise OutOfOrder("nonces came before commitments")
        sid = session_id(message, party.terms, state.participants)
        self._save(msgspec.structs.replace(state, sid=sid, nonce=b"", participants=None))
        return None

    def _attempt(self, message: ServerStep, request: bytes, update: Update | None) -> Answer:
        number = message.round
        if self.state.requests.get(number) == request and number in self._answers:
            return self._answers[number]
        if number <= self.state.closed:
            raise ReplayedRound(f"round {number} is closed")
        if isinstance(message, Invite):
            begun, answer = self._begin(message)
            return self._answer(begun, request, answer)
        state = self._live(message)
        party = self._party
        if isinstance(message, Advertised) and isinstance(state, HasKeys):
            shared, answer = steps.share(party, state, message)
            return self._answer(shared, request, answer)
        if isinstance(message, Delivery) and isinstance(state, HasShared):
            return self._mask(state, message, request, update)
        if isinstance(message, Survivors) and isinstance(state, HasMasked):
            agreed, answer = steps.agree(party, state, message)
            if party.terms.consistency:
                return self._answer(agreed, request, answer)
            return self._reveal(agreed, None, request)
        if isinstance(message, Agreements) and isinstance(state, HasAgreed):
            return self._reveal(state, message, request)
        raise OutOfOrder(
            f"{type(message).__name__} came in round {number}, where the state is {state!r}"
        )

    def _begin(self, message: Invite) -> tuple[HasKeys, bytes]:
        number, party, state = message.round, self._party, self.state
        if number > party.terms.rounds:
            raise ReplayedRound(f"the run has no round {number}; its last is {party.terms.rounds}")
        if any(live > number + 1 for live in state.attempts):
            raise ReplayedRound(f"round {number} came after {max(state.attempts)} was begun")
        if message.attempt <= state.begun.get(number, -1) or message.attempt >= MAX_ATTEMPTS:
            raise ReplayedRound(f"attempt {message.attempt} of round {number} cannot be begun")
        if number in state.sent and not party.terms.thresholds.complete:
            raise RetryForbidden(f"a vector of round {number} was sent, on a sparse graph")
        cohort = self._cohort_of(number)
        if party.client not in cohort or len(cohort) != party.terms.thresholds.clients:
            raise UnknownClient(f"client {party.client} has no place in round {number}")
        return steps.advertise(party, message, cohort)

    def _live(self, message: ServerStep) -> AttemptState:
        state = self.state.attempts.get(message.round)
        if state is None:
            raise OutOfOrder(f"round {message.round} was not begun")
        if state.attempt != message.attempt:
            raise ReplayedRound(
                f"a message of attempt {message.attempt} of round {message.round}; "
                f"{state.attempt} is going on"
            )
        if isinstance(state, IsMasking):
            raise SecretsLost(f"the secrets of round {message.round} went with a crash")
        return state

    def _mask(
        self, state: HasShared, message: Delivery, request: bytes, update: Update | None
    ) -> Answer:
        """Mask behind a mark on disk: after a crash in between nothing is masked again."""
        if update is None:
            raise OutOfOrder(f"client {self._party.client} has no update in round {state.round}")
        ready = steps.deliver(self._party, state, message, update.model)
        self._put(IsMasking(*state.step))
        expected = self.state.sent.get(state.round)
        after, answer, digest = steps.mask(self._party, ready, update.fill, expected)
        return self._answer(
            after,
            request,
            answer,
            closed=state.round - 1,
            sent={**self.state.sent, state.round: digest},
        )

    def _reveal(self, state: HasAgreed, message: Agreements | None, request: bytes) -> Answer:
        """Close the round, on disk, before a share leaves."""
        after, answer = steps.reveal(self._party, state, message)
        return self._answer(after, request, answer, closed=state.round)

    def _answer(
        self,
        after: AttemptState,
        request: bytes,
        answer: Answer,
        closed: int | None = None,
        sent: dict[int, bytes] | None = None,
    ) -> Answer:
        """Keep state and answer, and only then let the answer go. What is closed is forgotten."""
        state, number = self.state, after.round
        closed = max(state.closed, closed or 0)
        kept = SessionState(
            terms=state.terms,
            sid=state.sid,
            openings=state.openings,
            closed=closed,
            begun=_since(closed, {**state.begun, number: after.attempt}),
            sent=_since(closed, state.sent if sent is None else sent),
            attempts=_live(closed, number, state.attempts) | {number: after},
            requests=_since(closed, {**state.requests, number: request}),
        )
        self._save(kept, number, answer)
        if self._resend:
            self._answers = _since(closed, {**self._answers, number: answer})
        return answer

    def _put(self, after: AttemptState) -> None:
        """Keep a state that has no answer."""
        attempts = {**self.state.attempts, after.round: after}
        self._save(msgspec.structs.replace(self.state, attempts=attempts))

    def _abort(self, attempt: tuple[int, int] | None, error: ProtocolError) -> None:
        """End the attempt that a refused message names; without one, all of them."""
        for number, state in self.state.attempts.items():
            named = attempt in (None, (number, state.attempt))
            if named and not isinstance(state, HasRevealed | Aborted):
                after = Aborted(*state.step, reason=type(error).__name__)
                requests = {r: kept for r, kept in self.state.requests.items() if r != number}
                attempts = {**self.state.attempts, number: after}
                self._answers.pop(number, None)
                self.state = msgspec.structs.replace(
                    self.state, attempts=attempts, requests=requests
                )
                self._save(self.state)  # over it is, even if the disk cannot take that

    def _save(
        self, state: SessionState, round_number: int = 0, answer: Answer | None = None
    ) -> None:
        self._journal.save(state, round_number, answer)
        self.state = state  # not before: what the disk could not take has not happened


def _live(closed: int, number: int, attempts: dict[int, AttemptState]) -> dict[int, AttemptState]:
    """Attempts that may still go on beside that of a round: of its neighbours that are not closed.

    So a server cannot make a client collect secrets of many rounds.
    """
    return {r: state for r, state in attempts.items() if r > closed and abs(r - number) <= 1}


def _since(closed: int, rounds: dict[int, _Kept]) -> dict[int, _Kept]:
    """What is still of use: the last closed round is kept for sending its answer again."""
    return {number: kept for number, kept in rounds.items() if number >= closed}
