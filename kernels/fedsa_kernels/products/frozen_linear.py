"""``frozen_linear``: the frozen product and an adapter's in one sum; ``expand``: that alone.

For the rows of client c:

    y_c = x_c·Wᵀ + bias + b_c ∘ drop(scaling · (q_c ∘ d_c)·P_cᵀ)

with the narrow q_c either given [m, r], or made in the same loop that runs over the columns of x:
q_c = drop(x_c)·A_cᵀ. The gradient of x has the same form, with Wᵀ for W, so one kernel does both.
"""

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

from fedsa_kernels.dropout import drop_threshold
from fedsa_kernels.dropout.triton import keep_tile
from fedsa_kernels.launch import (
    Dropout,
    Tile,
    launch,
    precision,
    rank_block,
    upcasts,
    within_reach,
)
from fedsa_kernels.tiles import LARGEST_FUSED_RANK

Scales = tuple[Tensor, Tensor]
"""VeRA's b [C, d_out] and d [C, r], contiguous."""


@triton.jit(do_not_specialize=["rows", "blocks"])  # batches differ in these
@no_type_check
def _frozen_linear(  # noqa: C901 - branches on constants are the variants of one loop
    x, w, bias, a, q, p, b, d, keys, y,
    rows, width, depth, rank, blocks,
    x_row, x_col, w_out, w_in, a_client, a_rank, a_col, q_row,
    p_client, p_out, p_rank, scaling, factor, threshold,
    FROZEN: tl.constexpr, BIAS: tl.constexpr, NARROW: tl.constexpr, SCALED: tl.constexpr,
    DROP_IN: tl.constexpr, DROP_OUT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: client · block of rows · strip of columns, in groups of blocks. See the module.

    FROZEN: there is a W. NARROW: q is made here, and kept by the programs of the first strip.
    """
    program, strips = tl.program_id(0), tl.cdiv(width, BLOCK_N)
    block, strip = tl.swizzle2d(
        program // strips, program % strips, tl.num_programs(0) // strips, strips, GROUP
    )
    client = block // blocks
    in_client = (block % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = in_client < rows
    row = client.to(tl.int64) * rows + in_client
    column = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < width
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if DROP_IN or DROP_OUT:
        key = tl.load(keys + row, mask=real, other=0)
    if not NARROW:
        # The adapter comes first: two accumulators of this size would not fit into registers.
        for first in range(0, BLOCK_R, CHUNK):
            r = first + tl.arange(0, CHUNK)
            q_tile = tl.load(
                q + row[:, None] * q_row + r[None, :],
                mask=real[:, None] & (r[None, :] < rank),
                other=0.0,
            )
            p_tile = tl.load(
                p + client.to(tl.int64) * p_client + r[:, None] * p_rank + column[None, :] * p_out,
                mask=(r[:, None] < rank) & inside[None, :],
                other=0.0,
            )
            if UPCAST:
                q_tile, p_tile = q_tile.to(tl.float32), p_tile.to(tl.float32)
            if SCALED:
                scale = tl.load(d + client * rank + r, mask=r < rank, other=0.0)
                q_tile = (q_tile * scale[None, :]).to(q_tile.dtype)
            total = tl.dot(q_tile, p_tile, total, input_precision=PRECISION)
        total *= scaling
        if DROP_OUT:
            total = tl.where(keep_tile(key, column, threshold), total, 0.0)
        if SCALED:
            outer = tl.load(b + client * width + column, mask=inside, other=0.0)
            total *= outer.to(tl.float32)[None, :]
    if NARROW:
        r = tl.arange(0, BLOCK_R)
        narrow = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if FROZEN:
        for first in range(0, depth, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            x_tile = tl.load(
                x + row[:, None] * x_row + k[None, :] * x_col,
                mask=real[:, None] & (k[None, :] < depth),
                other=0.0,
            )
            w_tile = tl.load(
                w + k[:, None] * w_in + column[None, :] * w_out,
                mask=(k[:, None] < depth) & inside[None, :],
                other=0.0,
            )
            if UPCAST:
                x_tile, w_tile = x_tile.to(tl.float32), w_tile.to(tl.float32)
            total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
            if NARROW:
                a_tile = tl.load(
                    a + client.to(tl.int64) * a_client + k[:, None] * a_col + r[None, :] * a_rank,
                    mask=(k[:, None] < depth) & (r[None, :] < rank),
                    other=0.0,
                )
                if UPCAST:
                    a_tile = a_tile.to(tl.float32)
                if DROP_IN:
                    x_tile = tl.where(keep_tile(key, k, threshold), x_tile, 0.0).to(x_tile.dtype)
                narrow = tl.dot(x_tile, a_tile, narrow, input_precision=PRECISION)
    if NARROW:
        narrow *= factor
        if strip == 0:
            tl.store(
                q + row[:, None] * q_row + r[None, :],
                narrow.to(q.dtype.element_ty),
                mask=real[:, None] & (r[None, :] < rank),
            )
        p_tile = tl.load(
            p + client.to(tl.int64) * p_client + r[:, None] * p_rank + column[None, :] * p_out,
            mask=(r[:, None] < rank) & inside[None, :],
            other=0.0,
        )
        # Scaled before the sum, which then needs no second accumulator. Float16 reaches from 6e-8
        # to 65504 only: q, which is large, is not made larger, nor P, which is small, smaller.
        if p_tile.dtype == tl.float16:
            q_tile = (narrow * tl.minimum(scaling, 1.0)).to(p_tile.dtype)
            p_tile = (p_tile.to(tl.float32) * tl.maximum(scaling, 1.0)).to(p_tile.dtype)
        else:
            q_tile = (narrow * scaling).to(p_tile.dtype)
        if UPCAST:
            q_tile, p_tile = q_tile.to(tl.float32), p_tile.to(tl.float32)
        total = tl.dot(q_tile, p_tile, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + row[:, None] * width + column[None, :],
        total.to(y.dtype.element_ty),
        mask=real[:, None] & inside[None, :],
    )


def frozen_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    P: Tensor,
    scaling: float,
    tile: Tile,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """``x·Wᵀ + bias + scaling·q·Pᵀ`` and q = drop(x)·Aᵀ, in one loop over the columns of x.

    Shapes: x [C·m, d_in], weight [d_out, d_in], A [C, r, d_in], P [C, d_out, r], all with any
    strides; returns [C·m, d_out] and q [C, m, r]. The rank is at most 64.
    """
    clients, rank, _ = A.shape
    if rank > LARGEST_FUSED_RANK:
        raise ValueError(f"rank {rank} does not fit into one tile: make q first")
    q = x.new_empty(clients, x.shape[0] // clients, rank)
    return _launch(x, weight, bias, A, q, P, None, scaling, tile, dropout, None), q


def frozen_linear_onto(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q: Tensor,
    P: Tensor,
    scaling: float,
    tile: Tile,
    scales: Scales | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """``x·Wᵀ + bias + b ∘ drop(scaling·(q ∘ d)·Pᵀ)`` for a q that is there.

    Shapes: q [C, m, r], contiguous or a slice of the last dimension of what is; the others as in
    ``frozen_linear``, with any rank.
    """
    return _launch(x, weight, bias, None, q, P, scales, scaling, tile, None, dropout)


def expand(
    q: Tensor,
    P: Tensor,
    bias: Tensor | None,
    scaling: float,
    tile: Tile,
    scales: Scales | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """``bias + b ∘ drop(scaling·(q ∘ d)·Pᵀ)``: what a frozen product is then accumulated onto.

    Shapes: q [C, m, r] as in ``frozen_linear_onto``, P [C, d_out, r]; returns [C·m, d_out].
    """
    return _launch(None, None, bias, None, q, P, scales, scaling, tile, None, dropout)


def _launch(
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor | None,
    q: Tensor,
    P: Tensor,
    scales: Scales | None,
    scaling: float,
    tile: Tile,
    drop_in: Dropout | None,
    drop_out: Dropout | None,
) -> Tensor:
    clients, rows, rank = q.shape
    width = P.shape[1]
    y = q.new_empty(clients * rows, width)
    x = None if x is None else within_reach(x)
    bias = None if bias is None else bias.contiguous()
    blocks = triton.cdiv(rows, tile.m)
    dropout = drop_in or drop_out
    block_r = rank_block(rank)
    launch(
        _frozen_linear, (clients * blocks * triton.cdiv(width, tile.n),),
        x, weight, bias, A, q, P, *(scales or (None, None)), dropout and dropout.keys, y,
        rows, width, 0 if x is None else x.shape[1], rank, blocks,
        *_strides(x, 2), *_strides(weight, 2), *_strides(A, 3), q.stride(1), *_strides(P, 3),
        scaling if drop_out is None else scaling * drop_out.factor,
        1.0 if drop_in is None else drop_in.factor,
        0 if dropout is None else drop_threshold(dropout.p),
        FROZEN=weight is not None, BIAS=bias is not None, NARROW=A is not None,
        SCALED=scales is not None, DROP_IN=drop_in is not None, DROP_OUT=drop_out is not None,
        GROUP=tile.group, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        BLOCK_R=block_r, CHUNK=block_r if A is not None else min(block_r, _chunk(q)),
        PRECISION=precision(q), UPCAST=upcasts(q),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def _chunk(q: Tensor) -> int:
    """How much of the rank an epilogue works off at a time: wide numbers fill registers sooner."""
    return 16 if q.dtype.itemsize > 2 else LARGEST_FUSED_RANK


def _strides(tensor: Tensor | None, dimensions: int) -> tuple[int, ...]:
    return (0,) * dimensions if tensor is None else tensor.stride()
