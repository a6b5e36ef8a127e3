"""Fixed point and masks compiled for devices that are not here: nothing spilled, little memory."""

import pytest
import torch

from fedsa_kernels.aot import TARGETS, resources
from fedsa_kernels.chacha20.triton import BLOCKS
from fedsa_kernels.launch import interpreted, recording
from fedsa_kernels.quantize_mask import triton

pytestmark = [
    pytest.mark.skipif(interpreted(), reason="the interpreter compiles nothing"),
    # Whether a product is fused with what follows does not change a word: see the kernel.
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("dtype", "masked", "keys"),
    [
        (torch.float32, True, 0),
        (torch.float32, False, 1),
        (torch.float32, False, 99),
        (torch.float64, True, 99),
    ],
)
def test_resources(target: str, dtype: torch.dtype, masked: bool, keys: int):
    count = 1_000_003
    words = torch.empty(count, dtype=torch.int32, device="meta")
    with recording() as launches:
        triton.quantize_mask(
            torch.empty(count, dtype=dtype, device="meta"),
            torch.empty(3, dtype=torch.float64, device="meta"),
            words,
            words if masked else None,
            torch.empty(keys, 16, dtype=torch.int32, device="meta"),
        )
    (launch,) = launches
    found = resources(launch, TARGETS[target])
    assert found.spilled == 0
    assert found.shared <= 64 * BLOCKS
    assert found.registers <= 168  # three programs of four warps to a multiprocessor
