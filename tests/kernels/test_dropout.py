"""The counter-based dropout bits: their rate, their independence, and their definition."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from fedsa_kernels import keep_mask, layer_keys, row_keys
from fedsa_kernels import token_keys as keys_of_rows

CLIENTS, ROWS, TOKENS, FEATURES = 4, 8, 16, 256


def positions(clients: int = CLIENTS, rows: int = ROWS, tokens: int = TOKENS) -> Tensor:
    return torch.arange(tokens).expand(clients, rows, tokens)


def token_keys(clients: Tensor, tokens: Tensor) -> Tensor:
    """Keys of a whole batch, [client, row, token], from one word per client."""
    return keys_of_rows(row_keys(clients, tokens.shape[1]), tokens)


def all_keys(step: int = 0, layer: int = 0) -> Tensor:
    """Keys of a batch; client words are consecutive, which is the hardest case for a hash."""
    clients = torch.arange(CLIENTS) + CLIENTS * step
    return layer_keys(token_keys(clients, positions()), layer)


def mask(keys: Tensor, p: float) -> Tensor:
    return keep_mask(keys.reshape(-1), FEATURES, p).view(*keys.shape, FEATURES)


# --- rate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_share_of_kept_elements_is_one_minus_p(p):
    """Five sigma, over all elements and in each of 256 columns: one false alarm in 6800."""
    kept = mask(all_keys(), p).reshape(-1, FEATURES).double()
    vectors = len(kept)
    sigma = math.sqrt(p * (1 - p) / vectors)
    assert abs(kept.mean() - (1 - p)) < 5 * sigma / math.sqrt(FEATURES)
    assert (kept.mean(0) - (1 - p)).abs().max() < 5 * sigma


def test_nothing_is_dropped_at_p_zero():
    assert mask(all_keys(), 0.0).all()


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_what_is_no_probability_is_refused(p):
    with pytest.raises(ValueError, match=r"p is a probability in \[0, 1\), not"):
        mask(all_keys(), p)


def test_an_element_that_survives_a_larger_p_survives_a_smaller_one():
    keys = all_keys()
    kept = [mask(keys, p) for p in (0.1, 0.5, 0.9)]
    assert all((less <= more).all() for more, less in itertools.pairwise(kept))


# --- independence ----------------------------------------------------------------------------


def assert_uncorrelated(one: Tensor, other: Tensor, p: float) -> None:
    """Both kept: binomial with (1-p)². Five sigma is one false alarm in 1.7 million."""
    expected = (1 - p) ** 2
    sigma = math.sqrt(expected * (1 - expected) / one.numel())
    assert abs((one & other).double().mean() - expected) < 5 * sigma


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_masks_of_neighbours_are_uncorrelated(p):
    """Every comparison here holds by chance but for 1 in 30,000 (3 × 18 of 1 in 1.7 million)."""
    base = mask(all_keys(), p)
    for layer in (1, 2, 2**31, 2**32 - 1):
        assert_uncorrelated(base, mask(all_keys(layer=layer), p), p)
    for step in (1, 2, 1000):
        assert_uncorrelated(base, mask(all_keys(step=step), p), p)
    for axis, size in enumerate(base.shape):  # client, row, token, feature
        for shift in {1, 2, size // 2}:
            assert_uncorrelated(base, base.roll(shift, axis), p)


def test_keys_of_a_batch_are_all_different():
    """68,719 pairs in 2³² words: a collision by chance once in 16,000 hashes."""
    keys = torch.cat([all_keys(layer=layer).reshape(-1) for layer in (0, 1)])
    keys = keys[: CLIENTS * ROWS * TOKENS]
    assert len(keys.unique()) == len(keys)


# --- padding and stacking --------------------------------------------------------------------


def test_keys_do_not_depend_on_padding_other_rows_or_other_clients():
    clients = torch.tensor([5, 2**31, -7])
    alone = token_keys(clients[:1], positions(1, 2, 5))
    stacked = token_keys(clients, positions(3, 4, 9))
    assert torch.equal(stacked[:1, :2, :5], alone)


def test_left_padding_moves_keys_with_their_tokens():
    right = torch.arange(6).expand(1, 2, 6)
    left = (torch.arange(9) - 3).clamp(min=0).expand(1, 2, 9)
    clients = torch.tensor([3])
    assert torch.equal(token_keys(clients, left)[..., 3:], token_keys(clients, right))


def test_mask_of_a_vector_does_not_depend_on_the_others():
    keys = all_keys().reshape(-1)
    alone = torch.cat([keep_mask(key[None], FEATURES, 0.5) for key in keys[:20]])
    assert torch.equal(keep_mask(keys, FEATURES, 0.5)[:20], alone)


def test_wider_layers_keep_the_bits_of_narrower_ones():
    keys = all_keys().reshape(-1)
    assert torch.equal(keep_mask(keys, 300, 0.5)[:, :37], keep_mask(keys, 37, 0.5))


# --- definition ------------------------------------------------------------------------------

WORD = 0xFFFFFFFF


def mix(x: int) -> int:
    """lowbias32 in Python's own whole numbers."""
    x = (x ^ x >> 16) * 0x7FEB352D & WORD
    x = (x ^ x >> 15) * 0x846CA68B & WORD
    return x ^ x >> 16


def key_by_hand(client: int, row: int, token: int, layer: int) -> int:
    key = mix(mix(mix(client & WORD) ^ row) ^ token)
    return mix(key ^ (layer * 0x9E3779B1 + 1) & WORD)


def kept_by_hand(key: int, column: int, p: float) -> bool:
    x = (key ^ mix(column + 0x3C6EF372)) * 0x7FEB352D & WORD
    x = (x ^ x >> 15) * 0x846CA68B & WORD
    return x ^ 0x80000000 >= round(p * 2**32)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9])
def test_bits_are_those_of_the_definition_in_whole_numbers(p):
    clients, layer = [0, 1, 2**31 + 5, -1], 0xDEADBEEF
    keys = layer_keys(token_keys(torch.tensor(clients), positions(4, 3, 5)), layer)
    by_hand = [
        [[key_by_hand(client, row, token, layer) for token in range(5)] for row in range(3)]
        for client in clients
    ]
    assert torch.equal(keys.long() & WORD, torch.tensor(by_hand))
    words = torch.tensor(by_hand).reshape(-1).tolist()
    expected = torch.tensor([[kept_by_hand(key, j, p) for j in range(33)] for key in words])
    assert torch.equal(keep_mask(keys.reshape(-1), 33, p), expected)
