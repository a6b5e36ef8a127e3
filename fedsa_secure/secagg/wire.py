"""Messages and their one encoding each. docs/protocol.md §6."""

import hashlib
import itertools
import struct
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import numpy as np

from fedsa_secure.errors import MalformedMessage, OversizedMessage
from fedsa_secure.secagg.derivation import info
from fedsa_secure.secagg.identity import Identity, verify
from fedsa_secure.secagg.masks import UInt32Array
from fedsa_secure.secagg.terms import Terms

SEALED_BYTES = 12 + 64 + 16
Number = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
Bytes32 = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Sealed = Annotated[bytes, msgspec.Meta(min_length=SEALED_BYTES, max_length=SEALED_BYTES)]


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Messages show their kind and never their content."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(…)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """For rich, which msgspec would show every field."""
        return []


class _Step(_Message, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a message of an attempt begins with."""

    sid: Bytes32
    round: Number
    attempt: Number


class Commit(_Message, frozen=True, array_like=True, tag=1):
    """A client commits to its nonce of a session."""

    terms: Bytes32
    client: Number
    commitment: Bytes32


class Open(_Message, frozen=True, array_like=True, tag=2):
    """A client opens its nonce."""

    terms: Bytes32
    client: Number
    nonce: Bytes32


class Advertise(_Step, frozen=True, array_like=True, tag=3):
    """Fresh public keys of a client: one for sealing shares, one for masks."""

    client: Number
    terms: Bytes32
    sealing_key: Bytes32
    mask_key: Bytes32
    seed_commitment: Bytes32


class Shares(_Step, frozen=True, array_like=True, tag=4):
    """One sealed share per holder."""

    client: Number
    sealed: list[tuple[Number, Sealed]]


class MaskedInput(_Step, frozen=True, array_like=True, tag=5):
    """Head of the masked vector, which is the payload."""

    client: Number
    context: Bytes32


class Agreement(_Step, frozen=True, array_like=True, tag=6):
    """A client's signature on one context and one survivor set."""

    client: Number
    context: Bytes32
    survivors: Bytes32


class Reveal(_Step, frozen=True, array_like=True, tag=7):
    """Shares of survivors' seeds, and of the mask keys of those who dropped out."""

    client: Number
    seeds: list[tuple[Number, Bytes32]]
    mask_keys: list[tuple[Number, Bytes32]]


class Commitments(_Message, frozen=True, array_like=True, tag=16):
    """All commitments."""

    terms: Bytes32
    commits: list[bytes]


class Opened(_Message, frozen=True, array_like=True, tag=17):
    """All nonces."""

    terms: Bytes32
    opens: list[bytes]


class Invite(_Step, frozen=True, array_like=True, tag=18):
    """An attempt begins."""


class Advertised(_Step, frozen=True, array_like=True, tag=19):
    """The keys of a client's neighbours, and its own."""

    advertises: list[bytes]


class Delivery(_Step, frozen=True, array_like=True, tag=20):
    """The members, and the shares that this client holds."""

    members: list[Number]
    sealed: list[tuple[Number, Sealed]]


class Survivors(_Step, frozen=True, array_like=True, tag=21):
    """Whose vectors came in time, and whose did not."""

    survivors: list[Number]
    dropped: list[Number]


class Agreements(_Step, frozen=True, array_like=True, tag=22):
    """The signatures on the survivors."""

    agreements: list[bytes]


ClientMessage = Commit | Open | Advertise | Shares | MaskedInput | Agreement | Reveal
ServerMessage = Commitments | Opened | Invite | Advertised | Delivery | Survivors | Agreements
ServerStep = Invite | Advertised | Delivery | Survivors | Agreements

_LENGTHS = struct.Struct("<II")
_SIGNATURE_BYTES = 64
_from_client = msgspec.msgpack.Decoder(ClientMessage)
_from_server = msgspec.msgpack.Decoder(ServerMessage)


@dataclass(frozen=True)
class Signed:
    """A client's message as it came: decoded, and its signature not yet checked.

    Args:
        message: the header.
        payload: uint32 values; empty except for a masked input. [value]
        raw: everything, for passing on.
    """

    message: ClientMessage
    payload: UInt32Array = field(repr=False)
    raw: memoryview = field(repr=False)

    def check(self, public_key: bytes) -> None:
        """Check the signature.

        Raises:
            BadSignature: if it is not that of this identity on these bytes.
        """
        end = len(self.raw) - _SIGNATURE_BYTES
        verify(public_key, bytes(self.raw[end:]), _to_sign(self.raw[:end]))


def sign(message: ClientMessage, identity: Identity) -> bytes:
    """A message without payload, signed."""
    header = msgspec.msgpack.encode(message)
    frame = _LENGTHS.pack(len(header), 0) + header
    return frame + identity.sign(_to_sign(memoryview(frame)))


class VectorFrame:
    """The message of a masked input, with its vector in place: it is never copied.

    Args:
        message: the header.
        size: values in the vector.
    """

    def __init__(self, message: MaskedInput, size: int) -> None:
        self._header = msgspec.msgpack.encode(message)
        start, length = _LENGTHS.size, 4 * size
        self._end = start + length + len(self._header)
        self._frame = bytearray(self._end + _SIGNATURE_BYTES)
        _LENGTHS.pack_into(self._frame, 0, len(self._header), length)
        self._frame[start + length : self._end] = self._header
        self.values: UInt32Array = np.frombuffer(self._frame, "<u4", size, start)

    def sign(self, identity: Identity) -> memoryview:
        """The finished message."""
        to_sign = _to_sign(memoryview(self._frame)[: self._end])
        self._frame[self._end :] = identity.sign(to_sign)
        return memoryview(self._frame).toreadonly()


def decode_client(data: bytes | memoryview, terms: Terms) -> Signed:
    """Read a message from a client; its signature is checked by ``Signed.check``.

    Raises:
        MalformedMessage: if the bytes are no message, or not the one encoding of it.
        OversizedMessage: if they are more than any message may have.
    """
    raw = memoryview(data)
    longest = client_header_limit(terms)
    if len(raw) > _LENGTHS.size + 4 * terms.size + longest + _SIGNATURE_BYTES:
        raise OversizedMessage(f"{len(raw)} bytes from a client are more than any message has")
    if len(raw) < _LENGTHS.size + _SIGNATURE_BYTES:
        raise MalformedMessage(f"{len(raw)} bytes are no message")
    header_length, payload_length = _LENGTHS.unpack_from(raw)
    if header_length > longest:
        raise OversizedMessage(f"a header of {header_length} bytes; at most {longest} are allowed")
    start = _LENGTHS.size + payload_length
    if len(raw) != start + header_length + _SIGNATURE_BYTES:
        raise MalformedMessage("the lengths in a message do not add up to its own")
    message = _decode(_from_client, raw[start : start + header_length])
    expected = 4 * terms.size if isinstance(message, MaskedInput) else 0
    if payload_length != expected:
        raise MalformedMessage(f"{payload_length} bytes of payload where {expected} belong")
    payload = np.frombuffer(raw, "<u4", payload_length // 4, _LENGTHS.size)
    return Signed(message, payload, raw)


def encode_server(message: ServerMessage) -> bytes:
    """A message from the server."""
    return msgspec.msgpack.encode(message)


def decode_server(data: bytes | memoryview, terms: Terms) -> ServerMessage:
    """Read a message from the server.

    Raises: as for ``decode_client``.
    """
    longest = 512 + 512 * max(terms.thresholds.clients, len(terms.roster))
    if len(data) > longest:
        raise OversizedMessage(f"{len(data)} bytes from the server; at most {longest} are allowed")
    message: ServerMessage = _decode(_from_server, memoryview(data))
    return message


def client_header_limit(terms: Terms) -> int:
    """Longest header of a client's message, in bytes."""
    return 512 + 128 * (terms.thresholds.neighbours + 1)


def ascending(numbers: list[int]) -> bool:
    """Whether a list of clients is in order and without repeats, as it has to be."""
    return all(a < b for a, b in itertools.pairwise(numbers))


def _decode(decoder: "msgspec.msgpack.Decoder[Any]", data: memoryview) -> Any:
    try:
        message = decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise MalformedMessage(f"bytes that are no message: {error}") from None
    if msgspec.msgpack.encode(message) != data:
        raise MalformedMessage("bytes that are not the one encoding of their message")
    return message


def _to_sign(frame: memoryview) -> bytes:
    return info("message", hashlib.sha256(frame).digest())
