"""Operands and orders of work of any op that is measured."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedsa_kernels.bench.blocks import Block, block_orders, draw_block, joined_block
from fedsa_kernels.bench.inputs import Inputs, draw
from fedsa_kernels.bench.orders import Results, Step, joined, orders
from fedsa_kernels.bench.shapes import Shape

Work = Inputs | Block


def draw_work(shape: Shape, device: torch.device, seed: int) -> Work:
    """Fresh operands of a shape."""
    drawn = draw_block if shape.op == "lora_linears" else draw
    return drawn(shape, device, seed)


def orders_of(op: str, device: torch.device) -> dict[str, Callable[[Any], Step]]:
    """Every order of an op that can run here, by name."""
    return {**(block_orders(device) if op == "lora_linears" else orders(op, device))}


def results_of(results: Results, work: Work) -> list[Tensor]:
    """Results of clients, one after the other, in the shapes of one call for all."""
    return joined_block(results, work) if isinstance(work, Block) else joined(results, work)
