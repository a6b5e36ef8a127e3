"""Long-term identities, and the roster of them that every client pins. docs/protocol.md §1."""

import functools
import json
import os
import stat
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedsa_secure.errors import BadSignature, CheckpointError, IdentityError
from fedsa_secure.files import sync_folder, write_atomic

PUBLIC_KEY_BYTES = 32
_NUMBERS = 2**32  # messages hold no larger ones


class Identity:
    """A client's long-term Ed25519 key. It is shown by its public half only.

    Args:
        key: the private key.
    """

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"Identity({self.public_key.hex()})"

    @classmethod
    def new(cls) -> "Identity":
        """A fresh identity, from the operating system's random numbers."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_secret(cls, secret: bytes) -> "Identity":
        """The identity of 32 secret bytes, for simulations that have to be repeatable."""
        return cls(Ed25519PrivateKey.from_private_bytes(secret))

    def sign(self, message: bytes) -> bytes:
        """An Ed25519 signature, 64 bytes."""
        return self._key.sign(message)

    def save(self, path: Path) -> None:
        """Write the private key as PEM, readable by the owner alone.

        Raises:
            IdentityError: if there is a file already, or it cannot be written.
        """
        content = self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise IdentityError(
                f"{path} exists, and an identity is never overwritten: give another path"
            ) from None
        except OSError as error:
            raise IdentityError(f"cannot write {path}: {error.strerror}") from None
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.absolute().parent)

    @classmethod
    def load(cls, path: Path) -> "Identity":
        """Read a private key.

        Raises:
            IdentityError: if the file is missing, readable by others, or no Ed25519 key.
        """
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            content = path.read_bytes()
        except OSError as error:
            raise IdentityError(
                f"cannot read {path}: {error.strerror}; 'fedsa-secure keys new' makes one"
            ) from None
        if mode & 0o077:
            raise IdentityError(
                f"{path} has mode {mode:04o}, so others may read it; run: chmod 600 {path}"
            )
        try:
            key = serialization.load_pem_private_key(content, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise IdentityError(f"{path} holds no Ed25519 private key in PEM")
        return cls(key)


@functools.lru_cache(maxsize=16384)
def verify(public_key: bytes, signature: bytes, message: bytes) -> None:
    """Check an Ed25519 signature; a pure function, so checks of public values are remembered.

    Raises:
        BadSignature: if it does not hold.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        raise BadSignature("a message was not signed by the identity on the roster") from None


def load_roster(path: Path) -> dict[int, bytes]:
    """Public keys by client number.

    Raises:
        IdentityError: if the file is missing or not a roster, or a key occurs twice.
    """
    try:
        content = json.loads(path.read_bytes())
        roster = {int(client): bytes.fromhex(key) for client, key in content["clients"].items()}
    except OSError as error:
        raise IdentityError(f"cannot read the roster {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise IdentityError(
            f"{path} is no roster; 'fedsa-secure keys register' writes one"
        ) from None
    _check_roster(path, roster)
    return dict(sorted(roster.items()))


def register(path: Path, client: int, public_key: str) -> dict[int, bytes]:
    """Add a client to a roster file, which is made if it does not exist.

    Args:
        path: the roster.
        client: its number.
        public_key: in hex, as ``keys show`` prints it.

    Raises:
        IdentityError: if the number is taken or none, the key is none or on the roster already, or
            the file cannot be written.
    """
    roster = load_roster(path) if path.exists() else {}
    try:
        key = bytes.fromhex(public_key)
    except ValueError:
        key = b""
    if client in roster:
        raise IdentityError(f"client {client} is on {path} already, with {roster[client].hex()}")
    roster[client] = key
    _check_roster(path, roster)
    content = {"clients": {str(k): roster[k].hex() for k in sorted(roster)}}
    try:
        write_atomic(path, json.dumps(content, indent=1).encode() + b"\n")
    except CheckpointError as error:
        reason = getattr(error.__cause__, "strerror", None) or error
        raise IdentityError(f"cannot write the roster {path}: {reason}") from None
    return roster


def _check_roster(path: Path, roster: dict[int, bytes]) -> None:
    for client, key in roster.items():
        if not 0 <= client < _NUMBERS or len(key) != PUBLIC_KEY_BYTES:
            raise IdentityError(
                f"client {client} of {path}: a number from 0, below 2³², and a public key of "
                f"{2 * PUBLIC_KEY_BYTES} hexadecimal digits are needed"
            )
    if len(set(roster.values())) < len(roster):
        raise IdentityError(f"a public key occurs twice in {path}; every client has its own")
