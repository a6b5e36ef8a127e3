"""``factor_grad``: a wide matrix times a narrow one over the rows, which is a factor's gradient.

For the rows of client c, with z [C·m, n] read once:

    grad_c = scaling · drop(z_c)ᵀ · q_c                  [n, r], for LoRA's A and B
    dots_c = Σ over ranks of P ∘ (z_cᵀ · q_c · diag(d_c))  [n], for VeRA's b

A program owns a block of columns and runs over the rows of its client, or over one of ``splits``
parts of them. Parts are written side by side and added up in a fixed order: no atomics.
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


@triton.jit(do_not_specialize=["rows", "parts"])  # batches differ in these
@no_type_check
def _factor_grad(
    z, q, p, d, grad, keys,
    rows, width, rank, parts, span,
    z_row, z_col, q_row, grad_col, grad_rank,
    scaling, threshold,
    DROPOUT: tl.constexpr, DOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: (block of columns, client · part of the rows). See the module."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < width
    client, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    r = tl.arange(0, BLOCK_R)
    start = part * span
    end = tl.minimum(start + span, rows)
    total = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for first in range(start, end, BLOCK_M):
        in_client = first + tl.arange(0, BLOCK_M)
        real = in_client < end
        row = client.to(tl.int64) * rows + in_client
        z_tile = tl.load(
            z + row[:, None] * z_row + column[None, :] * z_col,
            mask=real[:, None] & inside[None, :],
            other=0.0,
        )
        q_tile = tl.load(
            q + row[:, None] * q_row + r[None, :],
            mask=real[:, None] & (r[None, :] < rank),
            other=0.0,
        )
        if UPCAST:
            z_tile, q_tile = z_tile.to(tl.float32), q_tile.to(tl.float32)
        if DROPOUT:
            key = tl.load(keys + row, mask=real, other=0)
            z_tile = tl.where(keep_tile(key, column, threshold), z_tile, 0.0).to(z_tile.dtype)
        total = tl.dot(tl.trans(z_tile), q_tile, total, input_precision=PRECISION)
    if DOTS:
        kept = inside[:, None] & (r[None, :] < rank)
        p_tile = tl.load(p + column[:, None] * rank + r[None, :], mask=kept, other=0.0)
        scale = tl.load(d + client * rank + r, mask=r < rank, other=0.0).to(tl.float32)
        found = tl.sum(total * p_tile.to(tl.float32) * scale[None, :], axis=1)
        place = tl.program_id(1).to(tl.int64) * width
        tl.store(grad + place + column, found.to(grad.dtype.element_ty), mask=inside)
        return
    place = tl.program_id(1).to(tl.int64) * width * rank
    tl.store(
        grad + place + column[:, None] * grad_col + r[None, :] * grad_rank,
        (total * scaling).to(grad.dtype.element_ty),
        mask=inside[:, None] & (r[None, :] < rank),
    )


def factor_grad(
    z: Tensor,
    q: Tensor,
    scaling: float,
    tile: Tile,
    dropout: Dropout | None = None,
    rank_first: bool = False,
) -> Tensor:
    """``scaling · drop(z)ᵀ·q`` by client.

    Shapes: z [C·m, n], q [C, m, r], contiguous or a slice of the last dimension of what is; returns
    [C, n, r], or [C, r, n] with ``rank_first``, contiguous, in the dtype of z.
    """
    width, rank = z.shape[1], q.shape[2]
    shape = (rank, width) if rank_first else (width, rank)
    return _run(z, q, scaling, tile, shape, dropout=dropout, rank_first=rank_first)


def factor_dots(z: Tensor, q: Tensor, P: Tensor, d: Tensor, tile: Tile) -> Tensor:
    """Row by row the sum of ``P ∘ (zᵀ·q·diag(d))``, by client.

    Shapes: z [C·m, n], q [C, m, r], P [n, r] and d [C, r] contiguous; returns [C, n].
    """
    return _run(z, q, 1.0, tile, (z.shape[1],), P=P, d=d)


def _run(
    z: Tensor,
    q: Tensor,
    scaling: float,
    tile: Tile,
    shape: tuple[int, ...],
    P: Tensor | None = None,
    d: Tensor | None = None,
    dropout: Dropout | None = None,
    rank_first: bool = False,
) -> Tensor:
    clients, rows, rank = q.shape
    width = z.shape[1]
    programs = triton.cdiv(width, tile.n) * clients
    span = split_span(rows, tile.m, programs, tile.splits, z.device)
    parts = max(1, triton.cdiv(rows, span))
    grad = z.new_empty(clients, parts, *shape, dtype=z.dtype if parts == 1 else torch.float32)
    z = within_reach(z)
    launch(
        _factor_grad, (triton.cdiv(width, tile.n), clients * parts),
        z, q, P, d, grad, None if dropout is None else dropout.keys,
        rows, width, rank, parts, span,
        *z.stride(), q.stride(1), *((1, width) if rank_first else (rank, 1)),
        scaling if dropout is None else scaling * dropout.factor,
        0 if dropout is None else drop_threshold(dropout.p),
        DROPOUT=dropout is not None, DOTS=d is not None,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_R=rank_block(rank),
        PRECISION=precision(z), UPCAST=upcasts(z),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return grad[:, 0] if parts == 1 else add_parts(grad, z.dtype)
