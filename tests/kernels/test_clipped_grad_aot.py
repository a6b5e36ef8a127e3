"""The kernels of `clipped_grad`, compiled for devices that are not here."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsa_kernels import clipped_sum
from fedsa_kernels.launch import interpreted, recording

pytestmark = [
    pytest.mark.skipif(interpreted(), reason="the interpreter does not compile"),
    # Triton 3.9 announces another default; here products are summed by fused instructions.
]

aot = pytest.importorskip("fedsa_kernels.aot", reason="needs Triton")
kernels = pytest.importorskip("fedsa_kernels.clipped_grad.triton", reason="needs Triton")

WIDE, ROWS = 768, 8
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def nowhere(*sizes: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(*sizes, dtype=dtype, device="meta")


def whole(m: int, k: int, dtype: torch.dtype) -> Callable[[], object]:
    left, right = nowhere(ROWS, 128, m, dtype=dtype), nowhere(ROWS, 128, k, dtype=dtype)
    return lambda: kernels.sample_grad(left, right, whole=True)


def kept(tokens: int, dtype: torch.dtype) -> Callable[[], object]:
    left, right = nowhere(ROWS, tokens, 64, dtype=dtype), nowhere(ROWS, tokens, WIDE, dtype=dtype)
    return lambda: kernels.sample_grad_with_norms(left, right)


def norms(tokens: int) -> Callable[[], object]:
    return lambda: kernels.squared_norms(nowhere(ROWS, tokens, 64 + WIDE), (64, WIDE))


def summed(gradients: Tensor, m: int, k: int) -> Callable[[], object]:
    return lambda: kernels.clipped_sum(gradients, nowhere(2, ROWS // 2), (m, k))


# Every block that ranks 1 to 256 and any number of tokens are cut into, with either side wide.
VARIANTS = {
    "A bf16 r8": whole(8, WIDE, BF16),
    "A bf16 r32": whole(32, WIDE, BF16),
    "A bf16 r256": whole(256, WIDE, BF16),
    "A fp16 r8": whole(8, WIDE, FP16),
    "A fp32 r8": whole(8, WIDE, FP32),
    "A fp32 r32": whole(32, WIDE, FP32),
    "A fp32 r256": whole(256, WIDE, FP32),
    "B bf16 r8": whole(WIDE, 8, BF16),
    "B bf16 r32": whole(WIDE, 32, BF16),
    "B bf16 r256": whole(WIDE, 256, BF16),
    "B fp32 r256": whole(WIDE, 256, FP32),
    "factors of 1 token": kept(1, BF16),
    "factors of 2 tokens": norms(2),
    "factors of 4 tokens": kept(4, BF16),
    "factors of 8 tokens": norms(8),
    "factors of 16 tokens": kept(16, FP32),
    "factors of 40 tokens": norms(40),
    "sum A of factors r8": summed(nowhere(ROWS, 4, 8 + WIDE), 8, WIDE),
    "sum A of factors r32": summed(nowhere(ROWS, 4, 32 + WIDE), 32, WIDE),
    "sum B of factors r256": summed(nowhere(ROWS, 4, 256 + WIDE), WIDE, 256),
    "sum of bf16": summed(nowhere(ROWS, 8, WIDE, dtype=BF16), 8, WIDE),
    "sum of fp32": summed(nowhere(ROWS, 8, WIDE), 8, WIDE),
}
ON_TENSOR_CORES = ("A bf16", "B bf16", "A fp16")


@cache
def compiled() -> dict[str, dict[str, Any]]:
    """What every variant takes, by target. The first test waits for all: on all cores."""
    launches = []
    for make in VARIANTS.values():
        with recording() as made:
            make()
        (launch,) = made
        launches.append(launch)
    found = aot.resources_of_all(launches, list(aot.TARGETS.values()))
    by_target = [dict(zip(aot.TARGETS, each, strict=True)) for each in found]
    return dict(zip(VARIANTS, by_target, strict=True))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_kernel_fits_without_spilling(name, target):
    device = aot.TARGETS[target]
    found = compiled()[name][target]
    assert found.spilled == 0
    assert found.shared <= device.shared
    assert found.registers <= device.registers
    if target == "sm_90" and name.startswith(ON_TENSOR_CORES):
        assert found.wgmma > 0


def test_sums_over_few_values_are_split_until_the_device_is_busy():
    """And never so far that adding up the parts reads more than an eighth of what is summed."""
    for records in (16, 64, 1000, 20000):
        with recording() as launches:
            kernels.clipped_sum(nowhere(records, 8, WIDE), nowhere(1, records), (8, WIDE))
        programs = launches[0].grid[0]
        parts = programs // (8 * WIDE // 256)
        assert parts == 1 or records // parts >= 32
        assert records < 20000 or programs >= 500


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_without_a_device_and_without_the_interpreter_the_reference_works(monkeypatch):
    monkeypatch.setenv("FEDSA_KERNELS", "fused")
    gradients, factors = torch.ones(2, 3, 4), torch.ones(1, 2)
    assert torch.equal(clipped_sum(gradients, factors, (3, 4)), torch.full((1, 3, 4), 2.0))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="cuda"):
        clipped_sum(torch.ones(2, 3, 4), torch.ones(1, 2), (3, 4), backend="cuda")
