"""Shapes of the kernels' work: what is safe anywhere, before anything was measured."""

from dataclasses import dataclass

import torch

from fedsa_kernels.launch import Tile, rank_block


@dataclass(frozen=True)
class Tiles:
    """One shape for each kernel.

    Args:
        shrink: wide by narrow.
        both: the same with a factor's gradient in the same pass.
        factor: a factor's gradient alone.
        expand: narrow by wide.
        frozen: the frozen product with an adapter's in its epilogue.
    """

    shrink: Tile
    both: Tile
    factor: Tile
    expand: Tile
    frozen: Tile


def default_tiles(dtype: torch.dtype, rank: int) -> Tiles:
    """Tiles that fit every device of the ahead-of-time gate without spilling a register.

    Large ranks and wide numbers get smaller tiles: what a program holds grows with their product.
    """
    wide = dtype.itemsize > 2
    large = rank_block(rank) > 64
    if large:
        narrow = Tile(m=64, n=32, warps=8, stages=1 if wide else 2)
        both = Tile(m=16 if wide else 64, n=32, warps=8, stages=1)
    else:
        narrow = Tile(m=64, n=32 if wide else 128, warps=4, stages=2 if wide else 3)
        both = Tile(m=32, n=32, warps=8, stages=1) if wide else Tile(m=64, n=64, warps=4)
    frozen = Tile(m=64, n=64, k=32, warps=8) if wide else Tile(m=128, n=64, k=64, warps=8)
    return Tiles(
        shrink=narrow,
        both=both,
        factor=Tile(m=32 if large and wide else 64, n=32 if wide else 64, warps=8 if large else 4),
        expand=Tile(m=32, n=32, stages=1) if wide else Tile(m=64, n=64, stages=1),
        frozen=frozen,
    )
