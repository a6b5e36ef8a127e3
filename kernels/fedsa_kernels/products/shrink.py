"""``shrink``: a wide matrix times a narrow one, with a second product in the same pass if wanted.

For the rows of client c, with z [C·m, n] read once:

    narrow_c = scaling · drop(z_c ∘ b_c) · P_c · diag(d_c)      [m, r]
    tall_c   = scaling · z_cᵀ · q_c                             [n, r], for LoRA's B
    dots_c   = Σ over rows of xa_c ∘ (narrow_c before d_c)      [r], for VeRA's d

A program owns a block of rows and runs over the columns, or over one of ``splits`` parts of them.
What several programs contribute to is written side by side and added up afterwards in a fixed
order: no atomics, so two runs agree bit for bit.
"""

from typing import no_type_check

import torch
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
    split_span,
    upcasts,
    within_reach,
)
from fedsa_kernels.products.parts import add_parts


@triton.jit(do_not_specialize=["rows", "blocks"])  # batches differ in these
@no_type_check
def _shrink(
    z, p, q, b, d, narrow, tall, dots, keys,
    rows, width, rank, blocks, span,
    z_row, z_col, p_client, p_col, p_rank, q_row,
    scaling, threshold,
    TALL: tl.constexpr, DOTS: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: (client · block of rows, part of the columns). See the module."""
    block, part = tl.program_id(0), tl.program_id(1)
    client = block // blocks
    in_client = (block % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = client.to(tl.int64) * rows + in_client
    real = in_client < rows
    r = tl.arange(0, BLOCK_R)
    start = part * span
    end = tl.minimum(start + span, width)
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if DROPOUT:
        key = tl.load(keys + row, mask=real, other=0)
    if TALL or DOTS:
        q_tile = tl.load(
            q + row[:, None] * q_row + r[None, :],
            mask=real[:, None] & (r[None, :] < rank),
            other=0.0,
        )
        if UPCAST:
            q_tile = q_tile.to(tl.float32)
    for first in range(start, end, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        inside = column < end
        z_tile = tl.load(
            z + row[:, None] * z_row + column[None, :] * z_col,
            mask=real[:, None] & inside[None, :],
            other=0.0,
        )
        p_tile = tl.load(
            p + client.to(tl.int64) * p_client + column[:, None] * p_col + r[None, :] * p_rank,
            mask=inside[:, None] & (r[None, :] < rank),
            other=0.0,
        )
        if UPCAST:
            z_tile, p_tile = z_tile.to(tl.float32), p_tile.to(tl.float32)
        if TALL:
            found = tl.dot(tl.trans(z_tile), q_tile, input_precision=PRECISION) * scaling
            place = block.to(tl.int64) * width + column
            tl.store(
                tall + place[:, None] * rank + r[None, :],
                found,
                mask=inside[:, None] & (r[None, :] < rank),
            )
        if DOTS:
            scale = tl.load(b + client * width + column, mask=inside, other=0.0)
            p_tile = (p_tile * scale[:, None]).to(p_tile.dtype)
        if DROPOUT:
            z_tile = tl.where(keep_tile(key, column, threshold), z_tile, 0.0).to(z_tile.dtype)
        total = tl.dot(z_tile, p_tile, total, input_precision=PRECISION)
    total *= scaling
    if DOTS:
        # A part of the columns gives a part of every sum; both are added up afterwards.
        found = tl.sum(q_tile.to(tl.float32) * total, axis=0)
        place = (block.to(tl.int64) * tl.num_programs(1) + part) * rank
        tl.store(dots + place + r, found, mask=r < rank)
        scale = tl.load(d + client * rank + r, mask=r < rank, other=0.0)
        total *= scale.to(tl.float32)[None, :]
    # One part of the columns after the other, each [all rows, r].
    place = (part.to(tl.int64) * (tl.num_programs(0) // blocks) * rows + row) * rank
    tl.store(
        narrow + place[:, None] + r[None, :],
        total.to(narrow.dtype.element_ty),
        mask=real[:, None] & (r[None, :] < rank),
    )


def shrink(
    z: Tensor, P: Tensor, scaling: float, tile: Tile, dropout: Dropout | None = None
) -> Tensor:
    """``scaling · drop(z)·P`` by client.

    Shapes: z [C·m, n] and P [C, n, r] with any strides; returns [C, m, r] in the dtype of z.
    """
    return _run(z, P, scaling, tile, dropout=dropout)[0]


def shrink_with_factor_grad(
    z: Tensor, P: Tensor, q: Tensor, scaling: float, tile: Tile
) -> tuple[Tensor, Tensor]:
    """``scaling · z·P`` and ``scaling · zᵀ·q`` by client, reading z once.

    Shapes: z [C·m, n], P [C, n, r] with any strides, q [C, m, r], contiguous or a slice of the last
    dimension of what is; returns [C, m, r] and [C, n, r] in the dtype of z.
    """
    clients, width, rank = P.shape
    blocks = triton.cdiv(z.shape[0] // clients, tile.m)
    tall = z.new_empty(
        clients, blocks, width, rank, dtype=z.dtype if blocks == 1 else torch.float32
    )
    narrow, _ = _run(z, P, scaling, tile, q=q, tall=tall)
    return narrow, tall[:, 0] if blocks == 1 else add_parts(tall, z.dtype)


def shrink_with_dots(
    z: Tensor, P: Tensor, xa: Tensor, b: Tensor, d: Tensor, tile: Tile
) -> tuple[Tensor, Tensor]:
    """``((z ∘ b)·P) ∘ d`` by client, and the sums over rows of ``xa ∘ ((z ∘ b)·P)``.

    Shapes: z [C·m, n], P [C, n, r] with any strides, xa [C, m, r], b [C, n] and d [C, r]
    contiguous; returns [C, m, r] and [C, r] in the dtype of z.
    """
    return _run(z, P, 1.0, tile, q=xa, b=b, d=d)


def _run(
    z: Tensor,
    P: Tensor,
    scaling: float,
    tile: Tile,
    dropout: Dropout | None = None,
    q: Tensor | None = None,
    b: Tensor | None = None,
    d: Tensor | None = None,
    tall: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    clients, width, rank = P.shape
    rows = z.shape[0] // clients
    blocks = triton.cdiv(rows, tile.m)
    span = split_span(width, tile.n, clients * blocks, tile.splits, z.device)
    parts = triton.cdiv(width, span)
    narrow = z.new_empty(parts, clients, rows, rank, dtype=z.dtype if parts == 1 else torch.float32)
    dots = z.new_empty(clients, blocks * parts if d is not None else 0, rank, dtype=torch.float32)
    z = within_reach(z)
    launch(
        _shrink, (clients * blocks, parts),
        z, P, q, b, d, narrow, tall, dots, None if dropout is None else dropout.keys,
        rows, width, rank, blocks, span,
        *z.stride(), *P.stride(), 0 if q is None else q.stride(1),
        scaling if dropout is None else scaling * dropout.factor,
        0 if dropout is None else drop_threshold(dropout.p),
        TALL=tall is not None, DOTS=d is not None, DROPOUT=dropout is not None,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_R=rank_block(rank),
        PRECISION=precision(z), UPCAST=upcasts(z),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    whole = narrow if parts == 1 else add_parts(narrow[None], z.dtype)
    return whole[0], dots if d is None else add_parts(dots, z.dtype)
