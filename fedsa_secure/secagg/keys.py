"""Keys that live for one attempt, and what is derived from them. docs/protocol.md §3."""

import os
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedsa_secure.csprng import MaskGenerator
from fedsa_secure.errors import BadShare, KeySubstitution
from fedsa_secure.secagg.derivation import digest, kdf
from fedsa_secure.secagg.terms import Terms

_NONCE_BYTES = 12


def private_key(secret: bytes) -> X25519PrivateKey:
    """The X25519 key of a secret of 32 bytes; making it costs as much as an exchange."""
    return X25519PrivateKey.from_private_bytes(secret)


def public_key(secret: bytes) -> bytes:
    """The X25519 public key of a secret of 32 bytes."""
    return private_key(secret).public_key().public_bytes_raw()


def exchange(key: X25519PrivateKey, peer: bytes) -> bytes:
    """X25519 (RFC 7748 §6.1): 32 bytes that only the two owners can compute.

    Raises:
        KeySubstitution: if the peer's key is a point of small order.
    """
    try:
        return key.exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError:
        raise KeySubstitution("an advertised key is a point of small order") from None


def pairwise_mask_key(
    key: X25519PrivateKey,
    peer: bytes,
    sid: bytes,
    context: bytes,
    pair: tuple[int, int],
    generator: MaskGenerator = "aes-256-ctr",
) -> bytes:
    """The key of the stream that two clients share in one attempt.

    Args:
        key: mask key of one of them.
        peer: public mask key of the other.
        sid: of the session.
        context: of the attempt; binds model, configuration and members.
        pair: both clients, the smaller number first.
        generator: that the key is for; each has keys of its own.
    """
    return kdf(exchange(key, peer), sid, _label("pairwise mask", generator), context, *pair)


def self_mask_key(
    seed: bytes,
    sid: bytes,
    context: bytes,
    client: int,
    generator: MaskGenerator = "aes-256-ctr",
) -> bytes:
    """The key of the stream that a client adds for itself; each generator has keys of its own."""
    return kdf(seed, sid, _label("self mask", generator), context, client)


def _label(purpose: str, generator: MaskGenerator) -> str:
    """The first generator has the labels that were there before it had a name."""
    return purpose if generator == "aes-256-ctr" else f"{purpose} {generator}"


class ShareBox:
    """Seals what one client sends to another in one attempt, so that the server cannot read it.

    Args:
        secret: what the two have exchanged with their sealing keys.
        step: session id, round and attempt.
        owner: who seals.
        holder: who opens.
    """

    def __init__(
        self,
        secret: bytes,
        step: tuple[bytes, int, int],
        owner: int,
        holder: int,
    ) -> None:
        sid, round_number, attempt = step
        self._cipher = ChaCha20Poly1305(
            kdf(secret, sid, "share", round_number, attempt, owner, holder)
        )
        self._data = digest("sealed", sid, round_number, attempt, owner, holder)
        self._owner = owner

    def seal(self, content: bytes) -> bytes:
        """A random nonce, then the ciphertext and its tag."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, content, self._data)

    def open(self, sealed: bytes) -> bytes:
        """The content.

        Raises:
            BadShare: if it was not sealed by this owner for this holder and attempt.
        """
        try:
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], self._data)
        except InvalidTag:
            raise BadShare(f"the share from client {self._owner} does not open") from None


def attempt_context(
    terms: Terms, step: tuple[bytes, int, int], model: bytes, members: Sequence[int]
) -> bytes:
    """What every mask of an attempt is bound to (docs/protocol.md §3)."""
    return digest("context", *step, terms.hash, model, members)


def seed_commitment(step: tuple[bytes, int, int], client: int, seed: bytes) -> bytes:
    """What a client advertises of its seed, so that a rebuilt one can be checked."""
    return digest("seed", *step, client, seed)
