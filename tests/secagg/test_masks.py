"""Masks: streams, added and taken away modulo 2³², whatever the number of threads."""

import hashlib
import os
from collections.abc import Sequence

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from fedsa_secure.csprng import BLOCK, Block, ChaCha20Keystream, Keystream, derive_key
from fedsa_secure.secagg import masks as module
from fedsa_secure.secagg.masks import Mask, apply_masks

# Around one AES block, one block of words, and the borders between two and three threads' parts.
SIZES = (0, 1, 3, 4, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 7)


def reference_stream(key: bytes, count: int) -> np.ndarray:
    """The whole stream at once."""
    encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(encryptor.update(bytes(4 * count)), "<u4")


def reference_chacha20(key: bytes, count: int) -> np.ndarray:
    """Block by block, each from a cipher of its own."""
    content = b"".join(
        Cipher(algorithms.ChaCha20(key, counter.to_bytes(4, "little") + bytes(12)), None)
        .encryptor()
        .update(bytes(64))
        for counter in range(-(-count // 16))
    )
    return np.frombuffer(content, "<u4")[:count]


REFERENCES = {"aes-256-ctr": reference_stream, "chacha20": reference_chacha20}


def reference_sum(vector: np.ndarray, masks: Sequence[Mask]) -> np.ndarray:
    """In Python's integers' place: 64 bits, reduced at the end."""
    total = vector.astype(np.int64)
    for mask in masks:
        stream = REFERENCES[mask.generator](mask.key, len(vector)).astype(np.int64)
        total += stream if mask.add else -stream
    return (total % 2**32).astype(np.uint32)


def example(size: int) -> tuple[np.ndarray, list[Mask]]:
    vector = np.random.default_rng(size).integers(0, 2**32, size, dtype=np.uint32)
    keys = [hashlib.sha256(bytes([k])).digest() for k in range(5)]
    names = ("aes-256-ctr", "chacha20", "chacha20", "aes-256-ctr", "aes-256-ctr")
    return vector, [Mask(*each) for each in zip(keys, (0, 0, 1, 1, 0), names, strict=True)]


@pytest.mark.parametrize("threads", [1, 2, 3, None])
@pytest.mark.parametrize("size", SIZES)
def test_masks_are_the_streams_of_a_plain_reference(size: int, threads: int | None) -> None:
    vector, masks = example(size)
    expected = reference_sum(vector, masks)
    apply_masks(vector, masks, threads)
    np.testing.assert_array_equal(vector, expected)


def test_masks_with_the_other_sign_give_the_vector_back() -> None:
    vector, masks = example(1000)
    plain = vector.copy()
    apply_masks(vector, masks)
    assert np.count_nonzero(vector == plain) < 3
    apply_masks(vector, [mask._replace(add=not mask.add) for mask in masks])
    np.testing.assert_array_equal(vector, plain)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_part_that_could_not_be_masked_is_never_passed_over(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """A thread that runs out of memory would otherwise leave its part of the vector plain."""

    class NoMemory(Keystream):
        def __init__(self, key: bytes, offset: int = 0) -> None:
            if offset or threads == 1:
                raise MemoryError
            super().__init__(key, offset)

    monkeypatch.setattr(module, "Keystream", NoMemory)
    with pytest.raises(MemoryError):
        apply_masks(np.zeros(2 * BLOCK, np.uint32), [Mask(bytes(32), add=True)], threads)


@given(st.binary(min_size=32, max_size=32), st.integers(0, 2000), st.integers(1, 40))
def test_a_stream_may_be_entered_at_any_aes_block(key: bytes, blocks: int, count: int) -> None:
    offset = 4 * blocks
    found = Keystream(key, offset).words(count, Block())
    np.testing.assert_array_equal(found, reference_stream(key, offset + count)[offset:])


@given(st.binary(min_size=32, max_size=32), st.integers(0, 50), st.integers(1, 40))
def test_a_stream_may_be_entered_at_any_chacha20_block(key: bytes, blocks: int, count: int) -> None:
    offset = 16 * blocks
    found = ChaCha20Keystream(key, offset).words(count, Block())
    np.testing.assert_array_equal(found, reference_chacha20(key, offset + count)[offset:])


@given(st.lists(st.integers(0, 23), max_size=12))
def test_a_chacha20_stream_goes_on_where_it_was_left(counts: list[int]) -> None:
    stream, block = ChaCha20Keystream(b"k" * 32), Block()
    found = [word for count in counts for word in stream.words(count, block).tolist()]
    assert found == reference_chacha20(b"k" * 32, sum(counts)).tolist()


def test_a_chacha20_stream_is_the_one_of_rfc_8439() -> None:
    """Appendix A.1, test vectors 1 and 2: a key and a nonce of zeros, counters 0 and 1."""
    words = ChaCha20Keystream(bytes(32)).words(32, Block())
    assert words.tobytes().hex() == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )


def test_a_chacha20_stream_ends_with_its_counter() -> None:
    """It would begin again."""
    last = ChaCha20Keystream(bytes(32), 2**36 - 16)
    last.words(10, Block())
    with pytest.raises(OverflowError, match="2³² blocks"):
        last.words(7, Block())
    assert len(last.words(6, Block())) == 6
    with pytest.raises(OverflowError, match="2³² blocks"):
        ChaCha20Keystream(bytes(32), 2**36 + 16)


@pytest.mark.parametrize(("key", "offset"), [(bytes(31), 0), (bytes(16), 0), (bytes(32), 4)])
def test_a_chacha20_stream_of_a_short_key_or_within_a_block_is_refused(
    key: bytes, offset: int
) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        ChaCha20Keystream(key, offset)


def test_a_generator_that_nobody_knows_makes_no_mask() -> None:
    vector = np.zeros(4, np.uint32)
    mask = Mask(bytes(32), True, "xor")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no generator of masks is called 'xor'"):
        apply_masks(vector, [mask])


@given(st.lists(st.integers(0, 23), max_size=12))
def test_a_stream_goes_on_where_it_was_left(counts: list[int]) -> None:
    stream, block = Keystream(b"k" * 32), Block()
    found = [word for count in counts for word in stream.words(count, block).tolist()]
    assert found == reference_stream(b"k" * 32, sum(counts)).tolist()


@pytest.mark.parametrize(("key", "offset"), [(bytes(31), 0), (bytes(16), 0), (bytes(32), 2)])
def test_a_stream_of_a_short_key_or_within_an_aes_block_is_refused(key: bytes, offset: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Keystream(key, offset)


def test_the_first_words_are_those_of_aes_256_as_nist_has_it() -> None:
    """The known answer for a key and a block of zeros; a counter from zero encrypts that first."""
    words = Keystream(bytes(32)).words(4, Block())
    assert words.tobytes().hex() == "dc95c078a2408989ad48a21492842087"


def test_keys_are_those_of_rfc_5869() -> None:
    """Test case 1, whose output is longer: its first 32 bytes."""
    key = derive_key(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)))
    assert key.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"


def test_all_cores_of_the_process_are_used_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    class Pool(module.ThreadPoolExecutor):
        def __init__(self, threads: int) -> None:
            used.append(threads)
            super().__init__(threads)

    monkeypatch.setattr(module, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    apply_masks(np.zeros(4 * BLOCK, np.uint32), [])
    apply_masks(np.zeros(2 * BLOCK, np.uint32), [])
    assert used == [3, 2]
