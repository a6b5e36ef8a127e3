"""A client's own adapter is marked, and is no start for a private run."""

from pathlib import Path

import pytest
from families import FAMILIES
from peft import LoraConfig, PeftModel, get_peft_model

from fedsa_secure import ConfigError, TrainConfig
from fedsa_secure.adapters import AdapterSettings, attach, read_peft_adapter, save_peft_adapter
from fedsa_secure.errors import PrivacyError
from fedsa_secure.runtimes.prepare import with_initial_adapter

BERT = FAMILIES["bert"]
MARKER = "fedsa_secure.json"


@pytest.fixture
def personal(tmp_path: Path) -> Path:
    adapted = attach(BERT.make(), AdapterSettings(rank=4), seed=0)
    save_peft_adapter(adapted, {}, tmp_path, base_model="tiny")
    return tmp_path


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """Written by PEFT."""
    config = LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    get_peft_model(BERT.make(), config).save_pretrained(tmp_path)
    return tmp_path


def private(start: Path, **options: object) -> TrainConfig:
    return TrainConfig.build(initial_adapter=str(start), dp_epsilon=8, **options)


def test_what_a_client_trained_is_marked_and_peft_still_reads_it(personal):
    assert read_peft_adapter(str(personal)).personal
    PeftModel.from_pretrained(BERT.make(), personal)


@pytest.mark.parametrize("unit", ["record", "client"])
def test_a_private_run_does_not_start_from_it(personal, unit):
    with pytest.raises(PrivacyError, match="initial_adapter: .* client's own adapter"):
        with_initial_adapter(private(personal, dp_unit=unit))


def test_other_runs_do(personal):
    config = TrainConfig.build(initial_adapter=str(personal))
    assert with_initial_adapter(config).rank == 4


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"personal": 0}'])
def test_a_damaged_marker_counts(personal, content):
    (personal / MARKER).write_bytes(content)
    assert read_peft_adapter(str(personal)).personal


def test_a_foreign_adapter_is_public(public):
    assert not (public / MARKER).exists()
    assert not read_peft_adapter(str(public)).personal
    assert with_initial_adapter(private(public)).rank == 4


def test_a_random_b_and_a_given_start_exclude_each_other(public):
    with pytest.raises(ConfigError) as refused:
        with_initial_adapter(private(public, dp_release="frozen-b"))
    assert refused.value.option == "dp_release"
    with_initial_adapter(private(public, dp_release="frozen-b", dp_unit="client"))
