"""ChaCha20 in plain torch: RFC 8439's vectors, OpenSSL's stream, and what is refused."""

import pytest
import torch
from chacha20_vectors import (
    BLOCK,
    BLOCK_NONCE,
    COUNTS,
    EDGES,
    KEY,
    TEXT_NONCE,
    openssl_words,
    text_words,
    words_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsa_kernels import KeystreamExhaustedError, chacha20_words
from fedsa_kernels.chacha20 import pack_stream, reference


def test_block_of_rfc_8439_section_2_3_2():
    assert torch.equal(chacha20_words(KEY, BLOCK_NONCE, 1, 16), words_of(BLOCK))


def test_text_of_rfc_8439_section_2_4_2():
    expected = text_words()
    assert torch.equal(chacha20_words(KEY, TEXT_NONCE, 1, len(expected)), expected)


@settings(max_examples=30)
@given(
    key=st.binary(min_size=32, max_size=32),
    nonce=st.binary(min_size=12, max_size=12),
    counter=st.integers(0, 2**32 - 10),
    count=st.integers(0, 150),
)
def test_stream_is_that_of_openssl(key: bytes, nonce: bytes, counter: int, count: int):
    expected = openssl_words(key, nonce, counter, count)
    assert torch.equal(chacha20_words(key, nonce, counter, count), expected)


@pytest.mark.parametrize("counter", EDGES)
@pytest.mark.parametrize("count", COUNTS)
def test_stream_is_that_of_openssl_around_edges(counter: int, count: int):
    expected = openssl_words(KEY, TEXT_NONCE, counter, count)
    assert torch.equal(chacha20_words(KEY, TEXT_NONCE, counter, count), expected)


def test_stream_made_in_parts_is_the_stream(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, "_CHUNK", 3)
    assert torch.equal(
        chacha20_words(KEY, BLOCK_NONCE, 5, 200), openssl_words(KEY, BLOCK_NONCE, 5, 200)
    )


def test_the_last_block_is_given_and_none_after_it():
    last = 2**32 - 1
    assert len(chacha20_words(KEY, BLOCK_NONCE, last, 16)) == 16
    for counter, words in ((last, 17), (0, 2**36 + 1), (2**31, 2**35 + 1)):
        with pytest.raises(KeystreamExhaustedError, match="another key or nonce"):
            chacha20_words(KEY, BLOCK_NONCE, counter, words)


@pytest.mark.parametrize(
    ("key", "nonce", "counter", "words"),
    [
        (bytes(31), bytes(12), 0, 1),
        (bytes(16), bytes(12), 0, 1),
        (bytes(32), bytes(8), 0, 1),
        (bytes(32), bytes(16), 0, 1),
        (bytes(32), bytes(12), -1, 1),
        (bytes(32), bytes(12), 2**32, 1),
        (bytes(32), bytes(12), 0, -1),
    ],
)
def test_what_is_no_stream_is_refused(key: bytes, nonce: bytes, counter: int, words: int):
    with pytest.raises(ValueError, match=r"has 32 bytes|no stream"):
        chacha20_words(key, nonce, counter, words)


def test_an_error_says_nothing_of_the_key():
    key = b"not to be seen" * 2
    with pytest.raises(ValueError, match="32 bytes") as caught:
        pack_stream(key, bytes(12), 0, 1)
    assert "seen" not in str(caught.value)
    assert key.hex() not in str(caught.value)


@pytest.mark.parametrize("fails", [False, True])
def test_the_packed_key_is_erased_even_if_the_stream_fails(
    monkeypatch: pytest.MonkeyPatch, fails: bool
):
    seen: list[torch.Tensor] = []
    plain = reference.words

    def words(stream: torch.Tensor, count: int) -> torch.Tensor:
        assert stream.count_nonzero() > 0
        seen.append(stream)
        if fails:
            raise MemoryError
        return plain(stream, count)

    monkeypatch.setattr(reference, "words", words)
    if fails:
        with pytest.raises(MemoryError):
            chacha20_words(KEY, BLOCK_NONCE, 1, 16)
    else:
        assert torch.equal(chacha20_words(KEY, BLOCK_NONCE, 1, 16), words_of(BLOCK))
    assert [each.count_nonzero() for each in seen] == [0]
