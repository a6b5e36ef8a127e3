"""The fastest tile of every kernel for a shape, by measurement."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import TritonError

from fedsa_kernels.bench.inputs import SCALING, Inputs
from fedsa_kernels.bench.timing import take_turns
from fedsa_kernels.launch import Launch, Tile, interpreted, recording
from fedsa_kernels.lora_linear import reference as lora_reference
from fedsa_kernels.lora_linear import triton as lora
from fedsa_kernels.products.factor_grad import factor_dots, factor_grad
from fedsa_kernels.products.frozen_linear import expand, frozen_linear, frozen_linear_onto
from fedsa_kernels.products.shrink import shrink, shrink_with_dots, shrink_with_factor_grad
from fedsa_kernels.tiles import KERNELS, Tiles, candidates, default_tiles
from fedsa_kernels.vera_linear import reference as vera_reference

_TURNS = 7
Work = Callable[[Tile], object]


def tune(sets: Sequence[Inputs], most: int | None = None) -> Tiles:
    """The fastest tiles for a shape.

    Kernels do not overlap, so each is tuned by itself. Where two passes are faster than the kernel
    that does both, that one is left out.

    Args:
        sets: operands of one shape, as many as the caches should not hold.
        most: tiles to try per kernel; None for all.
    """
    shape, device = sets[0].shape, sets[0].x.device
    works = [_works(inputs) for inputs in sets]
    tiles = default_tiles(shape.torch_dtype, shape.rank)
    for kernel in works[0]:
        seconds = {
            tile: taken
            for tile in _tried(kernel, sets[0], most)
            if _fits(works[0][kernel], tile)
            and (taken := _seconds([partial(w[kernel], tile) for w in works], device)) is not None
        }
        if seconds:
            tiles = replace(tiles, **{kernel: min(seconds, key=lambda tile: seconds[tile])})
    if shape.op == "vera_linear":
        return tiles
    tiles = _faster(tiles, replace(tiles, both=None), sets, fused=False)
    return _faster(tiles, replace(tiles, fused=None), sets, fused=True)


def _faster(one: Tiles, other: Tiles, sets: Sequence[Inputs], fused: bool) -> Tiles:
    """Of two sets of tiles the one with which a whole step takes less."""
    steps = {
        str(tiles): [partial(_lora_step, inputs, tiles, fused) for inputs in sets]
        for tiles in (one, other)
    }
    times = take_turns(steps, sets[0].x.device, _TURNS)
    return min(one, other, key=lambda tiles: times[str(tiles)].p50)


def compile_ahead(sets: Sequence[Inputs], threads: int, most: int | None = None) -> int:
    """Compile what ``tune`` will run, with several threads, and count it.

    Args:
        sets: operands of each kind of shape; their rows do not matter to a compiler.
        threads: that compile.
        most: as for ``tune``.
    """
    launches: list[Launch] = []
    for inputs in sets:
        for kernel, work in _works(inputs).items():
            with recording() as found:
                for tile in _tried(kernel, inputs, most):
                    work(tile)
            launches += found
    with ThreadPoolExecutor(threads) as pool:
        return sum(compiled is not None for compiled in pool.map(_compiled, launches))


def _compiled(launch: Launch) -> Any:
    """The machine code; None for a tile that does not fit the device."""
    try:
        return launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
    except (RuntimeError, TritonError):
        return None


def _fits(work: Work, tile: Tile) -> bool:
    """Whether a device runs the tile, without keeping registers in memory."""
    if interpreted():
        return True
    with recording() as launches:
        work(tile)
    for compiled in map(_compiled, launches):
        if compiled is None:
            return False
        try:
            compiled._init_handles()  # loads it, which is what counts the registers
        except (RuntimeError, TritonError):
            return False
        if compiled.n_spills:
            return False
    return True


def _tried(kernel: str, inputs: Inputs, most: int | None) -> list[Tile]:
    shape = inputs.shape
    default = getattr(default_tiles(shape.torch_dtype, shape.rank), kernel)
    others = candidates(kernel, shape.rank) if shape.torch_dtype.itemsize == 2 else []
    return list(dict.fromkeys([default, *others]))[:most]


def _seconds(steps: Sequence[Callable[[], object]], device: torch.device) -> float | None:
    """Median time; None for a tile that the device cannot run."""
    try:
        return take_turns({"": steps}, device, _TURNS)[""].p50
    except (RuntimeError, TritonError):  # such as too much shared memory
        return None


def _works(inputs: Inputs) -> dict[str, Work]:
    """What one training step asks of every kernel, by the kernel's name in ``Tiles``."""
    with torch.no_grad():
        found = _lora_works(inputs) if inputs.d is None else _vera_works(inputs)
    return {name: found[name] for name in KERNELS if name in found}


def _lora_works(inputs: Inputs) -> dict[str, Work]:
    x, A, B = (each.detach() for each in inputs.trained)
    dy, W, bias, P = inputs.dy, inputs.weight, inputs.bias, A.transpose(1, 2)
    operands = (x, W, bias, A, B, SCALING, 0.0, None)
    _, xa = lora_reference.forward(*operands)
    dxa = _narrow(dy, B)
    found: dict[str, Work] = {
        "shrink": lambda tile: shrink(x, P, 1.0, tile),
        "factor": lambda tile: factor_grad(x, dxa, 1.0, tile, rank_first=True),
        "expand": lambda tile: (expand(xa, B, bias, 1.0, tile), expand(dxa, P, None, 1.0, tile)),
        "frozen": lambda tile: (
            frozen_linear_onto(x, W, bias, xa, B, SCALING, tile),
            frozen_linear_onto(dy, W.t(), None, dxa, P, 1.0, tile),
        ),
        "both": lambda tile: shrink_with_factor_grad(dy, B, xa, SCALING, tile),
    }
    if default_tiles(x.dtype, A.shape[1]).fused is not None:
        found["fused"] = lambda tile: frozen_linear(x, W, bias, A, B, SCALING, tile)
    return found


def _vera_works(inputs: Inputs) -> dict[str, Work]:
    x, d, b = (each.detach() for each in inputs.trained)
    dy, W, bias = inputs.dy, inputs.weight, inputs.bias
    P, Q = (each.expand(len(d), -1, -1) for each in (inputs.A.t(), inputs.B))
    _, xa = vera_reference.forward(x, W, bias, inputs.A, inputs.B, d, b, 0.0, None)
    dxa = _narrow(dy, Q)
    return {
        "shrink": lambda tile: shrink(x, P, 1.0, tile),
        "both": lambda tile: shrink_with_dots(dy, Q, xa, b, d, tile),
        "factor": lambda tile: factor_dots(dy, xa, inputs.B, d, tile),
        "expand": lambda tile: (
            expand(xa, Q, bias, 1.0, tile, (b, d)),
            expand(dxa, P, None, 1.0, tile),
        ),
        "frozen": lambda tile: (
            frozen_linear_onto(x, W, bias, xa, Q, 1.0, tile, (b, d)),
            frozen_linear_onto(dy, W.t(), None, dxa, P, 1.0, tile),
        ),
    }


def _narrow(z: Tensor, P: Tensor) -> Tensor:
    """``z·P`` by client, by torch. [C, m, r]"""
    return torch.bmm(z.view(len(P), -1, z.shape[1]), P).contiguous()


def _lora_step(inputs: Inputs, tiles: Tiles, fused: bool) -> object:
    x, A, B = (each.detach() for each in inputs.trained)
    W, settings = inputs.weight, (SCALING, 0.0, None)
    y, xa = lora.forward(x, W, inputs.bias, A, B, *settings, tiles, fused)
    needs = (True, True, True)
    return y, lora.backward(inputs.dy, x, xa, W, A, B, *settings, needs, tiles, fused)
