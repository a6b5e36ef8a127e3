"""What `lora_linears` launches, compiled for devices that are not here."""

from functools import cache

import pytest
import torch

from fedsa_kernels.aot import TARGETS, Resources, resources
from fedsa_kernels.launch import Launch, interpreted, recording
from fedsa_kernels.lora_linears import triton
from fedsa_kernels.tiles import default_tiles

pytestmark = pytest.mark.skipif(interpreted(), reason="the interpreter compiles nothing")

CLIENTS, ROWS, D_IN = 2, 4096, 4096
WIDTHS = (4096, 1024, 1024)
"""Queries, and keys and values of fewer heads."""


def launches(dtype: torch.dtype, rank: int) -> list[Launch]:
    """Forward and backward in both orders of work, with and without the gradients of B."""

    def draw(*sizes: int) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device="meta")

    x, weights = draw(CLIENTS * ROWS, D_IN), [draw(width, D_IN) for width in WIDTHS]
    biases, dys = ([draw(w) for w in WIDTHS], [draw(CLIENTS * ROWS, w) for w in WIDTHS])
    A, Bs = draw(CLIENTS, 3 * rank, D_IN), [draw(CLIENTS, width, rank) for width in WIDTHS]
    tiles = default_tiles(dtype, 3 * rank)
    with recording() as found:
        for fused in (True, False):
            _, xa = triton.forward(x, weights, biases, A, Bs, 2.0, tiles, fused)
            for needs in ([True] * 5, [True, True] + [False] * 3, [False, False] + [True] * 3):
                triton.backward(dys, x, xa, weights, A, Bs, 2.0, needs, tiles, fused)
    return list({variant(each): each for each in found}.values())


def variant(launch: Launch) -> str:
    flags = [name for name, value in launch.options.items() if value is True]
    name = launch.kernel.__name__.strip("_")
    rank = [f"rank block {launch.options['BLOCK_R']}"] if name != "add_parts" else []
    return " ".join([name, *flags, *rank])


CASES = [(torch.bfloat16, 8), (torch.bfloat16, 64), (torch.float32, 16)]


@cache
def compiled(dtype: torch.dtype, rank: int, target: str) -> dict[str, Resources]:
    return {variant(each): resources(each, TARGETS[target]) for each in launches(dtype, rank)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "rank"), CASES)
def test_nothing_spills_and_everything_fits(dtype: torch.dtype, rank: int, target: str):
    found = compiled(dtype, rank, target)
    assert {name: each.spilled for name, each in found.items() if each.spilled} == {}
    assert max(each.shared for each in found.values()) <= TARGETS[target].shared
    assert max(each.registers for each in found.values()) <= TARGETS[target].registers


@pytest.mark.parametrize(("dtype", "rank"), [case for case in CASES if case[0].itemsize == 2])
def test_hoppers_tensor_cores_do_every_product(dtype: torch.dtype, rank: int):
    found = compiled(dtype, rank, "sm_90")
    assert {name for name, each in found.items() if each.wgmma == 0} <= {"add_parts"}
