"""What one training step asks of every kernel, with a tile to be chosen."""

from collections.abc import Callable

import torch
from torch import Tensor

from fedsa_kernels.bench.blocks import Block
from fedsa_kernels.bench.inputs import SCALING, Inputs
from fedsa_kernels.bench.work import Work
from fedsa_kernels.launch import Tile
from fedsa_kernels.lora_linear import reference as lora_reference
from fedsa_kernels.lora_linear import triton as lora
from fedsa_kernels.lora_linears import reference as linears_reference
from fedsa_kernels.lora_linears import triton as linears
from fedsa_kernels.lora_linears.reference import parts
from fedsa_kernels.operands import segments
from fedsa_kernels.products.factor_grad import factor_dots, factor_grad
from fedsa_kernels.products.frozen_linear import expand, frozen_linear, frozen_linear_onto
from fedsa_kernels.products.shrink import shrink, shrink_with_dots, shrink_with_factor_grad
from fedsa_kernels.tiles import KERNELS, LARGEST_FUSED_RANK, Tiles
from fedsa_kernels.vera_linear import reference as vera_reference

Step = Callable[[Tile], object]


def kernel_steps(work: Work) -> dict[str, Step]:
    """What one training step asks of every kernel, by the kernel's name in ``Tiles``."""
    with torch.no_grad():
        if isinstance(work, Block):
            found = _linears_steps(work)
        else:
            found = _lora_steps(work) if work.d is None else _vera_steps(work)
    return {name: found[name] for name in KERNELS if name in found}


def whole_step(work: Work, tiles: Tiles, fused: bool) -> object:
    """A training step of LoRA, in one layer or in several of one x."""
    if isinstance(work, Block):
        x, A, dys, weights, Bs = _of_block(work)
        biases = [each.bias for each in work.layers]
        ys, xa = linears.forward(x, weights, biases, A, Bs, SCALING, tiles, fused)
        needs = [True] * (2 + len(Bs))
        return ys, linears.backward(dys, x, xa, weights, A, Bs, SCALING, needs, tiles, fused)
    x, A, B = (each.detach() for each in work.trained)
    W, settings = work.weight, (SCALING, 0.0, None)
    y, xa = lora.forward(x, W, work.bias, A, B, *settings, tiles, fused)
    needs = [True] * 3
    return y, lora.backward(work.dy, x, xa, W, A, B, *settings, needs, tiles, fused)


def _lora_steps(inputs: Inputs) -> dict[str, Step]:
    x, A, B = (each.detach() for each in inputs.trained)
    dy, W, bias, P = inputs.dy, inputs.weight, inputs.bias, A.transpose(1, 2)
    operands = (x, W, bias, A, B, SCALING, 0.0, None)
    xa = segments(lora_reference.forward(*operands)[1], len(A))
    dxa = _narrow(dy, B)
    found: dict[str, Step] = {
        "shrink": lambda tile: shrink(x, P, 1.0, tile),
        "factor": lambda tile: factor_grad(x, dxa, 1.0, tile, rank_first=True),
        "expand": lambda tile: (expand(xa, B, bias, 1.0, tile), expand(dxa, P, None, 1.0, tile)),
        "frozen": lambda tile: (
            frozen_linear_onto(x, W, bias, xa, B, SCALING, tile),
            frozen_linear_onto(dy, W.t(), None, dxa, P, 1.0, tile),
        ),
        "both": lambda tile: shrink_with_factor_grad(dy, B, xa, SCALING, tile),
    }
    if A.shape[1] <= LARGEST_FUSED_RANK:
        found["fused"] = lambda tile: frozen_linear(x, W, bias, A, B, SCALING, tile)
    return found


def _vera_steps(inputs: Inputs) -> dict[str, Step]:
    x, d, b = (each.detach() for each in inputs.trained)
    dy, W, bias = inputs.dy, inputs.weight, inputs.bias
    P, Q = (each.expand(len(d), -1, -1) for each in (inputs.A.t(), inputs.B))
    operands = (x, W, bias, inputs.A, inputs.B, d, b, 0.0, None)
    xa = segments(vera_reference.forward(*operands)[1], len(d))
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


def _linears_steps(block: Block) -> dict[str, Step]:
    x, A, dys, weights, Bs = _of_block(block)
    P, biases = A.transpose(1, 2), [each.bias for each in block.layers]
    operands = (x, weights, biases, A, Bs, SCALING)
    xa = segments(linears_reference.forward(*operands)[1], len(A))
    layers = list(zip(parts(xa, Bs), Bs, weights, biases, dys, strict=True))
    dxa = torch.cat([_narrow(dy, B) for _, B, _, _, dy in layers], 2)
    dx = (dxa, P, None, 1.0)
    return {
        "shrink": lambda tile: shrink(x, P, 1.0, tile),
        "factor": lambda tile: factor_grad(x, dxa, 1.0, tile, rank_first=True),
        "expand": lambda tile: (
            [expand(part, B, bias, SCALING, tile) for part, B, _, bias, _ in layers],
            expand(*dx, tile),
        ),
        "frozen": lambda tile: (
            [frozen_linear_onto(x, W, b, part, B, SCALING, tile) for part, B, W, b, _ in layers],
            frozen_linear_onto(dys[0], weights[0].t(), None, dxa, P, 1.0, tile),
        ),
        "both": lambda tile: [
            shrink_with_factor_grad(dy, B, part, SCALING, tile) for part, B, _, _, dy in layers
        ],
    }


def _of_block(block: Block) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """x, the A of all layers as one, and every layer's dy, weight and B."""
    layers = block.layers
    A = torch.cat([each.A for each in layers], 1).detach()
    Bs = [each.B.detach() for each in layers]
    return layers[0].x.detach(), A, [i.dy for i in layers], [i.weight for i in layers], Bs


def _narrow(z: Tensor, P: Tensor) -> Tensor:
    """``z·P`` by client, by torch. [C, m, r]"""
    return torch.bmm(z.view(len(P), -1, z.shape[1]), P).contiguous()
