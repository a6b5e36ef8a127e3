"""``add_parts``: sums of what several programs wrote, rounded once."""

import pytest
import torch

from fedsa_kernels.launch import interpreted
from fedsa_kernels.products.parts import add_parts

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2, 31, 32, 33, 70])
@pytest.mark.parametrize("shape", [(1,), (63,), (64,), (65,), (5, 3, 7)], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_all_parts_of_a_group_are_added(
    groups: int, shape: tuple[int, ...], parts: int, dtype: torch.dtype
) -> None:
    source = torch.randn(groups, parts, *shape)
    found = add_parts(source, dtype)
    assert (found.dtype, found.shape, found.is_contiguous()) == (dtype, (groups, *shape), True)
    expected = source.double().sum(1)
    error = (found.double() - expected).abs().max() / source.abs().sum(1).max()
    assert error <= 2 * torch.finfo(dtype).eps
    assert torch.equal(found, add_parts(source, dtype))


def test_it_is_rounded_once() -> None:
    """A sum whose steps half precision would lose."""
    source = torch.full((1, 4096, 2), 1.0)
    source[:, 1:] = 2.0**-12
    assert torch.equal(add_parts(source, torch.float16), source.sum(1).half())
    assert add_parts(source, torch.float16)[0, 0] > 1.9
