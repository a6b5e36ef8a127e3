"""VeRA's frozen factors are the same for all clients, whatever their process has set."""

import pytest
import torch

from fedsa_secure.adapters import AdapterSettings, attach
from fedsa_secure.adapters.vera import Projections

SIZES = [(7, 5), (4, 9)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_projections_do_not_depend_on_the_default_dtype(dtype: torch.dtype) -> None:
    expected = Projections.draw(3, 2, SIZES)
    torch.set_default_dtype(dtype)
    try:
        found = Projections.draw(3, 2, SIZES)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.A, expected.A)
    assert torch.equal(found.B, expected.B)


def test_projections_do_not_depend_on_the_default_device() -> None:
    expected = Projections.draw(3, 2, SIZES)
    with torch.device("meta"):
        found = Projections.draw(3, 2, SIZES)
    assert torch.equal(found.A, expected.A)


def test_private_adapters_have_factors_of_their_own(tiny_bert):
    """With one pair both adapters would start alike and get the same gradients."""
    adapted = attach(tiny_bert(), AdapterSettings(kind="vera", rank=4, private=True), seed=0)
    public, private = adapted.projections
    assert public.A.shape == private.A.shape
    assert not torch.isclose(public.A, private.A).any()
    layer = next(iter(adapted.layers().values()))
    assert not torch.isclose(layer.B, layer.private_B).any()
