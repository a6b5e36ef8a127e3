"""The tiles that tuning tries, compiled ahead of time: on Hopper, where they are meant for."""

import pytest
import torch

from fedsa_kernels.aot import TARGETS, resources_of_all
from fedsa_kernels.bench.inputs import Inputs
from fedsa_kernels.bench.shapes import Shape
from fedsa_kernels.bench.tuning import _tried, _works
from fedsa_kernels.launch import interpreted, recording
from fedsa_kernels.tiles import KERNELS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(interpreted(), reason="the interpreter compiles nothing"),
]
HOPPER = TARGETS["sm_90"]


def on_meta(shape: Shape) -> Inputs:
    k, n, r, clients = shape.d_in, shape.d_out, shape.rank, shape.clients

    def empty(*sizes: int) -> torch.Tensor:
        return torch.empty(*sizes, dtype=shape.torch_dtype, device="meta")

    x, dy, weight, bias = empty(shape.rows, k), empty(shape.rows, n), empty(n, k), empty(n)
    if shape.op == "lora_linear":
        return Inputs(shape, x, dy, weight, bias, empty(clients, r, k), empty(clients, n, r))
    vectors = (empty(clients, r), empty(clients, n))
    return Inputs(shape, x, dy, weight, bias, empty(r, k), empty(n, r), *vectors)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("op", ["lora_linear", "vera_linear"])
@pytest.mark.parametrize("rank", [16, 256])
def test_most_candidates_fit_hopper_and_the_rest_fall_out(kernel: str, op: str, rank: int) -> None:
    """A kernel that spills at sizes that others like it run at holds more than it has to."""
    inputs = on_meta(Shape(4096, 4096, 8192, rank, op=op))
    work = _works(inputs).get(kernel)
    if work is None:
        pytest.skip(f"{op} at rank {rank} has no such kernel")
    tried = [tile for tile in _tried(kernel, inputs, None) if tile.splits == 0]
    fits = []
    for tile in tried:
        with recording() as launches:
            work(tile)
        [found] = zip(*resources_of_all(launches, [HOPPER]), strict=True)
        fits.append(all(each.spilled == 0 and each.shared <= HOPPER.shared for each in found))
    assert fits[0], "the default"
    assert sum(fits) >= len(tried) / 2
