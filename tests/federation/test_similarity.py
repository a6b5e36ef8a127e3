"""Similarity across clients against a loop over pairs in numpy."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsa_secure.federation.similarity import layer_similarity, mean_pairwise_cosine
from fedsa_secure.types import NamedTensors

PAIRS = [("enc.0.query.A", "enc.0.query.B"), ("enc.1.key.d", "enc.1.key.b")]  # LoRA and VeRA
SHAPES = {
    "enc.0.query.A": (2, 5),
    "enc.0.query.B": (4, 2),
    "enc.1.key.d": (3,),
    "enc.1.key.b": (6,),
}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_all(seed: int) -> NamedTensors:
    return {name: draw(100 * seed + k, *SHAPES[name]) for k, name in enumerate(SHAPES)}


def by_pairs(tensors: list[Tensor]) -> float:
    """The definition, in numpy."""
    arrays = [tensor.double().numpy().ravel() for tensor in tensors]
    cosines = [
        np.dot(u, v) / (np.linalg.norm(u) * np.linalg.norm(v))
        for u, v in itertools.combinations(arrays, 2)
    ]
    return float(np.mean(cosines))


@given(st.integers(2, 9), st.integers(1, 6), st.integers(1, 6), st.integers(0, 999))
def test_it_is_the_mean_over_all_pairs(clients: int, rows: int, columns: int, seed: int) -> None:
    common = draw(seed, rows, columns)
    tensors = [common + draw(seed + k + 1, rows, columns) for k in range(clients)]
    assert mean_pairwise_cosine(tensors) == pytest.approx(by_pairs(tensors), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_sums_are_kept_in_double_precision(dtype: torch.dtype) -> None:
    tensors = [(1000 + draw(k, 40, 50)).to(dtype) for k in range(3)]
    expected = by_pairs(tensors)
    assert 1e-9 < 1 - expected < 1e-5  # too near to 1 for a sum in single precision
    assert mean_pairwise_cosine(tensors) == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("factor", [1e-300, 1e-3, 7.0, 1e300])
def test_the_length_of_a_tensor_plays_no_part(factor: float) -> None:
    tensors = [draw(k, 3, 4) for k in range(3)]
    stretched = [tensors[0], factor * tensors[1], tensors[2]]
    expected = mean_pairwise_cosine(tensors)
    assert abs(expected) > 0.01
    assert mean_pairwise_cosine(stretched) == pytest.approx(expected, abs=1e-12)


def test_the_order_of_the_clients_plays_no_part() -> None:
    tensors = [draw(k, 3, 4) for k in range(4)]
    for order in itertools.permutations(tensors):
        assert mean_pairwise_cosine(order) == pytest.approx(by_pairs(tensors), abs=1e-12)


def test_equal_opposite_and_orthogonal_tensors() -> None:
    tensor, other = torch.tensor([[3.0, 0.0], [4.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    assert mean_pairwise_cosine([tensor] * 5) == pytest.approx(1, abs=1e-15)
    assert mean_pairwise_cosine([tensor, -2 * tensor]) == pytest.approx(-1, abs=1e-15)
    assert mean_pairwise_cosine([tensor, other]) == 0
    assert mean_pairwise_cosine([tensor, tensor, other]) == pytest.approx(1 / 3, abs=1e-15)


def test_rounding_does_not_lead_past_one() -> None:
    for seed in range(200):
        tensor = draw(seed, 7)
        assert mean_pairwise_cosine([tensor] * 3) <= 1
        assert mean_pairwise_cosine([tensor, -tensor]) >= -1


def test_a_zero_tensor_is_like_none() -> None:
    zero, tensor = torch.zeros(2, 3), torch.ones(2, 3)
    assert mean_pairwise_cosine([zero, zero]) == 0
    assert mean_pairwise_cosine([zero, tensor]) == 0
    # One pair of three is of two equal tensors, and all three pairs count.
    assert mean_pairwise_cosine([tensor, zero, tensor]) == pytest.approx(1 / 3, abs=1e-15)


@pytest.mark.parametrize("clients", [0, 1])
def test_one_client_alone_is_refused(clients: int) -> None:
    with pytest.raises(ValueError, match=f"2 clients or more, not {clients}"):
        mean_pairwise_cosine([torch.ones(3)] * clients)


def test_tensors_of_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one shape, not \[\(2, 3\), \(3, 2\)\]"):
        mean_pairwise_cosine([torch.ones(3, 2), torch.ones(2, 3)])


def test_layers_pair_the_names_given_and_a_is_also_taken_without_its_start() -> None:
    initial, clients = draw_all(0), [draw_all(k) for k in (1, 2, 3)]
    layers = layer_similarity(clients, initial, PAIRS)
    assert [s.layer for s in layers] == ["enc.0.query", "enc.1.key"]
    for found, (name_a, name_b) in zip(layers, PAIRS, strict=True):
        moved = [tensors[name_a] - initial[name_a] for tensors in clients]
        assert found.a == pytest.approx(by_pairs([t[name_a] for t in clients]), abs=1e-12)
        assert found.b == pytest.approx(by_pairs([t[name_b] for t in clients]), abs=1e-12)
        assert found.a_update == pytest.approx(by_pairs(moved), abs=1e-12)


def test_the_common_start_hides_that_the_clients_moved_apart() -> None:
    initial = {"x.A": torch.tensor([10.0, 0.0, 0.0]), "x.B": torch.zeros(2)}
    moves = torch.tensor([[0.0, 0.1, 0.0], [0.0, -0.1, 0.0]])
    clients = [{"x.A": initial["x.A"] + move, "x.B": torch.ones(2)} for move in moves]
    [layer] = layer_similarity(clients, initial, [("x.A", "x.B")])
    assert layer.a > 0.999
    assert layer.a_update == pytest.approx(-1)
    assert layer.b == pytest.approx(1)


def test_what_a_client_lacks_is_at_its_start() -> None:
    """As with a method that does not train A: nothing has moved, and nothing moved alike."""
    initial = {"x.A": draw(0, 2, 3), "x.B": torch.zeros(4, 2)}
    [layer] = layer_similarity([{"x.B": draw(k, 4, 2)} for k in (1, 2)], initial, [("x.A", "x.B")])
    assert layer.a == pytest.approx(1)
    assert layer.a_update == 0
    [layer] = layer_similarity([{}, {}], initial, [("x.A", "x.B")])
    assert layer.b == 0


def test_a_pair_of_two_layers_is_refused() -> None:
    initial = draw_all(0)
    with pytest.raises(ValueError, match=r"enc.0.query.A and enc.1.key.b are not of one layer"):
        layer_similarity([initial, initial], initial, [("enc.0.query.A", "enc.1.key.b")])
