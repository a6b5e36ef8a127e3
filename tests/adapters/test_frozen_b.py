"""Starts for a B that stays frozen: public, random, and the base model."""

import pytest
import torch
from families import FAMILIES
from torch import Tensor

from fedsa_secure.adapters import AdaptedModel, AdapterSettings, attach
from fedsa_secure.config import TrainConfig
from fedsa_secure.runtimes.prepare import Given, prepare
from fedsa_secure.types import Role

ALL = ["bert", "gpt2", "llama-classes", "t5"]
KINDS = ["lora", "rslora", "vera"]


def attached(name: str = "bert", kind: str = "lora", rank: int = 4, seed: int = 3) -> AdaptedModel:
    family = FAMILIES[name]
    settings = AdapterSettings(kind=kind, rank=rank, target_modules=family.targets, frozen_b=True)
    return attach(family.make(), settings, seed)


def starts(adapted: AdaptedModel, role: Role) -> dict[str, Tensor]:
    return {name: adapted.initial[name] for name in adapted.names([role])}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_the_adapted_model_starts_as_the_base_model(name, kind):
    family = FAMILIES[name]
    inputs = family.inputs()
    expected = family.make()(**inputs).logits
    torch.testing.assert_close(attached(name, kind)(inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_every_a_has_a_gradient_at_the_start_and_no_b_needs_one(name, kind):
    adapted = attached(name, kind)
    adapted.load([{}], trained=[Role.A])
    adapted(FAMILIES[name].inputs()).square().sum().backward()
    gradients = {name: p.grad for name, p in adapted.parameters([Role.A]).items()}
    assert gradients
    for gradient in gradients.values():
        assert gradient.abs().max() > 1e-6
    assert all(p.grad is None for p in adapted.parameters([Role.B]).values())


@pytest.mark.parametrize("rank", [1, 4, 32, 40])
def test_b_is_orthonormal(rank):
    """The layers have 32 and 48 outputs: with rank 40 some have fewer than the rank."""
    for B in starts(attached(rank=rank), Role.B).values():
        B = B.double()
        gram = B.T @ B if B.shape[0] >= rank else B @ B.T
        torch.testing.assert_close(gram, torch.eye(len(gram)).double(), atol=1e-6, rtol=0)


def test_b_is_uniformly_random():
    """Over 2000 draws the mean of B's first column is 0 and its covariance I / d_out.

    Without fixed signs the diagonal of R is negative and B's first entry never positive. Bounds of
    6 standard deviations, for fixed seeds.
    """
    adapted = attached(rank=2)
    layer = next(iter(adapted.layers().values()))
    drawn = torch.stack([layer.starts(seed)["B"][1][:, 0] for seed in range(2000)]).double()
    count, d_out = drawn.shape
    assert drawn.mean(0).abs().max() < 6 * (1 / d_out / count) ** 0.5
    covariance = drawn.T @ drawn / count * d_out
    assert (covariance - torch.eye(d_out)).abs().max() < 6 * (2 / count) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_start_is_a_function_of_the_seed_and_differs_by_layer(kind):
    one, two, other = (starts(attached(kind=kind, seed=s), Role.B) for s in (3, 3, 4))
    values = list(one.values())
    for name, B in one.items():
        assert torch.equal(B, two[name])
        assert not torch.equal(B, other[name])
    assert not torch.equal(values[0], values[1])


@pytest.mark.parametrize("kind", KINDS)
def test_start_depends_on_no_global_state(kind):
    expected = starts(attached(kind=kind), Role.B)
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        found = starts(attached(kind=kind), Role.B)
    assert all(torch.equal(B, found[name]) for name, B in expected.items())


@pytest.mark.parametrize("rank", [8, 64])
def test_veras_b_has_random_signs_and_makes_columns_of_norm_one(rank):
    adapted = attached(kind="vera", rank=rank)
    for path, layer in adapted.layers().items():
        b = adapted.initial[f"{path}.b"]
        assert len(b.abs().unique()) == 1
        assert len(b.unique()) == 2
        columns = (b[:, None] * layer.B).square().sum(0)
        assert columns.mean().item() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({"dp_epsilon": 8, "dp_release": "frozen-b"}, True),
        ({"dp_epsilon": 8}, False),
        ({"dp_epsilon": 8, "dp_unit": "client", "dp_delta": 0.1}, False),
        ({}, False),
    ],
)
def test_a_run_starts_so_if_it_is_private_by_record(
    options, frozen, tiny_bert, small_dataset, tiny_tokenizer
):
    given = Given(tiny_bert(), small_dataset(rows=90), "iid", tiny_tokenizer)
    sizes = {"clients": 3, "rank": 2, "max_length": 16, "test_fraction": 0.5}
    model = prepare(given, TrainConfig.build(**sizes, **options)).model
    for role, zero in ((Role.A, frozen), (Role.B, not frozen)):
        assert all((value.count_nonzero() == 0) == zero for value in starts(model, role).values())
