"""A federation in one process whose server's messages can be changed on their way."""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import numpy as np
import pytest

from fedsa_secure.csprng import MaskGenerator
from fedsa_secure.errors import ProtocolError
from fedsa_secure.secagg import (
    ClientSession,
    Identity,
    Party,
    ServerSession,
    Terms,
    Thresholds,
    Update,
)
from fedsa_secure.secagg.states import Aborted
from fedsa_secure.secagg.wire import (
    ServerMessage,
    decode_client,
    decode_server,
    encode_server,
    sign,
)

MODEL = b"m" * 32
Messages = dict[int, bytes]
Silent = Mapping[type, Iterable[int]]
"""Clients that answer nothing to a kind of message."""


class Federation:
    """Clients 0 … n−1 of one session, their server, and a vector for each.

    Args:
        clients: n.
        thresholds: the floors; by default those of n.
        size: values in a vector.
        consistency: as in ``Terms``.
        application: as in ``Terms``.
        identities: of the clients; by default fresh ones.
        mask_generator: as in ``Terms``.
    """

    def __init__(
        self,
        clients: int = 5,
        thresholds: Thresholds | None = None,
        size: int = 6,
        consistency: bool = True,
        application: bytes = bytes(32),
        identities: Mapping[int, Identity] | None = None,
        mask_generator: MaskGenerator = "aes-256-ctr",
    ) -> None:
        self.identities = identities or {k: Identity.new() for k in range(clients)}
        roster = {k: each.public_key for k, each in self.identities.items()}
        thresholds = thresholds or Thresholds.of(clients)
        self.terms = Terms(
            roster, thresholds, size, application, consistency, mask_generator=mask_generator
        )
        self.cohort = tuple(range(clients))
        self.clients = {k: self.client(k) for k in self.cohort}
        self.server = ServerSession(self.terms)
        stream = np.random.default_rng(clients)
        self.vectors = {k: stream.integers(0, 2**32, size, dtype=np.uint32) for k in self.cohort}
        self.models = dict.fromkeys(self.cohort, MODEL)

    def client(self, number: int) -> ClientSession:
        """A new session object of one client."""
        party = Party(self.terms, number, self.identities[number])
        return ClientSession(party, lambda _: self.cohort)

    def opened(self) -> "Federation":
        """Open the session; what was open before is over."""
        self.server = ServerSession(self.terms)
        for client in self.clients.values():
            self.server.receive(client.commit())
        for client, (message,) in self.server.close().items():
            self.server.receive(self.clients[client].receive(message))
        for client, (message,) in self.server.close().items():
            assert self.clients[client].receive(message) is None
        return self

    def update(self, client: int) -> Update:
        """What a client has to say."""

        def fill(values: np.ndarray) -> None:
            values[:] = self.vectors[client]

        return Update(self.models[client], fill)

    def tell(self, client: int, message: bytes) -> bytes | memoryview | None:
        """Have a client answer a message."""
        return self.clients[client].receive(message, self.update(client))

    def send(self, messages: Messages, silent: Iterable[int] = ()) -> None:
        """Carry messages to the clients, and their answers to the server."""
        for client, message in messages.items():
            if client not in silent:
                self.server.receive(self.tell(client, message))

    def begin(self, round_number: int = 1) -> Messages:
        """Begin a round, or another attempt of it."""
        return _single(self.server.begin(round_number, self.cohort, MODEL))

    def close(self) -> Messages:
        """End an exchange of a round without pipelining."""
        return _single(self.server.close())

    def until(self, kind: type, round_number: int = 1, silent: Silent | None = None) -> Messages:
        """Take an attempt to where the server is about to send messages of a kind."""
        messages = self.begin(round_number)
        while not isinstance(found := self.read(next(iter(messages.values()))), kind):
            self.send(messages, (silent or {}).get(type(found), ()))
            messages = self.close()
        return messages

    def run(self, round_number: int = 1, silent: Silent | None = None) -> np.ndarray:
        """A whole round; the sum."""
        self.finish(self.begin(round_number), silent)
        assert self.server.total is not None
        return self.server.total

    def finish(self, messages: Messages, silent: Silent | None = None) -> None:
        """Take an attempt from some messages to its end."""
        while messages:
            kind = type(self.read(next(iter(messages.values()))))
            self.send(messages, (silent or {}).get(kind, ()))
            messages = self.close()

    def sum_of(self, clients: Iterable[int]) -> np.ndarray:
        """What the sum over some clients has to be."""
        return np.sum([self.vectors[k] for k in clients], axis=0, dtype=np.uint32)

    def read(self, message: bytes) -> ServerMessage:
        """A message of the server, decoded."""
        return decode_server(message, self.terms)

    def changed(self, message: bytes, **fields: Any) -> bytes:
        """A message of the server with other fields."""
        return encode_server(msgspec.structs.replace(self.read(message), **fields))

    def resigned(self, raw: bytes, signer: Identity, **fields: Any) -> bytes:
        """A message of a client with other fields, signed by whoever can."""
        message = decode_client(raw, self.terms).message
        return sign(msgspec.structs.replace(message, **fields), signer)

    def state(self, client: int, round_number: int = 1) -> object:
        """Where a client stands in a round."""
        return self.clients[client].state.attempts[round_number]


def check_refused(
    federation: Federation,
    client: int,
    message: bytes,
    error: type[ProtocolError],
    honest: bytes,
    match: str | None = None,
) -> None:
    """A client refuses a message by name, is done with the attempt, and answers no more of it.

    Args:
        federation: the client's.
        client: who is attacked.
        message: the attack.
        error: what it is called.
        honest: the message that the attack replaced; refused now, too.
        match: what the error says.
    """
    with pytest.raises(error, match=match) as caught:
        federation.tell(client, message)
    assert type(caught.value) is error
    number = federation.read(honest).round
    state = federation.state(client, number)
    assert isinstance(state, Aborted)
    assert state.reason == error.__name__
    for late in (message, honest):
        with pytest.raises(ProtocolError):
            federation.tell(client, late)
    assert federation.state(client, number) == state


def check_refused_and_alive(
    federation: Federation,
    client: int,
    message: bytes,
    error: type[ProtocolError],
    honest: bytes,
    match: str | None = None,
) -> None:
    """A client refuses by name what does not belong to the attempt at work, which goes on.

    Args: as for ``check_refused``; ``honest`` is answered.
    """
    before = federation.clients[client].state
    with pytest.raises(error, match=match):
        federation.tell(client, message)
    assert federation.clients[client].state == before
    assert federation.tell(client, honest)


def replaced(messages: Iterable[bytes], place: int, message: bytes) -> list[bytes]:
    """A list with one entry changed."""
    return [message if k == place else each for k, each in enumerate(messages)]


def _single(exchange: dict[int, list[bytes]]) -> Messages:
    messages = {}
    for client, (message,) in exchange.items():
        messages[client] = message
    return messages
