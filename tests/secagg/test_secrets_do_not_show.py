"""Nothing secret is printed, logged or raised: a round with known secrets is searched."""

import logging
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from rich.pretty import pretty_repr
from secagg_attackers import MODEL, Federation

from fedsa_secure.errors import ProtocolError
from fedsa_secure.secagg import Party, keys
from fedsa_secure.secagg import client as steps
from fedsa_secure.secagg import server as server_steps
from fedsa_secure.secagg.masks import Mask
from fedsa_secure.secagg.wire import Delivery, decode_client

Spoken = Iterator[str]


def forms_of(secret: bytes) -> set[str]:
    """How 32 bytes could be written, in whole or by their first half."""
    part = secret[:16]
    numbers = {str(int.from_bytes(secret, order)) for order in ("little", "big")}
    return {repr(part)[2:-1], part.hex(), str(list(part))[1:-1], *numbers}


def spoken(thing: object) -> Spoken:
    """What a debugger, a log line or a console would show."""
    yield repr(thing)
    yield str(thing)
    yield f"{thing}"
    yield pretty_repr(thing, max_string=10_000)


def raised(error: BaseException | None) -> Spoken:
    """An error and everything that it came from."""
    while error is not None:
        yield from (str(error), repr(error), str(error.args))
        yield repr(vars(error))
        error = error.__cause__ or error.__context__


class Secrets:
    """Every secret of a federation, collected as it is made."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.found: set[bytes] = set()
        for module, name in (
            (steps, "new_secret"),
            (steps, "share_secret"),
            (steps, "self_mask_key"),
            (steps, "pairwise_mask_key"),
            (server_steps, "self_mask_key"),
            (server_steps, "pairwise_mask_key"),
            (server_steps, "rebuild_secret"),
            (keys, "exchange"),
            (keys, "kdf"),
        ):
            patch.setattr(module, name, self.noting(getattr(module, name)))

    def noting(self, function: object) -> object:
        def call(*arguments: object) -> object:
            result = function(*arguments)
            self.found |= set(result.values()) if isinstance(result, dict) else {result}
            return result

        return call


def all_things(federation: Federation) -> Iterator[object]:
    yield federation.server
    yield federation.server._phase
    for number, session in federation.clients.items():
        identity = federation.identities[number]
        yield from (session, session.state, session.state.attempts, identity)
        yield from session.state.attempts.values()
        yield Party(federation.terms, number, identity)


class Listener:
    """Plays a round and writes down whatever could be shown of it."""

    def __init__(self, federation: Federation, secrets: Secrets) -> None:
        self.federation, self.secrets = federation, secrets
        self.shown: list[str] = []

    def open(self) -> None:
        for number in self.federation.cohort:
            session = self.federation.client(number)
            session.commit()
            self.secrets.found.add(session.state.nonce)
            self.write(session, session.state)

    def write(self, *things: object) -> None:
        self.shown += [text for thing in things for text in spoken(thing)]

    def ready(self, client: int, message: Delivery) -> None:
        """The state that is in memory alone, while a vector is masked."""
        state = self.federation.state(client)
        party = Party(self.federation.terms, client, self.federation.identities[client])
        ready = steps.deliver(party, state, message, MODEL)
        self.secrets.found |= {ready.masks[0].key, *ready.held.values()}
        self.write(ready, ready.masks, ready.masks[0])

    def answer(self, client: int, message: bytes) -> None:
        federation, decoded = self.federation, self.federation.read(message)
        if isinstance(decoded, Delivery):
            self.ready(client, decoded)
        signed = decode_client(federation.tell(client, message), federation.terms)
        self.write(signed.message, decoded)
        federation.server.receive(signed.raw)
        before = federation.clients[client].state
        with pytest.raises(ProtocolError) as caught:
            federation.tell(client, federation.changed(message, sid=bytes(32)))
        self.shown += raised(caught.value)
        federation.clients[client].state = before
        self.write(*all_things(federation))


def test_no_secret_is_printed_logged_or_raised(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Client 3 drops out, so that mask keys are rebuilt, too."""
    caplog.set_level(logging.DEBUG)
    secrets, federation = Secrets(monkeypatch), Federation(4).opened()
    listener = Listener(federation, secrets)
    listener.open()
    messages = federation.begin()
    while messages:
        for client, message in messages.items():
            if client != 3 or not isinstance(federation.read(message), Delivery):
                listener.answer(client, message)
        messages = federation.close()
    secrets.found |= {each._key.private_bytes_raw() for each in federation.identities.values()}
    text = "\n".join([*listener.shown, caplog.text])
    assert len(secrets.found) > 90
    for secret in secrets.found:
        assert not any(form in text for form in forms_of(secret))
        assert not any(form in text for form in forms_of(secret[32:] or secret))


def test_nor_in_the_error_of_any_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each message is damaged in turn: in every field, and in its bytes."""
    secrets, shown = Secrets(monkeypatch), []
    federation = Federation(4).opened()
    messages = federation.begin()
    while messages:
        session, message = federation.clients[0], messages[0]
        before, good = session.state, federation.read(message)
        for wrong in damaged(message, good):
            try:
                federation.tell(0, wrong)
            except ProtocolError as error:
                shown += raised(error)
            shown += spoken(session)
            session.state, session._answers = before, {}
        federation.send(messages)
        messages = federation.close()
    text = "\n".join(shown)
    assert len(shown) > 100
    for secret in secrets.found:
        assert not any(form in text for form in forms_of(secret))


def damaged(message: bytes, good: object) -> Iterator[bytes]:
    yield from (message[:-1], message + b"x", message[:20] + b"\xff" + message[21:])
    for name in good.__struct_fields__:
        value = getattr(good, name)
        if isinstance(value, int):
            yield msgspec.msgpack.encode(msgspec.structs.replace(good, **{name: value + 1}))
        elif isinstance(value, bytes):
            yield msgspec.msgpack.encode(msgspec.structs.replace(good, **{name: value[::-1]}))
        else:
            for other in (value[1:], value[:-1], value[::-1], value * 2):
                yield msgspec.msgpack.encode(msgspec.structs.replace(good, **{name: other}))


def test_the_search_finds_a_secret_in_each_of_its_forms() -> None:
    secret = np.random.default_rng(5).bytes(32)
    for text in (
        *spoken({"key": secret}),
        secret.hex(),
        str(list(secret)),
        str(int.from_bytes(secret, "little")),
    ):
        assert any(form in text for form in forms_of(secret))
    with pytest.raises(ProtocolError) as caught:
        raise_from(secret)
    assert any(form in text for form in forms_of(secret) for text in raised(caught.value))
    mask = Mask(secret, add=True)
    assert not any(form in text for form in forms_of(secret) for text in spoken(mask))


def raise_from(secret: bytes) -> None:
    """An error that hides where it came from, and still has it."""
    try:
        raise ValueError(secret)
    except ValueError:
        raise ProtocolError("something else") from None
