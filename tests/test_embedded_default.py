"""The embedded default: real pretrained weights, real words, no network."""

import socket
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

import fedsa_secure
from fedsa_secure.adapters.pretrained import load_pretrained
from fedsa_secure.methods import METHODS


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the embedded default reached for a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_a_few_rounds_of_the_default_learn(tmp_path: Path) -> None:
    """Fewer clients than by default, and balanced ones, so that the majority is no answer."""
    run = fedsa_secure.train(
        output_dir=str(tmp_path / "run"),
        rounds=4,
        local_steps=8,
        clients=3,
        partition="iid",
        evaluate_every=4,
        cross_rows=0,
    )
    assert run.accuracy > run.majority + 0.1
    assert run.common_accuracy > 0.6
    words = ["wonderful", "horrible"]
    assert run.clients[0].predict(words) == ["positive", "negative"]
    base, _ = load_pretrained("minilm", labels=2, seed=0)
    adapted = PeftModel.from_pretrained(base, run.path / "adapters" / "client-00000")
    assert adapted.peft_config["default"].r == run.config.rank


@pytest.mark.slow
@pytest.mark.usefixtures("no_network")
def test_the_default_beats_the_majority_class(tmp_path: Path) -> None:
    run = fedsa_secure.train(output_dir=str(tmp_path / "run"))
    assert len(run.clients) == 10
    assert run.accuracy > run.majority + 0.05
    assert run.common_accuracy > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "rslora", "vera"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_words_with_every_adapter(
    method: str, adapter: str, tmp_path: Path
) -> None:
    """All rows in every step, so that losses of rounds compare."""
    run = fedsa_secure.train(
        output_dir=str(tmp_path / "run"),
        method=method,
        adapter=adapter,
        max_rows=240,
        clients=2,
        partition="iid",
        batch_size=100,
        rounds=4,
        local_steps=5,
        dropout=0.0,
        common_rows=0,
        cross_rows=0,
    )
    losses = [record.loss for record in run.history]
    assert losses[-1] < losses[0] - 0.002
