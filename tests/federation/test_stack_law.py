"""C clients in one stack train as the same clients do one after another."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fedsa_secure.data import Batch, EncodedRows, collate
from fedsa_secure.federation import local_training
from fedsa_secure.federation.local_training import ClientResult, ClientState, train_clients
from fedsa_secure.methods import find_method
from fedsa_secure.types import NamedTensors

MakeFederation = Callable[..., Any]


def one_round(federation, clients: Sequence[int], round_number: int = 1) -> list[ClientResult]:
    """These clients' first turn, in one stack."""
    model, method = federation.model, find_method(federation.config.method)
    shared = {name: model.initial[name] for name in model.names(method.shared)}
    turns = [(client, ClientState()) for client in clients]
    arguments = (method, federation.config, federation.data, shared, turns, round_number)
    return train_clients(model, *arguments)


def everything(result: ClientResult) -> NamedTensors:
    """All that a turn leaves behind."""
    return {**result.shared, **result.state.personal, **result.state.moments}


def largest_difference(left: NamedTensors, right: NamedTensors) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


@pytest.mark.parametrize(
    ("method", "adapter", "steps"),
    [
        ("fedsa", "lora", 12),
        pytest.param("fedsa", "lora", 50, marks=pytest.mark.slow),
        ("fedsa", "rslora", 6),
        ("fedsa", "vera", 6),
        ("feddpa", "lora", 6),
        ("feddpa", "vera", 6),
    ],
)
def test_steps_agree_in_double_precision(
    federation: MakeFederation, method: str, adapter: str, steps: int
) -> None:
    made = federation(dtype=torch.float64, method=method, adapter=adapter, local_steps=steps)
    stacked = one_round(made, [0, 1, 2, 3])
    for client in range(4):
        [alone] = one_round(made, [client])
        assert largest_difference(everything(stacked[client]), everything(alone)) < 1e-9
        assert stacked[client].loss == pytest.approx(alone.loss, abs=1e-9)
    for name in made.model.names(find_method(method).trained):  # all of them did move
        assert not torch.equal(everything(alone)[name], made.model.initial[name])


def test_ten_steps_agree_in_single_precision(federation: MakeFederation) -> None:
    made = federation(local_steps=10)
    stacked = one_round(made, [0, 1, 2, 3])
    for client in range(4):
        [alone] = one_round(made, [client])
        # Adam divides by the root of a small moment, so the values are compared, not the moments.
        left, right = stacked[client], alone
        assert largest_difference(left.shared, right.shared) < 1e-5
        assert largest_difference(left.state.personal, right.state.personal) < 1e-5


def test_gradients_agree_in_single_precision(federation: MakeFederation) -> None:
    """One step of plain SGD at rate 1 moves every tensor by its gradient."""
    options = {"optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": None, "local_steps": 1}
    made = federation(**options, schedule="constant")
    stacked = one_round(made, [0, 1, 2, 3])
    moved = False
    for client in range(4):
        [alone] = one_round(made, [client])
        assert largest_difference(everything(stacked[client]), everything(alone)) < 1e-5
        moved |= largest_difference(alone.state.personal, stacked[0].state.personal) > 1e-3
    assert moved  # different clients do end at different places


def test_runs_with_partial_participation_agree(federation: MakeFederation) -> None:
    made = federation((40, 9, 25, 60), dtype=torch.float64, participation=0.75, rounds=4)
    whole = made.simulate("whole", clients_per_pass=3)
    assert len({r.clients for r in whole.records}) > 1  # not always the same three
    for per_pass in (1, 2, 4):
        parts = made.simulate(f"parts-{per_pass}", clients_per_pass=per_pass)
        assert {r.clients for r in whole.records} == {r.clients for r in parts.records}
        for client in range(4):
            ours, theirs = parts.client_tensors(client), whole.client_tensors(client)
            assert largest_difference(ours, theirs) < 1e-9


def drawn(made, monkeypatch: pytest.MonkeyPatch, groups: Sequence[Sequence[int]]) -> dict:
    """What each client drew: rows of every step, and dropout keys of its real rows."""
    seen: dict[int, list] = {}
    current: list[int] = []

    def spy_collate(rows: EncodedRows, segments: list[np.ndarray], device: torch.device) -> Batch:
        for client, segment in zip(current, segments, strict=True):
            seen.setdefault(client, []).append(segment.tolist())
        return collate(rows, segments, device)

    original = local_training.dropout_keys

    def spy_keys(batch: Batch, clients: Sequence[int], *rest: object) -> torch.Tensor:
        keys = original(batch, clients, *rest)
        for client, k, v in zip(clients, keys, batch.real, strict=True):
            seen[client].append(k[v].tolist())
        return keys

    with monkeypatch.context() as patch:
        patch.setattr(local_training, "collate", spy_collate)
        patch.setattr(local_training, "dropout_keys", spy_keys)
        for group in groups:
            current[:] = group
            one_round(made, group, round_number=2)
    return seen


def test_draws_do_not_depend_on_stacking_or_order(
    federation: MakeFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = federation()
    together = drawn(made, monkeypatch, [[0, 1, 2, 3]])
    assert together == drawn(made, monkeypatch, [[3, 1, 0, 2]])
    assert together == drawn(made, monkeypatch, [[2, 0], [3, 1]])
    assert together == drawn(made, monkeypatch, [[3], [2], [1], [0]])
    assert together[0] != together[3]
