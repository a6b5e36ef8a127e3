"""The one stream of secret bits: AES-256 in counter mode, under keys from HKDF-SHA256.

Masks, rounding coins and noise come from here. A stream is a function of its key, so a key must not
be used for two purposes, and never twice for the same.

Assumption: AES-256 is a pseudo-random permutation and HMAC-SHA256 a pseudo-random function.
"""

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

BLOCK = 32768
"""Words made at a time: 128 KiB, so that a block and what it is added to stay in the L2 cache."""
_AES_WORDS = 4
_ZEROS = memoryview(bytes(4 * BLOCK))


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
