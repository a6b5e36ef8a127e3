"""How a session gets an id that nobody chose. docs/protocol.md §7."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedsa_secure.errors import (
    DuplicateMessage,
    MalformedMessage,
    TooFewClients,
    WrongOpening,
    WrongTerms,
)
from fedsa_secure.secagg.checks import public_key_of
from fedsa_secure.secagg.derivation import digest
from fedsa_secure.secagg.terms import Terms
from fedsa_secure.secagg.wire import (
    Commit,
    Commitments,
    Open,
    Opened,
    Signed,
    ascending,
    decode_client,
    encode_server,
)


def nonce_commitment(terms: Terms, client: int, nonce: bytes) -> bytes:
    """What a client sends before it has seen another's nonce."""
    return digest("nonce", terms.hash, client, nonce)


def check_opening(message: Commitments, terms: Terms) -> dict[int, bytes]:
    """The commitments by participant.

    Raises:
        MalformedMessage, WrongTerms, UnknownClient, BadSignature: naming what does not fit.
    """
    if message.terms != terms.hash:
        raise WrongTerms(f"commitments under {terms.other(message.terms)}")
    commits = [checked_commit(raw, terms) for raw in message.commits]
    if not ascending([each.client for each in commits]):
        raise MalformedMessage("commitments are not in order of client number")
    return {each.client: each.commitment for each in commits}


def session_id(message: Opened, terms: Terms, participants: Mapping[int, bytes]) -> bytes:
    """The id of the session.

    Raises:
        WrongOpening: if a nonce is missing or does not fit its commitment.
        MalformedMessage, WrongTerms, UnknownClient, BadSignature: as for ``check_opening``.
    """
    if message.terms != terms.hash:
        raise WrongTerms(f"nonces under {terms.other(message.terms)}")
    opens = [checked_open(raw, terms) for raw in message.opens]
    if [each.client for each in opens] != sorted(participants):
        raise WrongOpening("the nonces are not those of the clients that committed")
    check_nonces(opens, terms, participants)
    return digest("session", terms.hash, *(p for each in opens for p in (each.client, each.nonce)))


def check_nonces(opens: Sequence[Open], terms: Terms, participants: Mapping[int, bytes]) -> None:
    """Every nonce fits its commitment.

    Raises:
        WrongOpening: naming the client of the first that does not.
    """
    for each in opens:
        if nonce_commitment(terms, each.client, each.nonce) != participants.get(each.client):
            raise WrongOpening(f"the nonce of client {each.client} does not fit its commitment")


@dataclass(frozen=True)
class CollectingCommits:
    """The server waits for commitments."""

    terms: Terms
    commits: Mapping[int, tuple[Commit, bytes]] = field(default_factory=dict)

    def receive(self, signed: Signed) -> "CollectingCommits":
        """Take a client's commitment."""
        message = checked_commit(signed.raw, self.terms)
        if message.client in self.commits:
            raise DuplicateMessage(f"client {message.client} has committed")
        commits = {**self.commits, message.client: (message, bytes(signed.raw))}
        return replace(self, commits=commits)

    def close(self) -> tuple["CollectingNonces", dict[int, bytes]]:
        """Show the commitments to all who made one."""
        participants = sorted(self.commits)
        least = self.terms.thresholds.survivors
        if len(participants) < least:
            raise TooFewClients(f"{len(participants)} clients open a session that needs {least}")
        raw = [self.commits[client][1] for client in participants]
        message = encode_server(Commitments(self.terms.hash, raw))
        commitments = {client: self.commits[client][0].commitment for client in participants}
        return CollectingNonces(self.terms, commitments), dict.fromkeys(participants, message)


@dataclass(frozen=True)
class CollectingNonces:
    """The server waits for nonces."""

    terms: Terms
    commitments: Mapping[int, bytes]
    opens: Mapping[int, bytes] = field(default_factory=dict)

    def receive(self, signed: Signed) -> "CollectingNonces":
        """Take a client's nonce."""
        message = checked_open(signed.raw, self.terms)
        if message.client in self.opens:
            raise DuplicateMessage(f"client {message.client} has opened its nonce")
        check_nonces([message], self.terms, self.commitments)
        return replace(self, opens={**self.opens, message.client: bytes(signed.raw)})

    def close(self) -> tuple[bytes, dict[int, bytes]]:
        """The session id, and what to send.

        Raises:
            WrongOpening: if a nonce stayed away; the opening has to be repeated with new nonces.
        """
        raw = [self.opens[client] for client in sorted(self.opens)]
        opened = Opened(self.terms.hash, raw)
        sid = session_id(opened, self.terms, self.commitments)
        return sid, dict.fromkeys(self.commitments, encode_server(opened))


def checked_commit(raw: bytes | memoryview, terms: Terms) -> Commit:
    """A commitment that a client on the roster signed under these terms."""
    message = _checked(raw, terms)
    if not isinstance(message, Commit):
        raise MalformedMessage(f"a {type(message).__name__} where a commitment belongs")
    return message


def checked_open(raw: bytes | memoryview, terms: Terms) -> Open:
    """A nonce that a client on the roster signed under these terms."""
    message = _checked(raw, terms)
    if not isinstance(message, Open):
        raise MalformedMessage(f"a {type(message).__name__} where a nonce belongs")
    return message


def _checked(raw: bytes | memoryview, terms: Terms) -> object:
    signed = decode_client(raw, terms)
    message = signed.message
    if isinstance(message, Commit | Open):
        if message.terms != terms.hash:
            raise WrongTerms(f"client {message.client} has {terms.other(message.terms)}")
        signed.check(public_key_of(message.client, terms))
    return message
