"""Counter-based adapter dropout: the mask is a function of keys, never stored.

An element is kept or dropped by (seed, client, step, layer, row, token, feature) alone, so neither
padding nor the number of clients in one pass moves it, and the backward pass makes it again.

All arithmetic is on 32 bits and wraps, so that a GPU kernel can make the same bits.
"""

import math

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor


def _signed(value: int) -> int:
    """The int32 with the low 32 bits of value."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


_MIX_1 = _signed(0x7FEB352D)
_MIX_2 = _signed(0x846CA68B)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift (torch shifts int32 arithmetically)."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every input bit moves every output bit.

    Source: the constants of C. Wellons' "hash prospector" search (lowbias32).
    """
    x = (x ^ _shift(x, 16)) * _MIX_1
    x = (x ^ _shift(x, 15)) * _MIX_2
    return x ^ _shift(x, 16)


def row_keys(client_keys: Int[Tensor, " client"], rows: int) -> Int32[Tensor, "client {rows}"]:
    """Keys of the rows of one step.

    Args:
        client_keys: one word per client that already depends on seed, client and step.
        rows: rows of each client.

    Returns:
        One 32-bit key per (client, row).
    """
    places = torch.arange(rows, dtype=torch.int32, device=client_keys.device)
    return _mix(_mix(client_keys.to(torch.int32))[:, None] ^ places)


def token_keys(
    keys: Int32[Tensor, "*row"], tokens: Int[Tensor, "*row token"]
) -> Int32[Tensor, "*row token"]:
    """Keys of the tokens of some rows.

    Args:
        keys: one key per row.
        tokens: the position of each token in its own sequence, counted without padding.

    Returns:
        One 32-bit key per token.
    """
    return _mix(keys[..., None] ^ tokens.to(torch.int32))


def layer_keys(keys: Int32[Tensor, "*shape"], layer: int) -> Int32[Tensor, "*shape"]:
    """Keys of one layer from the keys of the step; layer is any number that names the layer."""
    return _mix(keys ^ _signed(layer * 0x9E3779B1 + 1))


def drop_threshold(p: float) -> int:
    """The int32 below which a word drops its element; a share p of all words is."""
    return _signed(min(round(p * 2**32), 2**32 - 1) ^ 0x80000000)


def keep_mask(
    keys: Int32[Tensor, " token"], features: int, p: float
) -> Bool[Tensor, "token {features}"]:
    """Which elements survive dropout.

    Args:
        keys: one key per token.
        features: width of the layer's input.
        p: probability of dropping an element, in [0, 1).

    Returns:
        True where the element is kept; each with probability 1 - p to within 2⁻³².

    Raises:
        ValueError: for a p that is no probability below 1.
    """
    _require_probability("p", p)
    columns = _mix(torch.arange(features, dtype=torch.int32, device=keys.device) + 0x3C6EF372)
    x = (keys[:, None] ^ columns).mul_(_MIX_1)
    x = x.bitwise_xor_(_shift(x, 15)).mul_(_MIX_2)
    # Only the high bits are compared, and multiplication mixes into those best.
    return x >= drop_threshold(p)


def keys_of_vectors(
    x: Float[Tensor, "... d"], keys: Int32[Tensor, "..."] | None, p: float, op: str
) -> Int32[Tensor, " vector"] | None:
    """One key for every vector of x, in one line; None where nothing is dropped.

    Raises:
        ValueError: for a p that is no probability below 1, or keys of another type, number or
            device.
    """
    _require_probability(f"{op}: dropout", p)
    if keys is None or p == 0.0:
        return None
    if keys.dtype != torch.int32:
        raise ValueError(f"{op}: dropout keys are words of 32 bits, int32, not {keys.dtype}")
    rows = math.prod(x.shape[:-1])
    if keys.numel() != rows:
        raise ValueError(f"{op}: {keys.numel()} dropout keys for {rows} vectors of x")
    if keys.device != x.device:
        raise ValueError(f"{op}: dropout keys are on {keys.device}, and x on {x.device}")
    return keys.reshape(-1).contiguous()


def _require_probability(name: str, p: float) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name} is a probability in [0, 1), not {p}")


def dropout_factors(x: Tensor, keys: Tensor | None, p: float) -> Tensor | None:
    """What dropout multiplies x by: 0 or 1/(1-p); None where nothing is dropped. [token, d]"""
    if keys is None or p == 0.0:
        return None
    return keep_mask(keys, x.shape[-1], p).to(x.dtype).mul_(1.0 / (1.0 - p))
