"""Nobody else's data get into what a client trains for itself."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from fedsa_secure.methods import METHODS, find_method
from fedsa_secure.runtimes import simulation
from fedsa_secure.types import Role

WORDS = [f"w{k}" for k in range(196)]
MakeFederation = Callable[..., Any]


def rows_of_three(others_seed: int, others_words: int = 6) -> Dataset:
    """Client 0 has the same rows whatever the seed; the rows of 1 and 2 follow it.

    Rows have six words unless asked otherwise, so that no client's padding depends on another.
    """
    parts: dict[str, list] = {"text": [], "label": [], "client": []}
    for client in range(3):
        stream = np.random.default_rng(0 if client == 0 else 10 * others_seed + client)
        for row in range(24):
            words = 6 if client == 0 else others_words
            parts["text"].append(" ".join(stream.choice(WORDS, words)))
            parts["label"].append(int((row + (0 if client == 0 else others_seed)) % 3))
            parts["client"].append(client)
    return Dataset.from_dict(parts)


@pytest.mark.parametrize("method", METHODS)
def test_other_clients_data_do_not_reach_a_client(
    federation: MakeFederation, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """With the shared tensors held at their start, the only way in would be a leak."""
    monkeypatch.setattr(simulation, "apply_mean", lambda shared, *_: shared)
    ends = []
    for seed in (1, 2):
        made = federation((24, 24, 24), rows=rows_of_three(seed), method=method)
        run = made.simulate(f"seed{seed}")
        personal = made.model.names(find_method(method).personal)
        ends.append([{n: run.client_tensors(k)[n] for n in personal} for k in range(3)])
    for name, value in ends[0][0].items():
        assert torch.equal(value, ends[1][0][name]), name
        if not name.endswith(".A") or method == "local":
            assert not torch.equal(ends[0][1][name], ends[1][1][name]), name


@pytest.mark.parametrize("per_pass", [1, 3])
def test_longer_rows_of_others_move_a_client_by_rounding_at_most(
    federation: MakeFederation, monkeypatch: pytest.MonkeyPatch, per_pass: int
) -> None:
    """They lengthen the padding of a shared pass; a client in a pass of its own stays as it is."""
    monkeypatch.setattr(simulation, "apply_mean", lambda shared, *_: shared)
    options = {"rounds": 1, "clients_per_pass": per_pass, "dropout": 0.2}
    ends = []
    for words in (6, 13):
        made = federation((24, 24, 24), rows=rows_of_three(1, words), optimizer="sgd", **options)
        run = made.simulate(f"words{words}")
        ends.append({n: run.client_tensors(0)[n] for n in made.model.names(set(Role))})
    for name, value in ends[0].items():
        if per_pass == 1:
            assert torch.equal(value, ends[1][name]), name
        else:
            torch.testing.assert_close(value, ends[1][name], rtol=0, atol=1e-6, msg=name)


def test_a_shared_head_is_averaged_and_a_frozen_one_is_not_trained(
    federation: MakeFederation,
) -> None:
    made = federation()
    head = made.model.names({Role.HEAD})
    shared = made.simulate("shared", head="shared")
    frozen = made.simulate("frozen", head="frozen")
    for name in head:
        assert not torch.equal(shared.shared[name], made.model.initial[name])
        assert name not in frozen.client_tensors(0)
