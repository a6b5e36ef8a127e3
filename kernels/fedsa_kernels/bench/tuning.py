"""The fastest tile of every kernel for a shape, by measurement."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from triton.runtime.errors import TritonError

from fedsa_kernels.bench.compiling import launches_of, runs
from fedsa_kernels.bench.kernel_steps import kernel_steps, whole_step
from fedsa_kernels.bench.shapes import Shape
from fedsa_kernels.bench.timing import take_turns
from fedsa_kernels.bench.work import Work
from fedsa_kernels.launch import Launch, Tile
from fedsa_kernels.tiles import Tiles, candidates

_TURNS = 7


def tune(sets: Sequence[Work], most: int | None = None) -> Tiles:
    """The fastest tiles for a shape.

    Kernels do not overlap, so each is tuned by itself. Where two passes are faster than the kernel
    that does both, that one is left out.

    Args:
        sets: operands of one shape, as many as the caches should not hold.
        most: tiles to try per kernel; None for all.
    """
    shape, device = sets[0].shape, sets[0].device
    found = [kernel_steps(work) for work in sets]
    tiles = shape.problem.default_tiles
    for kernel in found[0]:
        seconds = {
            tile: taken
            for tile in _tried(kernel, shape, most)
            if runs(partial(found[0][kernel], tile))
            and (taken := _seconds([partial(s[kernel], tile) for s in found], device)) is not None
        }
        if seconds:
            tiles = replace(tiles, **{kernel: min(seconds, key=lambda tile: seconds[tile])})
    if shape.op == "vera_linear":
        return tiles
    tiles = _faster(tiles, replace(tiles, both=None), sets, fused=False)
    if shape.op == "lora_linears":
        return tiles
    return _faster(tiles, replace(tiles, fused=None), sets, fused=True)


def _faster(one: Tiles, other: Tiles, sets: Sequence[Work], fused: bool) -> Tiles:
    """Of two sets of tiles the one with which a whole step takes less; one if other cannot run."""
    if not runs(partial(whole_step, sets[0], other, fused)):
        return one
    steps = {
        str(tiles): [partial(whole_step, work, tiles, fused) for work in sets]
        for tiles in (one, other)
    }
    times = take_turns(steps, sets[0].device, _TURNS)
    return min(one, other, key=lambda tiles: times[str(tiles)].p50)


def launches_for(work: Work, most: int | None = None) -> list[Launch]:
    """All that ``tune`` may launch, and all that runs with the tiles it may choose."""
    shape, steps = work.shape, kernel_steps(work)
    tried = [(kernel, tile) for kernel in steps for tile in _tried(kernel, shape, most)]
    found = [partial(steps[kernel], tile) for kernel, tile in tried]
    if shape.op != "vera_linear":  # two passes over dy instead of one
        two = replace(shape.problem.default_tiles, both=None)
        found += [
            partial(whole_step, work, replace(two, **{kernel: tile}), fused=False)
            for kernel, tile in tried
            if kernel in ("shrink", "factor")
        ]
    return launches_of(*found)


def _tried(kernel: str, shape: Shape, most: int | None) -> list[Tile]:
    default = getattr(shape.problem.default_tiles, kernel)
    others = candidates(kernel, shape.rank) if shape.torch_dtype.itemsize == 2 else []
    return [tile for tile in dict.fromkeys([default, *others]) if tile is not None][:most]


def _seconds(steps: Sequence[Callable[[], object]], device: torch.device) -> float | None:
    """Median time; None for a tile that the device cannot run."""
    try:
        return take_turns({"": steps}, device, _TURNS)[""].p50
    except (RuntimeError, TritonError):  # such as too much shared memory
        return None
