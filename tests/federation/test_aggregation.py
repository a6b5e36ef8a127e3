"""Encode, sum, decode, update."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsa_secure.federation.aggregation import ClearAggregation, Contribution
from fedsa_secure.federation.encoding import Layout
from fedsa_secure.federation.server import apply_mean, difference, select_clients
from fedsa_secure.federation.stacking import passes

SHAPES = st.dictionaries(
    st.text("abc.", min_size=1, max_size=6),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    max_size=4,
)


@given(SHAPES)
def test_decoding_undoes_encoding(shapes: dict[str, list[int]]) -> None:
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    layout = Layout.of(tensors)
    vector = layout.encode(tensors)
    assert vector.numel() == layout.size == sum(t.numel() for t in tensors.values())
    decoded = layout.decode(vector)
    assert decoded.keys() == tensors.keys()
    assert all(torch.equal(decoded[name], tensors[name]) for name in tensors)


def test_tensors_outside_the_layout_cannot_enter_the_vector() -> None:
    layout = Layout.of({"x.A": torch.zeros(2, 3)})
    tensors = {"x.A": torch.ones(2, 3), "x.B": torch.full((9,), 7.0)}
    assert layout.encode(tensors).tolist() == [1.0] * 6


def test_a_round_moves_the_shared_tensors_to_the_mean_of_the_clients() -> None:
    stream = torch.Generator().manual_seed(1)
    start = {"A": torch.randn(5, 7, generator=stream, dtype=torch.float64)}
    ends = [{"A": torch.randn(5, 7, generator=stream, dtype=torch.float64)} for _ in range(6)]
    layout = Layout.of(start)
    contributions = [
        Contribution(client, layout.encode(difference(end, start)), loss=float(client))
        for client, end in enumerate(ends)
    ]
    outcome = ClearAggregation().round(1, range(6), None, start, lambda _: iter(contributions))
    assert outcome.mean is not None
    after = apply_mean(start, layout, outcome.mean)
    expected = torch.stack([end["A"] for end in ends]).mean(0)
    torch.testing.assert_close(after["A"], expected, rtol=1e-14, atol=1e-14)
    assert outcome.survivors == tuple(range(6))
    assert outcome.loss == 2.5


def test_weights_count_in_the_mean() -> None:
    shared = {"A": torch.zeros(2)}
    contributions = [
        Contribution(0, torch.tensor([1.0, 0.0]), loss=0.0, weight=3),
        Contribution(1, torch.tensor([0.0, 1.0]), loss=0.0, weight=1),
    ]
    outcome = ClearAggregation().round(1, range(2), None, shared, lambda _: iter(contributions))
    assert outcome.mean is not None
    assert outcome.mean.tolist() == [0.75, 0.25]


def test_nothing_shared_sums_to_nothing() -> None:
    empty = [Contribution(client, torch.zeros(0), loss=1.0) for client in range(2)]
    outcome = ClearAggregation().round(1, range(2), None, {}, lambda _: iter(empty))
    assert outcome.mean is not None
    assert outcome.mean.numel() == 0
    assert outcome.survivors == (0, 1)


@given(st.integers(1, 60), st.floats(0.01, 1), st.integers(0, 2**40), st.integers(1, 99))
def test_selected_clients_are_distinct_ordered_and_reproducible(
    clients: int, share: float, seed: int, round_number: int
) -> None:
    chosen = select_clients(clients, share, seed, round_number)
    assert len(chosen) == max(1, round(share * clients))
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(clients))
    assert chosen == select_clients(clients, share, seed, round_number)


def test_every_client_gets_its_turn() -> None:
    rounds = [select_clients(10, 0.3, seed=0, round_number=k) for k in range(1, 40)]
    assert set().union(*rounds) == set(range(10))


@given(st.integers(1, 40), st.integers(1, 12))
def test_passes_hold_every_client_once_and_are_balanced(clients: int, per_pass: int) -> None:
    groups = passes(list(range(clients)), per_pass)
    assert [client for group in groups for client in group] == list(range(clients))
    sizes = [len(group) for group in groups]
    assert max(sizes) <= per_pass
    assert max(sizes) - min(sizes) <= 1
