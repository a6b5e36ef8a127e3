"""What is known of the keystream of ChaCha20: RFC 8439, and the implementation of OpenSSL."""

import struct

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

KEY = bytes(range(32))

BLOCK_NONCE = bytes.fromhex("000000090000004a00000000")
BLOCK = bytes.fromhex(
    "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
    "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
)
"""§2.3.2: the block with counter 1."""

TEXT_NONCE = bytes.fromhex("000000000000004a00000000")
TEXT = (
    b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
    b"sunscreen would be it."
)
CIPHERTEXT = bytes.fromhex(
    "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0b"
    "f91b65c5524733ab8f593dabcd62b3571639d624e65152ab8f530c359f0861d8"
    "07ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736"
    "5af90bbf74a35be6b40b8eedf2785e42874d"
)
"""§2.4.2: the text under the stream from counter 1 on."""


def words_of(data: bytes) -> Tensor:
    """Bytes as int32, little endian; an incomplete word at the end is left out."""
    count = len(data) // 4
    return torch.tensor(struct.unpack(f"<{count}i", data[: 4 * count]), dtype=torch.int32)


def openssl_words(key: bytes, nonce: bytes, counter: int, count: int) -> Tensor:
    """The stream that ``cryptography`` makes."""
    start = struct.pack("<I", counter) + nonce
    return words_of(
        Cipher(algorithms.ChaCha20(key, start), None).encryptor().update(bytes(4 * count))
    )


def text_words() -> Tensor:
    """The stream that §2.4.2 has used, as far as the text goes in whole words."""
    return words_of(bytes(a ^ b for a, b in zip(TEXT, CIPHERTEXT, strict=True)))


EDGES = [0, 1, 2**31 - 3, 2**31 - 1, 2**31, 2**32 - 200]
"""Counters around the ends of signed and unsigned integers, with room for a few blocks."""
COUNTS = [0, 1, 15, 16, 17, 127, 2047, 2048, 2049, 2571]
"""Words around a block and around a program's block of blocks."""
