"""Shapes of the kernels' work: what is safe anywhere, and what is tried on a device."""

from dataclasses import dataclass, fields, replace
from itertools import product

import torch

from fedsa_kernels.launch import Tile, rank_block

LARGEST_FUSED_RANK = 64
"""Above it the narrow product does not fit beside the frozen one: it is made first."""


@dataclass(frozen=True)
class Tiles:
    """One shape for each kernel.

    Args:
        shrink: wide by narrow.
        factor: a factor's gradient alone.
        expand: narrow by wide.
        frozen: the frozen product with an adapter's in its epilogue.
        both: wide by narrow with a factor's gradient, or VeRA's sums, in the same pass; None for
            two passes.
        fused: the frozen product and the narrow one in one loop; None for the narrow one first.
    """

    shrink: Tile
    factor: Tile
    expand: Tile
    frozen: Tile
    both: Tile | None
    fused: Tile | None


KERNELS = tuple(each.name for each in fields(Tiles))


def default_tiles(dtype: torch.dtype, rank: int, *widths: int) -> Tiles:
    """Tiles that fit every device of the ahead-of-time gate without spilling a register.

    Large ranks and wide numbers get smaller tiles: what a program holds grows with their product.
    So do sizes that are no multiples of 16, whose addresses have to be kept one by one. A rank
    above 64 that is no multiple, or widths of ``lora_linears`` that are multiples together only,
    may still keep a few registers in memory.

    Args:
        dtype: of the products.
        rank: of the adapters.
        widths: of x and y, if they are known.
    """
    tiles = _tiles(dtype, rank)
    if not any(size % 16 for size in (rank, *widths)):
        return tiles
    block = rank_block(rank)
    fused = Tile(m=16, n=32, k=32) if block == 16 else Tile(m=32, n=32, k=16)
    narrow = 32 if block == 16 else 16
    if dtype.itemsize > 2:
        both = Tile(m=32, n=narrow, stages=1) if block <= 32 else tiles.both
        return replace(tiles, both=both, fused=tiles.fused and fused)
    both = Tile(m=64, n=narrow) if block <= 64 else None
    if any(width % 16 for width in widths):
        small, frozen = Tile(m=32, n=32), Tile(warps=8)
        tiles = replace(tiles, shrink=small, factor=small, frozen=frozen, both=both)
        return replace(tiles, fused=tiles.fused and fused)
    return replace(tiles, shrink=Tile() if block <= 64 else tiles.shrink, both=both)


def _tiles(dtype: torch.dtype, rank: int) -> Tiles:
    wide = dtype.itemsize > 2
    large = rank_block(rank) > (32 if wide else 64)
    if large:
        narrow = Tile(m=64, n=32, warps=8, stages=1 if wide else 2)
        both = Tile(m=16 if wide else 64, n=32, warps=8, stages=1)
    else:
        narrow = Tile(m=64, n=32 if wide else 128, warps=4, stages=3)
        both = Tile(m=32, n=32, warps=8, stages=1) if wide else Tile(m=64, n=64, warps=4)
    frozen = Tile(m=128, n=64, k=64, warps=8, stages=3 if large else 2)
    if wide:
        frozen = Tile(m=32, n=64, k=32, warps=8)
    return Tiles(
        shrink=narrow,
        factor=Tile(m=32 if large and wide else 64, n=32 if wide else 64, warps=8 if large else 4),
        expand=Tile(m=32, n=32, stages=1) if wide else Tile(m=64, n=64, stages=1),
        frozen=frozen,
        both=both,
        fused=frozen if rank <= LARGEST_FUSED_RANK else None,
    )


def candidates(kernel: str, rank: int) -> list[Tile]:
    """Tiles worth a measurement for half precision; those that spill on a device fall out there.

    Args:
        kernel: one of ``KERNELS``.
        rank: of the adapters.
    """
    large = rank_block(rank) > 64
    if kernel in ("frozen", "fused"):
        shapes = [
            (128, 128, 8),
            (128, 128, 4),
            (128, 256, 8),
            (64, 128, 4),
            (64, 64, 4),
            (128, 64, 4),
        ]
        return [
            Tile(m=m, n=n, k=64, warps=warps, stages=stages)
            for (m, n, warps), stages in product(shapes, (3, 4))
        ]
    if kernel == "expand":
        shapes = [(64, 64, 4), (64, 128, 4), (128, 128, 8), (64, 256, 8), (32, 256, 4)]
        return [Tile(m=m, n=n, warps=warps, stages=1) for m, n, warps in shapes]
    if kernel == "both":
        shapes = [(64, 64, 4), (128, 64, 4), (128, 64, 8), (256, 64, 8), (128, 32, 8)]
        if large:
            shapes = [(64, 32, 8), (32, 64, 8), (32, 32, 8), (64, 64, 8), (32, 32, 4)]
        return [
            Tile(m=m, n=n, warps=warps, stages=stages, splits=splits)
            for (m, n, warps), stages, splits in product(shapes, (2, 3), (0, 1))
        ]
    shapes = [(64, 32, 8), (128, 32, 8)] if large else []
    shapes += [(64, 128, 4), (32, 128, 4), (64, 64, 4), (128, 64, 4), (128, 128, 8)]
    return [
        Tile(m=m, n=n, warps=warps, stages=stages, splits=splits)
        for (m, n, warps), stages, splits in product(shapes, (2, 3), (0, 1))
    ]
