"""Models in which rows of several clients meet: one client per pass, or refused."""

from pathlib import Path
from typing import Any

import pytest

import fedsa_secure
from fedsa_secure.adapters import read_peft_adapter
from fedsa_secure.errors import AdapterError


@pytest.fixture
def options(
    tiny_deberta: Any, tiny_tokenizer: Any, small_dataset: Any, tmp_path: Path
) -> dict[str, Any]:
    """A DeBERTa: its queries and keys also see relative positions, which belong to no client."""
    return {
        "model": tiny_deberta(layers=2),
        "dataset": small_dataset(rows=120),
        "tokenizer": tiny_tokenizer,
        "output_dir": str(tmp_path / "run"),
        "target_modules": ("query_proj", "value_proj", "intermediate.dense"),
        "clients": 3,
        "rounds": 1,
        "local_steps": 2,
        "batch_size": 4,
        "max_length": 16,
        "rank": 3,
        "common_rows": 9,
    }


@pytest.mark.parametrize("adapter", ["lora", "vera"])
def test_auto_is_one_client_per_pass_and_says_so(options, adapter, caplog, tmp_path):
    with caplog.at_level("INFO", logger="fedsa_secure"):
        run = fedsa_secure.train(**options, adapter=adapter)
    assert run.config.clients_per_pass == 1
    assert any("clients_per_pass is 1: deberta." in text for text in caplog.messages)
    run.save_pretrained(tmp_path / "saved")
    for client in range(3):
        adapter = read_peft_adapter(str(tmp_path / "saved" / f"client-{client:05d}"))
        outer = {n: t for n, t in adapter.tensors.items() if n.endswith((".B", ".b"))}
        assert len(outer) == 6
        assert all(values.any() for values in outer.values())


def test_number_of_clients_per_pass_is_refused_and_nothing_is_written(options, tmp_path):
    with pytest.raises(AdapterError, match=r"deberta\..*query_proj .*clients_per_pass=1"):
        fedsa_secure.train(**options, clients_per_pass=2)
    assert not (tmp_path / "run").exists()
