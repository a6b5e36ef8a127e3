"""A few thousand broken messages; ``fuzz_wire.py`` sends as many as one likes."""

from pathlib import Path

import msgspec
import pytest
from fuzz_wire import FoundError, Fuzzer, fuzz

from fedsa_secure.secagg import ServerSession, wire
from fedsa_secure.secagg.wire import ClientMessage, ServerMessage

KINDS = {
    kind.__name__ for kinds in (ClientMessage, ServerMessage) for kind in kinds.__args__
}  # what a union is made of


def test_nothing_but_a_protocol_error_comes_of_a_broken_message(tmp_path: Path) -> None:
    """And no more memory than the message can need. All kinds get through the decoders."""
    findings = fuzz(tmp_path, seed=4, seconds=600, executions=4000)
    assert findings.executions >= 4000
    assert {kind for _, kind in findings.kinds} == KINDS
    assert findings.taken.keys() >= {"Advertise", "Shares", "MaskedInput", "Agreement", "Reveal"}
    refusals = {outcome for _, outcome in findings.outcomes} - {"accepted"}
    assert refusals >= {"MalformedMessage", "OversizedMessage", "BadSignature", "WrongTerms"}


# The law is no good if nothing breaks it.


def check_found(folder: Path, what: str) -> None:
    with pytest.raises(FoundError, match=what):
        fuzz(folder, seed=0, seconds=600, executions=4000)


def test_another_error_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if only wrong types were thought of, and not broken bytes."""

    def careless(decoder: "msgspec.msgpack.Decoder[object]", data: memoryview) -> object:
        try:
            return decoder.decode(data)
        except msgspec.ValidationError as error:
            raise wire.MalformedMessage(str(error)) from None

    monkeypatch.setattr(wire, "_decode", careless)
    check_found(tmp_path, "raised DecodeError")


def test_memory_for_a_declared_length_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a decoder made room for an array before it had looked for its elements."""
    honest = wire._decode

    def trusting(decoder: "msgspec.msgpack.Decoder[object]", data: memoryview) -> object:
        at = bytes(data).find(b"\xdd\x00\xff\xff\xff")
        if at >= 0:
            bytearray(int.from_bytes(data[at + 1 : at + 5], "big"))
        return honest(decoder, data)

    monkeypatch.setattr(wire, "_decode", trusting)
    check_found(tmp_path, "allocated")


def test_a_refused_message_that_changes_the_server_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = ServerSession.receive

    def touched(session: ServerSession, data: bytes) -> None:
        session._next = object()  # type: ignore[assignment]
        honest(session, data)

    fuzzer = Fuzzer(tmp_path, seed=0)  # an honest server made the real messages
    monkeypatch.setattr(ServerSession, "receive", touched)

    def run() -> None:
        for _ in range(500):
            fuzzer.step()

    with pytest.raises(FoundError, match="changed the server"):
        run()
