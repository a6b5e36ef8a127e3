"""The kernels of the adapter ops, compiled for devices that are not here."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from fedsa_kernels.aot import TARGETS, Resources, resources_of_all
from fedsa_kernels.launch import Launch, interpreted, recording
from fedsa_kernels.lora_linear import triton as lora
from fedsa_kernels.products.factor_grad import factor_grad
from fedsa_kernels.products.shrink import shrink
from fedsa_kernels.tiles import default_tiles
from fedsa_kernels.vera_linear import triton as vera

pytestmark = pytest.mark.skipif(interpreted(), reason="the interpreter compiles nothing")

CLIENTS, ROWS, D_IN, D_OUT = 2, 4096, 4096, 1024
NEEDS = (True, True, True)


def meta(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*sizes, dtype=dtype, device="meta")


def launches(
    dtype: torch.dtype, rank: int, p: float, d_in: int = D_IN, d_out: int = D_OUT
) -> list[Launch]:
    """Forward and backward of both ops in both orders of work, each distinct kernel once."""

    def draw(*sizes: int) -> torch.Tensor:
        return meta(*sizes, dtype=dtype)

    tiles = default_tiles(dtype, rank, d_in, d_out)
    x, dy, weight = draw(CLIENTS * ROWS, d_in), draw(CLIENTS * ROWS, d_out), draw(d_out, d_in)
    bias, keys = draw(d_out), meta(CLIENTS * ROWS, dtype=torch.int32)
    A, B = draw(CLIENTS, rank, d_in), draw(CLIENTS, d_out, rank)
    frozen_a, frozen_b, d, b = draw(rank, d_in), draw(d_out, rank), draw(2, rank), draw(2, d_out)
    with recording() as found:
        for fused in (True, False):
            _, xa = lora.forward(x, weight, bias, A, B, 2.0, p, keys, tiles, fused)
            lora.backward(dy, x, xa, weight, A, B, 2.0, p, keys, NEEDS, tiles, fused)
            vectors = (frozen_a, frozen_b, d, b, p, keys)
            _, xa = vera.forward(x, weight, bias, *vectors, tiles, fused)
            vera.backward(dy, xa, weight, *vectors, NEEDS, tiles, fused)
    return list({variant(each): each for each in found}.values())


def variant(launch: Launch) -> str:
    flags = [name for name, value in launch.options.items() if value is True]
    return " ".join([launch.kernel.__name__.strip("_"), *flags])


CASES = [
    (torch.bfloat16, 8, 0.1),
    (torch.bfloat16, 16, 0.1),
    (torch.bfloat16, 16, 0.0),
    (torch.bfloat16, 64, 0.1),
    (torch.bfloat16, 256, 0.1),
    (torch.float16, 16, 0.1),
    (torch.float32, 8, 0.1),
    (torch.float32, 16, 0.1),
    (torch.float32, 64, 0.1),
    (torch.float32, 256, 0.1),
]
UNEVEN = (4090, 1022)


@cache
def compiled(
    dtype: torch.dtype, rank: int, p: float, *widths: int
) -> dict[str, dict[str, Resources]]:
    """By target and kernel. The first test waits for all targets, which take all cores."""
    kernels = launches(dtype, rank, p, *widths)
    found = zip(*resources_of_all(kernels, list(TARGETS.values())), strict=True)
    names = [variant(each) for each in kernels]
    return {t: dict(zip(names, each, strict=True)) for t, each in zip(TARGETS, found, strict=True)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "rank", "p"), CASES)
def test_nothing_spills_and_everything_fits(dtype: torch.dtype, rank: int, p: float, target: str):
    check_fits(compiled(dtype, rank, p)[target], target)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills_at_widths_that_are_no_multiples_of_16(target: str):
    check_fits(compiled(torch.bfloat16, 16, 0.1, *UNEVEN)[target], target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("dtype", "rank", "p", "widths"),
    [
        (torch.bfloat16, 8, 0.0, ()),
        (torch.bfloat16, 24, 0.1, ()),
        (torch.bfloat16, 32, 0.1, ()),
        (torch.bfloat16, 40, 0.1, ()),
        (torch.bfloat16, 128, 0.1, ()),
        (torch.bfloat16, 8, 0.1, UNEVEN),
        (torch.float16, 24, 0.1, ()),
        (torch.float32, 8, 0.0, ()),
        (torch.float32, 24, 0.1, ()),
        (torch.float32, 32, 0.1, ()),
        (torch.float32, 128, 0.1, ()),
        (torch.float32, 16, 0.1, UNEVEN),
    ],
)
def test_nothing_spills_at_the_other_sizes(
    dtype: torch.dtype, rank: int, p: float, widths: tuple[int, ...], target: str
):
    check_fits(compiled(dtype, rank, p, *widths)[target], target)


def check_fits(found: dict[str, Resources], target: str) -> None:
    assert {name: each.spilled for name, each in found.items() if each.spilled} == {}
    assert max(each.shared for each in found.values()) <= TARGETS[target].shared
    assert max(each.registers for each in found.values()) <= TARGETS[target].registers


@pytest.mark.parametrize(("dtype", "rank", "p"), [case for case in CASES if case[0].itemsize == 2])
def test_hoppers_tensor_cores_do_every_product(dtype: torch.dtype, rank: int, p: float):
    found = compiled(dtype, rank, p)["sm_90"]
    assert {name for name, each in found.items() if each.wgmma == 0} <= {"add_parts"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("rank", [16, 256])
def test_sums_in_parts_spill_nothing(dtype: torch.dtype, rank: int):
    """A device with many multiprocessors gets parts, which are written in float32."""
    tiles, rows = default_tiles(dtype, rank), CLIENTS * ROWS
    z, P, q = (meta(*s, dtype=dtype) for s in ((rows, D_IN), (2, D_IN, rank), (2, ROWS, rank)))
    with recording() as found:
        shrink(z, P, 1.0, replace(tiles.shrink, splits=3))
        factor_grad(z, q, 1.0, replace(tiles.factor, splits=3))
    assert [launch.grid[1] for launch in found] == [3, 1, 3 * CLIENTS, CLIENTS]
    for launch in resources_of_all(found, list(TARGETS.values())):
        assert [each.spilled for each in launch] == [0] * len(TARGETS)
