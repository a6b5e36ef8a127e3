"""Streams of secret bits, under keys from HKDF-SHA256: AES-256 in counter mode, and ChaCha20.

Masks, rounding coins and noise come from here. A stream is a function of its key, so a key must not
be used for two purposes, and never twice for the same. ChaCha20 makes masks only, and only where
all clients have agreed on it; everything else is AES.

Assumption: AES-256 is a pseudo-random permutation, HMAC-SHA256 a pseudo-random function and, where
it is used, ChaCha20's block function too.
"""

from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

BLOCK = 32768
"""Words made at a time: 128 KiB, so that a block and what it is added to stay in the L2 cache."""
_AES_WORDS = 4
_CHACHA_WORDS = 16
_CHACHA_BLOCKS = 2**32
_ZEROS = memoryview(bytes(4 * BLOCK))

MaskGenerator = Literal["aes-256-ctr", "chacha20"]
"""What masks are made with."""


def derive_key(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 (RFC 5869): 32 bytes that are good for one purpose.

    Args:
        secret: input keying material.
        salt: public; may be empty.
        info: names the purpose.
    """
    return HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(secret)


class Block:
    """Memory that keystreams write into. One block serves many streams and stays in the cache."""

    __slots__ = ("memory", "words")

    def __init__(self) -> None:
        # update_into asks for up to one AES block more than it writes.
        self.memory = memoryview(bytearray(4 * BLOCK + 15))
        self.words: NDArray[np.uint32] = np.frombuffer(self.memory[: 4 * BLOCK], dtype="<u4")


class Keystream:
    """The AES-256-CTR stream of a key, as little-endian uint32 words.

    The counter is 128 bits, big endian, and starts at zero.

    Args:
        key: 32 bytes.
        offset: words to skip; a multiple of 4.
    """

    __slots__ = ("_encryptor",)

    def __init__(self, key: bytes, offset: int = 0) -> None:
        if len(key) != 32 or offset % _AES_WORDS:
            raise ValueError("a stream needs a key of 32 bytes and an offset in whole AES blocks")
        counter = (offset // _AES_WORDS).to_bytes(16, "big")
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()

    def words(self, count: int, block: Block) -> NDArray[np.uint32]:
        """The next words, at most ``BLOCK``: a view into ``block``, overwritten later. [count]"""
        self._encryptor.update_into(_ZEROS[: 4 * count], block.memory)
        return block.words[:count]


class ChaCha20Keystream:
    """The ChaCha20 stream of a key (RFC 8439, §2.4), as little-endian uint32 words.

    The nonce is zero, since no key has two streams. The counter is 32 bits and starts at zero.

    Args:
        key: 32 bytes.
        offset: words to skip; a multiple of 16.
    """

    __slots__ = ("_encryptor", "_left")

    def __init__(self, key: bytes, offset: int = 0) -> None:
        if len(key) != 32 or offset % _CHACHA_WORDS:
            raise ValueError(
                "a stream needs a key of 32 bytes and an offset in whole ChaCha20 blocks"
            )
        self._left = _CHACHA_WORDS * _CHACHA_BLOCKS - offset
        self._take(0)
        # The library's nonce is the counter, little endian, and then that of the RFC.
        start = (offset // _CHACHA_WORDS % _CHACHA_BLOCKS).to_bytes(4, "little") + bytes(12)
        self._encryptor = Cipher(algorithms.ChaCha20(key, start), None).encryptor()

    def words(self, count: int, block: Block) -> NDArray[np.uint32]:
        """The next words, as ``Keystream.words``.

        Raises:
            OverflowError: if the counter would come to its end: the stream would repeat itself.
        """
        self._take(count)
        self._encryptor.update_into(_ZEROS[: 4 * count], block.memory)
        return block.words[:count]

    def _take(self, count: int) -> None:
        if count > self._left:
            raise OverflowError("a ChaCha20 stream ends after 2³² blocks of 16 words")
        self._left -= count
