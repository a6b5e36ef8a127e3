"""The tiles that tuning tries, compiled ahead of time: on Hopper, where they are meant for."""

import pytest
import torch

from fedsa_kernels.aot import TARGETS, resources_of_all
from fedsa_kernels.bench.inputs import draw
from fedsa_kernels.bench.kernel_steps import kernel_steps
from fedsa_kernels.bench.shapes import Shape
from fedsa_kernels.bench.tuning import _tried
from fedsa_kernels.launch import interpreted, recording
from fedsa_kernels.tiles import KERNELS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(interpreted(), reason="the interpreter compiles nothing"),
]
HOPPER = TARGETS["sm_90"]
META = torch.device("meta")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("op", ["lora_linear", "vera_linear"])
@pytest.mark.parametrize("rank", [16, 256])
def test_most_candidates_fit_hopper_and_the_rest_fall_out(kernel: str, op: str, rank: int) -> None:
    """A kernel that spills at sizes that others like it run at holds more than it has to."""
    inputs = draw(Shape(4096, 4096, 8192, rank, op=op), META, 0)
    step = kernel_steps(inputs).get(kernel)
    if step is None:
        pytest.skip(f"{op} at rank {rank} has no such kernel")
    tried = [tile for tile in _tried(kernel, inputs.shape, None) if tile.splits == 0]
    fits = []
    for tile in tried:
        with recording() as launches:
            step(tile)
        [found] = zip(*resources_of_all(launches, [HOPPER]), strict=True)
        fits.append(all(each.spilled == 0 and each.shared <= HOPPER.shared for each in found))
    assert fits[0], "the default"
    assert sum(fits) >= len(tried) / 2
