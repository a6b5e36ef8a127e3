"""Base models in bfloat16: what is trained is in float32."""

import pytest
import torch
from families import FAMILIES, loss, random_client
from torch import Tensor

from fedsa_secure.adapters import AdapterSettings, attach
from fedsa_secure.types import Role


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("kind", ["lora", "rslora", "vera"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-classes", "t5"])
def test_bfloat16_base_has_float32_adapters_and_head_that_train_almost_as_on_float32(name, kind):
    family = FAMILIES[name]
    settings = AdapterSettings(kind=kind, rank=5, alpha=12.0, target_modules=family.targets)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        adapted = attach(family.make().to(dtype), settings, seed=0)
        client = random_client(adapted, 0)
        adapted.load([client], trained=set(Role))
        logits = adapted(family.inputs())
        loss(logits).backward()
        trained = adapted.parameters(set(Role))
        assert {p.dtype for p in trained.values()} == {torch.float32}
        assert {p.dtype for p in adapted.model.parameters() if not p.requires_grad} == {dtype}
        results.append((logits, {name: p.grad for name, p in trained.items()}))
    (expected, gradients), (actual, rounded) = results
    assert actual.dtype == torch.float32
    assert 0 < distance(actual, expected) < 0.05
    for path, gradient in gradients.items():
        assert rounded[path].dtype == torch.float32
        assert distance(rounded[path], gradient) < 0.3, path
