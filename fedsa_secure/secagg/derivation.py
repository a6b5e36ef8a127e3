"""Hashes and keys with labels. docs/protocol.md §3."""

import hashlib
import struct
from collections.abc import Iterable

from fedsa_secure.csprng import derive_key

VERSION = "fedsa-secagg/1"
"""Part of every label, so that no value of one version is one of another."""

Part = bytes | int | Iterable[int]


def digest(label: str, *parts: Part) -> bytes:
    """H(label, parts…): 32 bytes that differ wherever label or a part differ."""
    return hashlib.sha256(info(label, *parts)).digest()


def kdf(secret: bytes, salt: bytes, label: str, *parts: Part) -> bytes:
    """KDF(secret, salt, label, parts…): a key of 32 bytes for this purpose alone."""
    return derive_key(secret, salt, info(label, *parts))


def info(label: str, *parts: Part) -> bytes:
    """The label and the parts, each behind its length: no two lists have the same bytes."""
    framed = [_frame(f"{VERSION} {label}".encode())]
    framed += [_frame(_bytes(part)) for part in parts]
    return b"".join(framed)


def _frame(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def _bytes(part: Part) -> bytes:
    if isinstance(part, bytes):
        return part
    if isinstance(part, bytearray | memoryview):  # else read as a list of numbers
        raise TypeError("hash bytes, not a buffer")
    if isinstance(part, int):
        return struct.pack("<Q", part)
    return b"".join(struct.pack("<Q", number) for number in part)
