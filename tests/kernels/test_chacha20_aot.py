"""ChaCha20 compiled for devices that are not here: no spilled register, and little memory."""

import pytest
import torch

from fedsa_kernels.aot import TARGETS, resources
from fedsa_kernels.chacha20 import triton
from fedsa_kernels.launch import interpreted, recording

pytestmark = [
    pytest.mark.skipif(interpreted(), reason="the interpreter compiles nothing"),
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("count", [1, 16 * 4096, 2**31 + 5])
def test_resources(target: str, count: int):
    with recording() as launches:
        triton.words(torch.empty(12, dtype=torch.int32, device="meta"), count)
    (launch,) = launches
    found = resources(launch, TARGETS[target])
    assert found.spilled == 0
    assert found.shared <= 64 * triton.BLOCKS
    assert found.registers <= 128
