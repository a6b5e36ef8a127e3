"""Per-record gradients on Triton kernels, for inputs up to float32.

Three kernels, of which none adds up in an order that is left to chance:

``_token_sum``: Σ over vectors of narrow·wideᵀ in registers. The vectors are the tokens of one
record, and the result is its gradient with the sum of squares of every tile beside it; or they are
all tokens of all records of a client, and the result is the clipped sum of what is kept as factors.
``_gram``: norms of what is kept as factors, which it can write in the same pass.
``_weighted_sum``: the clipped sum of whole gradients, each of them read once.
"""

import math
from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedsa_kernels.clipped_grad import reference
from fedsa_kernels.launch import Tile, launch, precision, rank_block, upcasts
from fedsa_kernels.products.parts import add_parts

_SUM_TILE = Tile(m=16, n=256, warps=4, stages=2)
"""m records by n values."""

_GRAM_TOKENS = 16
_GRAM_PRODUCTS = 4096
"""Sums in float64 that a program of ``_gram`` holds: pairs of tokens times columns."""

_PROGRAMS = 512
"""Sums over many records are split until there are this many programs."""

_STEPS = 4
"""A part of a sum has at least this many tiles, so that adding up the parts costs little."""


@triton.jit
@no_type_check
def _token_sum(
    narrow, wide, factors, total, squares,
    depth, tokens, thin, width, own, parts, span,
    narrow_row, narrow_token, narrow_col, wide_row, wide_token, wide_col, total_thin, total_wide,
    WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: segment · part of its vectors · strip of the wide side · strip of the narrow side.

    WEIGHTED: a segment is a client, and the factor of a vector's record is multiplied onto it.
    Else a segment is a record.
    """
    strips = tl.cdiv(thin, BLOCK_R)
    tiles = strips * tl.cdiv(width, BLOCK_N)
    segment_part, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    segment = (segment_part // parts).to(tl.int64)
    column = (tile // strips) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = (tile % strips) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside, ranked = column < width, r < thin
    start = (segment_part % parts) * span
    end = tl.minimum(start + span, depth)
    found = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for first in range(start, end, BLOCK_T):
        place = first + tl.arange(0, BLOCK_T)
        counts = place < end
        record, token = segment, place.to(tl.int64)
        if WEIGHTED:
            record, token = segment * own + place // tokens, (place % tokens).to(tl.int64)
            factor = tl.load(factors + record, mask=counts, other=0.0).to(tl.float32)
            counts = counts & (factor != 0.0)  # what is not loaded cannot make a NaN
        of_narrow = record * narrow_row + token * narrow_token
        narrow_tile = tl.load(
            narrow + of_narrow[:, None] + r[None, :] * narrow_col,
            mask=counts[:, None] & ranked[None, :],
            other=0.0,
        )
        of_wide = record * wide_row + token * wide_token
        wide_tile = tl.load(
            wide + of_wide[:, None] + column[None, :] * wide_col,
            mask=counts[:, None] & inside[None, :],
            other=0.0,
        )
        if UPCAST:
            narrow_tile, wide_tile = narrow_tile.to(tl.float32), wide_tile.to(tl.float32)
        if WEIGHTED:
            narrow_tile *= factor[:, None]
        found = tl.dot(tl.trans(wide_tile), narrow_tile, found, input_precision=PRECISION)
    if not WEIGHTED:
        # In one go: Triton 3.6 compiles no sum over one axis and then the other for Blackwell.
        square = tl.sum(tl.reshape(found * found, (BLOCK_N * BLOCK_R,)), axis=0)
        tl.store(squares + tl.program_id(0), square)
    place = segment_part.to(tl.int64) * thin * width
    tl.store(
        total + place + column[:, None] * total_wide + r[None, :] * total_thin,
        found,
        mask=inside[:, None] & ranked[None, :],
    )


@triton.jit
@no_type_check
def _products(
    x, kept, t, u, tokens, width, x_token, x_col, kept_token,
    KEEP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Products of the vectors t with the vectors u of one record, in float64. [BLOCK_T, BLOCK_T]

    Columns are added up where they are and brought together once, at the end. (``tl.dot`` takes no
    float64 for AMD in Triton 3.6.)
    """
    sums = tl.zeros((BLOCK_T, BLOCK_T, BLOCK_D), dtype=tl.float64)
    for first in range(0, width, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        a = tl.load(
            x + t[:, None] * x_token + column[None, :] * x_col,
            mask=(t[:, None] < tokens) & (column[None, :] < width),
            other=0.0,
        ).to(tl.float32)
        b = tl.load(
            x + u[:, None] * x_token + column[None, :] * x_col,
            mask=(u[:, None] < tokens) & (column[None, :] < width),
            other=0.0,
        ).to(tl.float32)
        if KEEP:
            tl.store(
                kept + t[:, None] * kept_token + column[None, :],
                a,
                mask=((t == u) & (t < tokens))[:, None] & (column[None, :] < width),
            )
        sums += a.to(tl.float64)[:, None, :] * b.to(tl.float64)[None, :, :]
    return tl.sum(sums, axis=2)


@triton.jit
@no_type_check
def _gram(
    left, right, kept, squares,
    tokens, m, k, error,
    left_row, left_token, left_col, right_row, right_token, right_col,
    KEEP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: record. KEEP: write the factors side by side, in float32."""
    record = tl.program_id(0).to(tl.int64)
    own_left, own_right = left + record * left_row, right + record * right_row
    own_kept = own_left  # not written to
    if KEEP:
        own_kept = kept + record * tokens * (m + k)
    square = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float64)
    left_square = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float64)
    right_square = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float64)
    for first in range(0, tokens, BLOCK_T):
        for other in range(0, first + BLOCK_T, BLOCK_T):
            t = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
            u = (other + tl.arange(0, BLOCK_T)).to(tl.int64)
            of_left = _products(
                own_left, own_kept, t, u, tokens, m, left_token, left_col, m + k,
                KEEP, BLOCK_T, BLOCK_D,
            )  # fmt: skip
            of_right = _products(
                own_right, own_kept + m, t, u, tokens, k, right_token, right_col, m + k,
                KEEP, BLOCK_T, BLOCK_D,
            )  # fmt: skip
            same, below = t[:, None] == u[None, :], t[:, None] > u[None, :]
            # A pair below the diagonal stands for the one above it too.
            square += of_left * of_right * tl.where(below, 2.0, tl.where(same, 1.0, 0.0))
            left_square += tl.where(same, of_left, 0.0)
            right_square += tl.where(same, of_right, 0.0)
    # Both sums of squares are part of the result, so one that is not finite makes it so too.
    norm = tl.sqrt(tl.maximum(tl.sum(tl.sum(square, axis=1), axis=0), 0.0))
    sizes = tl.sum(tl.sum(left_square, axis=1), axis=0) * tl.sum(
        tl.sum(right_square, axis=1), axis=0
    )
    norm += error * tl.sqrt(sizes)
    tl.store(squares + record, (norm * norm).to(tl.float32))


@triton.jit
@no_type_check
def _weighted_sum(
    gradients, factors, total,
    values, own, parts, span, row_stride, value_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: client · part of its records · strip of values."""
    strips = tl.cdiv(values, BLOCK_N)
    client_part, strip = tl.program_id(0) // strips, tl.program_id(0) % strips
    client = (client_part // parts).to(tl.int64)
    value = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = value < values
    start = (client_part % parts) * span
    end = tl.minimum(start + span, own)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(start, end, BLOCK_M):
        place = first + tl.arange(0, BLOCK_M)
        record = client * own + place
        factor = tl.load(factors + record, mask=place < end, other=0.0).to(tl.float32)
        counts = factor != 0.0  # what is not loaded cannot make a NaN
        tile = tl.load(
            gradients + record[:, None] * row_stride + value[None, :] * value_stride,
            mask=counts[:, None] & inside[None, :],
            other=0.0,
        )
        sums += tile.to(tl.float32) * factor[:, None]
    tl.store(total + client_part.to(tl.int64) * values + value, tl.sum(sums, axis=0), mask=inside)


def sample_grad(left: Tensor, right: Tensor, whole: bool) -> Tensor:
    """As ``reference.sample_grad``, in the same shapes."""
    if whole or not reference.keeps_factors(left, right):
        return _whole(left, right)[0]
    return reference.sample_grad(left, right, whole)  # a copy


def sample_grad_with_norms(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """As ``reference.sample_grad_with_norms``, in the same shapes, with both made in one pass."""
    if not reference.keeps_factors(left, right):
        return _whole(left, right)
    rows, tokens, m = left.shape
    kept = left.new_empty(rows, tokens, m + right.shape[2], dtype=torch.float32)
    return kept, _gram_squares(left, right, kept, torch.finfo(torch.float32).eps)


def squared_norms(gradients: Tensor, shape: Sequence[int]) -> Tensor:
    """As ``reference.squared_norms``, in float32."""
    if not reference.factored(gradients, shape):
        flat = gradients.reshape(len(gradients), math.prod(shape))  # torch reads it once
        norms: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32)
        return norms.square()
    left, right = torch.split(gradients, list(shape), dim=2)
    return _gram_squares(left, right, None, torch.finfo(gradients.dtype).eps)


def clipped_sum(gradients: Tensor, factors: Tensor, shape: Sequence[int]) -> Tensor:
    """As ``reference.clipped_sum``, summed in float32."""
    clients, own = factors.shape
    factors = factors.contiguous()
    if reference.factored(gradients, shape):
        left, right = torch.split(gradients, list(shape), dim=2)
        total, _ = _token_sums(left, right, factors)
    else:
        values = math.prod(shape)
        flat = gradients.reshape(len(gradients), values)
        strips = triton.cdiv(values, _SUM_TILE.n)
        parts, span = _split(own, _SUM_TILE.m, clients * strips)
        total = flat.new_empty(clients, parts, *shape, dtype=torch.float32)
        launch(
            _weighted_sum, (clients * parts * strips,),
            flat, factors, total, values, own, parts, span, *flat.stride(),
            BLOCK_M=_SUM_TILE.m, BLOCK_N=_SUM_TILE.n,
            num_warps=_SUM_TILE.warps, num_stages=_SUM_TILE.stages,
        )  # fmt: skip
    dtype = gradients.dtype
    return total[:, 0].to(dtype) if total.shape[1] == 1 else add_parts(total, dtype)


def _whole(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients [n, m, k] and their squared norms [n]."""
    sums, squares = _token_sums(left, right, None)
    return sums[:, 0], squares[:, 0] if squares.shape[1] == 1 else squares.sum(1)


def _token_sums(left: Tensor, right: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums over the tokens of every record, or with factors [C, n] of every client.

    Returns [segment, part, m, k], and for records the sum of squares of every tile. [segment, tile]
    """
    rows, tokens, m = left.shape
    k = right.shape[2]
    segments, own = (rows, 1) if factors is None else factors.shape
    narrow, wide, strides = (left, right, (k, 1)) if m <= k else (right, left, (1, k))
    thin, width = narrow.shape[2], wide.shape[2]
    upcast = factors is not None or upcasts(narrow) or upcasts(wide) or narrow.dtype != wide.dtype
    tile = _token_tile(4 if upcast else narrow.dtype.itemsize, thin)
    tiles = triton.cdiv(thin, tile.k) * triton.cdiv(width, tile.n)
    depth = own * tokens
    parts, span = (1, depth) if factors is None else _split(depth, tile.m, segments * tiles)
    total = left.new_empty(segments, parts, m, k, dtype=torch.float32)
    squares = left.new_empty(0 if factors is not None else rows, tiles, dtype=torch.float32)
    launch(
        _token_sum, (segments * parts * tiles,),
        narrow, wide, factors, total, squares,
        depth, tokens, thin, width, own, parts, span,
        *narrow.stride(), *wide.stride(), *strides,
        WEIGHTED=factors is not None, BLOCK_T=tile.m, BLOCK_N=tile.n, BLOCK_R=tile.k,
        # The bound on rounding in the norm of factors holds for products in full precision alone.
        PRECISION="ieee" if factors is not None else precision(narrow), UPCAST=upcast,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return total, squares


def _token_tile(itemsize: int, thin: int) -> Tile:
    """Tokens (m) by columns of the wide side (n) by columns of the narrow one (k)."""
    block = min(rank_block(thin), 64)
    if itemsize > 2:
        return Tile(m=32, n=32, k=block, warps=4, stages=2)
    return Tile(m=64, n=64, k=block, warps=4, stages=3)


def _gram_squares(left: Tensor, right: Tensor, kept: Tensor | None, eps: float) -> Tensor:
    """Squared norms [n] of Σ left·rightᵀ; left and right are written side by side into kept."""
    rows, tokens, m = left.shape
    squares = left.new_empty(rows, dtype=torch.float32)
    block = min(_GRAM_TOKENS, triton.next_power_of_2(max(tokens, 1)))
    launch(
        _gram, (rows,),
        left, right, kept, squares, tokens, m, right.shape[2], eps * tokens,
        *left.stride(), *right.stride(),
        KEEP=kept is not None, BLOCK_T=block, BLOCK_D=min(_GRAM_PRODUCTS // block**2, 1024),
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return squares


def _split(summands: int, block: int, programs: int) -> tuple[int, int]:
    """Into how many parts a sum is split, and how many summands a part has."""
    blocks = triton.cdiv(summands, block)
    parts = max(1, min(_PROGRAMS // max(programs, 1), blocks // _STEPS))
    span = max(1, triton.cdiv(blocks, parts)) * block
    return max(1, triton.cdiv(summands, span)), span
