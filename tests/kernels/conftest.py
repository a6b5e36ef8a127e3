"""What the tests of all ops share."""

import pytest
import torch
from jaxtyping import config as jaxtyping_config


@pytest.fixture
def _without_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checker of these tests cannot be compiled, and takes a symbolic size for a mistake."""
    monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)


def _view(kind: str, rows: int, tokens: int, width: int) -> torch.Tensor:
    if kind == "strided features":
        return torch.randn(rows, tokens, 2 * width, dtype=torch.float64)[..., ::2]
    if kind == "swapped row and token":
        return torch.randn(tokens, rows, width, dtype=torch.float64).transpose(0, 1)
    return torch.randn(rows, 2 * tokens, width, dtype=torch.float64)[:, 3 : 3 + tokens]


@pytest.fixture(params=["strided features", "swapped row and token", "sliced tokens"])
def make_view(request):
    """`make_view(rows, tokens, width)`: an input that is a view with gaps or another order."""

    def make(rows: int, tokens: int, width: int) -> torch.Tensor:
        x = _view(request.param, rows, tokens, width)
        assert not x.is_contiguous()
        return x.requires_grad_()

    return make
