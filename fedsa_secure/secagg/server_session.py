"""The server over the rounds of a run: exchanges, the next round's keys on the way, retries.

docs/protocol.md §7, §9, §11.
"""

from collections.abc import Sequence

from fedsa_secure.errors import LateMessage, OutOfOrder, ProtocolError, WrongTerms
from fedsa_secure.secagg.masks import UInt32Array
from fedsa_secure.secagg.opening import CollectingCommits, CollectingNonces
from fedsa_secure.secagg.server import (
    Attempt,
    CollectingAgreements,
    CollectingKeys,
    CollectingReveals,
    CollectingShares,
    CollectingVectors,
    Messages,
    Phase,
)
from fedsa_secure.secagg.terms import Terms
from fedsa_secure.secagg.wire import (
    Advertise,
    Agreement,
    Commit,
    MaskedInput,
    Open,
    Reveal,
    Shares,
    decode_client,
)

Exchange = dict[int, list[bytes]]
"""The messages that go to each client at once."""

_ORDER: dict[type, int] = {
    CollectingKeys: 1,
    Advertise: 1,
    CollectingShares: 2,
    Shares: 2,
    CollectingVectors: 3,
    MaskedInput: 3,
    CollectingAgreements: 4,
    Agreement: 4,
    CollectingReveals: 5,
    Reveal: 5,
}


class ServerSession:
    """The server of a session. It holds masked vectors, their sum, and nothing of one client.

    Use: ``receive`` what clients send until the runtime's time is up, ``close`` the exchange, send
    what that returns; first the two exchanges of the opening, then ``begin`` for every round.

    Args:
        terms: what all agreed on.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._opening: CollectingCommits | CollectingNonces | None = CollectingCommits(terms)
        self._phase: Phase | None = None
        self._next: CollectingKeys | CollectingShares | None = None
        self._next_cohort: tuple[int, ...] | None = None
        self._next_error: ProtocolError | None = None
        self._model = b""
        self._attempts: dict[int, int] = {}
        self.sid = b""
        self.total: UInt32Array | None = None
        """The sum of the last round, once it is complete."""
        self.setup_error: ProtocolError | None = None
        """Why the keys that travelled with the last round were of no use, if they were not."""
        self.may_retry = True
        """Whether clients would answer another attempt of the round."""

    @property
    def members(self) -> tuple[int, ...]:
        """Who may send a vector now; empty at other steps."""
        phase = self._phase
        return phase.members if isinstance(phase, CollectingVectors) else ()

    @property
    def survivors(self) -> tuple[int, ...]:
        """Whose vectors are in the sum."""
        phase = self._phase
        if isinstance(phase, CollectingAgreements | CollectingReveals):
            return phase.survivors
        return ()

    def begin(
        self,
        round_number: int,
        cohort: Sequence[int],
        model: bytes,
        next_cohort: Sequence[int] | None = None,
    ) -> Exchange:
        """Begin a round, or another attempt of it.

        Args:
            round_number: counted from 1.
            cohort: everybody invited, in order.
            model: hash of the public values of the round.
            next_cohort: who is invited to the next round, if its keys should travel with this one.

        Returns:
            The first exchange. It is that of the vectors if keys and shares came with the last
            round; otherwise two exchanges of setup come before it.
        """
        if not self.sid:
            raise OutOfOrder("the session is not open")
        self._model, self.total, self.may_retry = model, None, True
        coming, self._next = self._next, None
        self._next_cohort = None if next_cohort is None else tuple(next_cohort)
        self.setup_error, self._next_error = self._next_error, None
        if isinstance(coming, CollectingShares) and coming.attempt.is_for(round_number, cohort):
            try:
                return self._to_vectors(coming)
            except ProtocolError as error:
                self.setup_error = error
        attempt = self._new_attempt(round_number, tuple(cohort), pipelined=False)
        self._phase = CollectingKeys(attempt)
        return _exchange(attempt.invite())

    def receive(self, data: bytes | memoryview) -> None:
        """Take in a message from a client.

        Raises:
            ProtocolError: naming why it is refused. Nothing has changed then.
        """
        signed = decode_client(data, self._terms)
        message = signed.message
        if isinstance(message, Commit | Open):
            wanted = CollectingCommits if isinstance(message, Commit) else CollectingNonces
            if not isinstance(self._opening, wanted):
                raise OutOfOrder(f"a {type(message).__name__} at another step")
            self._opening = self._opening.receive(signed)
            return
        for name, phase in (("_phase", self._phase), ("_next", self._next)):
            step = (message.sid, message.round, message.attempt)
            if phase is None or phase.attempt.step != step:
                continue
            early = _ORDER[type(message)] - _ORDER[type(phase)]
            if early:
                refuse, when = (OutOfOrder, "before") if early > 0 else (LateMessage, "after")
                raise refuse(
                    f"a {type(message).__name__} of client {message.client} came {when} its step; "
                    "it was not used"
                )
            setattr(self, name, phase.receive(signed))
            return
        raise WrongTerms(f"a message of client {message.client} belongs to no attempt at work")

    def close(self) -> Exchange:
        """End an exchange.

        Returns:
            The messages of the next one; none when ``total`` is complete.

        Raises:
            ProtocolError: if the attempt, or the opening, is over; it may be begun again.
        """
        try:
            return self._close_opening(self._opening) if self._opening else self._close_phase()
        except ProtocolError:
            self.may_retry = self._may_retry()
            self._phase = self._next = self._next_error = None
            if self._opening is not None:
                self._opening = CollectingCommits(self._terms)
            raise

    def _close_opening(self, opening: CollectingCommits | CollectingNonces) -> Exchange:
        if isinstance(opening, CollectingCommits):
            self._opening, messages = opening.close()
            return _exchange(messages)
        self.sid, messages = opening.close()
        self._opening = None
        return _exchange(messages)

    def _close_phase(self) -> Exchange:
        phase = self._phase
        if isinstance(phase, CollectingKeys):
            self._phase, messages = phase.close()
            return _exchange(messages)
        if isinstance(phase, CollectingShares):
            return self._to_vectors(phase)
        if isinstance(phase, CollectingVectors):
            agreeing, messages = phase.close()
            self._phase = agreeing if self._terms.consistency else agreeing.unsigned()
            return _exchange(messages, self._show_next_keys())
        if isinstance(phase, CollectingAgreements):
            self._phase, messages = phase.close()
            return _exchange(messages)
        if isinstance(phase, CollectingReveals):
            self.total = phase.close()
            self._phase = None
            return {}
        raise OutOfOrder("no round is going on")

    def _to_vectors(self, phase: CollectingShares) -> Exchange:
        """Deliver the shares, and invite to the next round on the way."""
        self._phase, messages = phase.close(self._model)
        following = phase.attempt.round + 1
        if self._next_cohort is None or following in self._attempts:
            return _exchange(messages)  # a round that was invited before is set up by itself
        coming = self._new_attempt(following, self._next_cohort, pipelined=True)
        self._next = CollectingKeys(coming)
        return _exchange(messages, coming.invite())

    def _show_next_keys(self) -> Messages:
        if not isinstance(self._next, CollectingKeys):
            return {}
        try:
            self._next, messages = self._next.close()
        except ProtocolError as error:  # too few: the next round is set up by itself
            self._next, self._next_error, messages = None, error, {}
        return messages

    def _may_retry(self) -> bool:
        """Whether clients would answer another attempt (docs/protocol.md §9)."""
        if isinstance(self._phase, CollectingReveals):
            return False
        return self._terms.thresholds.complete or not isinstance(
            self._phase, CollectingVectors | CollectingAgreements
        )

    def _new_attempt(self, round_number: int, cohort: tuple[int, ...], pipelined: bool) -> Attempt:
        number = 0 if pipelined else self._attempts.get(round_number, 0) + 1
        begun = {**self._attempts, round_number: number}
        self._attempts = {r: n for r, n in begun.items() if r >= round_number - 1}
        return Attempt(self._terms, self.sid, round_number, number, cohort)


def _exchange(*parts: Messages) -> Exchange:
    messages: Exchange = {}
    for part in parts:
        for client, message in part.items():
            messages.setdefault(client, []).append(message)
    return messages
