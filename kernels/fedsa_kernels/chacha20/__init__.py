"""``chacha20_words``: the keystream of ChaCha20, the same words on every device.

A stream of secret bits for masks. Kernels that need it use it where it is made, in registers; this
op writes it out.

**Keys are secret.** They come in as ``bytes`` and must not be logged, nor become part of an error,
a file name or a compile-time constant: machine code of Triton is kept on disk by its constants. A
key reaches a device as part of twelve words in its memory, copied there from pageable memory of
the host, and these words are overwritten with zeros, on the host and on the device, as soon as the
kernel that reads them is queued. Not erased are copies that the driver may have made on the way,
registers and caches, and the ``bytes`` of the caller. There is no op of ``torch.library`` here,
since profilers and tracers record the arguments of ops.
"""

import struct

import torch
from jaxtyping import Int32
from torch import Tensor

from fedsa_kernels.chacha20 import reference

__all__ = ["KeystreamExhaustedError", "chacha20_words", "pack_stream"]

_BLOCKS = 2**32


class KeystreamExhaustedError(ValueError):
    """More blocks were asked for than the counter of 32 bits can tell apart."""


def chacha20_words(
    key: bytes,
    nonce: bytes,
    counter: int,
    words: int,
    device: torch.device | str = "cpu",
) -> Int32[Tensor, " {words}"]:
    """The keystream of ChaCha20 as 32-bit words, each read from four bytes in little-endian order.

    Args:
        key: 32 bytes; secret, and used with this nonce for nothing else.
        nonce: 12 bytes; public.
        counter: number of the first block of 16 words, in [0, 2³²).
        words: how many.
        device: where to. The CPU runs the reference, any other device the kernel.

    Returns:
        The words; torch has no arithmetic on uint32, so they are int32 with the same bits.

    Raises:
        ValueError: if key or nonce have another length, or a number is out of its range.
        KeystreamExhaustedError: if the counter would pass 2³² − 1: the stream would repeat itself.

    Guarantee: without the key the words cannot be told from uniform ones. Assumption: ChaCha20's
    block function under a uniform key is a pseudo-random function of counter and nonce.

    Source: RFC 8439, §2.3 and §2.4.
    """
    packed = pack_stream(key, nonce, counter, words)
    stream = packed.to(device)
    try:
        if stream.device.type == "cpu":
            return reference.words(stream, words)
        from fedsa_kernels.chacha20 import triton

        return triton.words(stream, words)
    finally:
        packed.zero_()
        stream.zero_()  # in the device's queue behind the kernel


def pack_stream(key: bytes, nonce: bytes, counter: int, words: int) -> Int32[Tensor, "12"]:
    """Key, counter and nonce as a kernel reads them; secret, to be overwritten after use.

    Args:
        key: 32 bytes.
        nonce: 12 bytes.
        counter: number of the first block.
        words: that will be taken.

    Raises: as for ``chacha20_words``.
    """
    if len(key) != 32 or len(nonce) != 12:
        raise ValueError(
            f"a key has 32 bytes and a nonce 12; these have {len(key)} and {len(nonce)}"
        )
    if not 0 <= counter < _BLOCKS or words < 0:
        raise ValueError(f"no stream begins at block {counter} or has {words} words")
    if counter + -(-words // 16) > _BLOCKS:
        raise KeystreamExhaustedError(
            f"{words} words from block {counter} on need a counter above 2³² − 1; "
            "take another key or nonce"
        )
    packed = bytearray(48)  # written in place: no other copy of the key to be forgotten
    struct.pack_into("<32sI12s", packed, 0, key, counter, nonce)
    return torch.frombuffer(packed, dtype=torch.int32)
