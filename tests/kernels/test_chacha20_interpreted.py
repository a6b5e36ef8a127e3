"""ChaCha20 as a kernel, run by Triton's interpreter: the same words as RFC 8439 and OpenSSL."""

import pytest
import torch
from chacha20_vectors import (
    BLOCK,
    BLOCK_NONCE,
    EDGES,
    KEY,
    TEXT_NONCE,
    openssl_words,
    text_words,
    words_of,
)

from fedsa_kernels.chacha20 import pack_stream, triton
from fedsa_kernels.launch import interpreted

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")


def kernel_words(key: bytes, nonce: bytes, counter: int, count: int) -> torch.Tensor:
    return triton.words(pack_stream(key, nonce, counter, count), count)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel leaves out does not look like a word of the stream by accident."""
    plain = torch.empty

    def empty(*sizes, **options):
        return plain(*sizes, **options).fill_(0x5EED)

    monkeypatch.setattr(torch, "empty", empty)


def test_block_of_rfc_8439_section_2_3_2():
    assert torch.equal(kernel_words(KEY, BLOCK_NONCE, 1, 16), words_of(BLOCK))


def test_text_of_rfc_8439_section_2_4_2():
    expected = text_words()
    assert torch.equal(kernel_words(KEY, TEXT_NONCE, 1, len(expected)), expected)


@pytest.mark.parametrize("counter", EDGES)
def test_stream_is_that_of_openssl_around_edges(counter: int):
    for count in (1, 17, 2049):  # one program, one with an unfinished block, two
        expected = openssl_words(KEY, TEXT_NONCE, counter, count)
        assert torch.equal(kernel_words(KEY, TEXT_NONCE, counter, count), expected), count


def test_streams_of_random_keys_are_those_of_openssl():
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> bytes:
        return bytes(torch.randint(256, (count,), generator=generator).tolist())

    for _ in range(8):
        key, nonce = drawn(32), drawn(12)
        counter = int.from_bytes(drawn(4), "little") % (2**32 - 300)
        count = int.from_bytes(drawn(2), "little") % 4500
        expected = openssl_words(key, nonce, counter, count)
        assert torch.equal(kernel_words(key, nonce, counter, count), expected)


def test_two_runs_agree():
    first, second = (kernel_words(KEY, TEXT_NONCE, 7, 5000) for _ in range(2))
    assert torch.equal(first, second)
