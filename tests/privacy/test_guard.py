"""Models in which one record reaches the gradient of another are refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsa_secure.adapters import AdapterSettings, BatchContext, LoRALinear
from fedsa_secure.errors import PrivacyError
from fedsa_secure.privacy import refuse_dependent_rows, refuse_mixing, refuse_shared_gradients

ROWS = 3


class Toy(nn.Module):
    """One adapted layer, with something before and after it."""

    def __init__(self, before: Any = None, after: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        context = BatchContext(clients=1, rows=ROWS)
        settings = AdapterSettings(kind="lora", rank=2, alpha=4.0, dropout=0.0)
        self.layer = LoRALinear(nn.Linear(6, 5), settings, "layer", context)
        for parameter in (self.layer.A, self.layer.B):
            nn.init.normal_(parameter)
        same = lambda x: x  # noqa: E731
        self.before, self.after = before or same, after or same

    def forward(self, x: Tensor) -> Tensor:
        y = self.after(self.layer(self.before(x)))
        return y.square().mean((1, 2))


def check(model: Toy, tokens: int) -> None:
    x = torch.randn(ROWS, tokens, 6, generator=torch.Generator().manual_seed(1))
    refuse_shared_gradients(model, [model.layer.A, model.layer.B], lambda: model(x), ROWS)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
def test_rows_that_stand_apart_pass(tokens: int) -> None:
    check(Toy(), tokens)


def test_a_layer_with_the_sequence_first_is_refused_whatever_the_lengths() -> None:
    """With as many tokens as rows nothing but its gradients gives it away."""
    model = Toy(before=lambda x: x.transpose(0, 1), after=lambda y: y.transpose(0, 1))
    with pytest.raises(PrivacyError, match="layer: it is called with 5 rows where the batch has 3"):
        check(model, 5)
    with pytest.raises(PrivacyError, match="found at other rows of the batch"):
        check(model, 3)


@pytest.mark.parametrize(
    "mix",
    [
        lambda y: y - y.mean(0, keepdim=True),
        lambda y: y / y.abs().amax(),
        lambda y: y + 1e-2 * y.roll(1, 0),
    ],
    ids=["mean", "largest", "neighbour"],
)
def test_rows_that_mix_behind_the_layer_are_refused(mix: Any) -> None:
    with pytest.raises(PrivacyError, match="found at other rows of the batch"):
        check(Toy(after=mix), 4)


def test_nothing_of_the_check_is_left() -> None:
    model = Toy()
    check(model, 4)
    assert not model.layer._forward_hooks
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())
    assert model.layer.A.grad is None


def test_outputs_that_follow_another_rows_length_are_refused() -> None:
    """As pooling over the padding does."""
    x = torch.randn(ROWS, 8, 6, generator=torch.Generator().manual_seed(1))
    pooled = nn.Linear(6, 2)
    with pytest.raises(PrivacyError, match="when another row of the batch is replaced"):
        refuse_dependent_rows(lambda: pooled(x[:, :4].mean(1)), lambda: pooled(x.mean(1)))
    refuse_dependent_rows(lambda: pooled(x[:, :4]), lambda: pooled(x))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.SyncBatchNorm(4)])
def test_statistics_over_a_batch_are_refused_by_name(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer)
    with pytest.raises(PrivacyError, match=r"1 \((Sync)?BatchNorm"):
        refuse_mixing(model)
