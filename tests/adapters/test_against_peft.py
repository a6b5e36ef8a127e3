"""Ours against PEFT: logits, every gradient, merged weights, and the folders that it reads."""

import json

import pytest
import torch
from families import FAMILIES, Family, loss, peft_gradients, random_client, with_peft
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
)

from fedsa_secure.adapters import AdapterSettings, attach, merged_weights, save_peft_adapter
from fedsa_secure.types import Role

KINDS = ("lora", "rslora", "vera")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def settings_of(family: Family, kind: str, private: bool = False) -> AdapterSettings:
    return AdapterSettings(
        kind=kind, rank=5, alpha=12.0, target_modules=family.targets, private=private
    )


@pytest.mark.parametrize("kind", KINDS)
def test_logits_all_gradients_and_merged_weights_equal_those_of_peft(family, kind):
    inputs = family.inputs()
    adapted = attach(family.make(), settings_of(family, kind), seed=0)
    client = random_client(adapted, seed=1)
    theirs = with_peft(family.make(), adapted, client)
    adapted.load([client], trained=set(Role))

    expected, actual = theirs(**inputs).logits, adapted(inputs)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)

    loss(expected).backward()
    loss(actual).backward()
    expected_gradients = peft_gradients(theirs)
    ours = adapted.parameters(set(Role))
    assert expected_gradients.keys() == ours.keys()
    for name, parameter in ours.items():
        assert expected_gradients[name].abs().max() > 1e-3, f"{name}: nothing to compare"
        torch.testing.assert_close(
            parameter.grad[0], expected_gradients[name], atol=1e-5, rtol=1e-5, msg=name
        )

    merged = merged_weights(adapted, client)
    assert merged.keys() == adapted.layers().keys()
    # Not merge_and_unload, which fails on VeRA with a head of two layers; it merges the same way.
    theirs.merge_adapter()
    for path, weight in merged.items():
        expected_weight = theirs.get_submodule(f"base_model.model.{path}").get_base_layer().weight
        torch.testing.assert_close(weight, expected_weight, atol=1e-5, rtol=1e-5, msg=path)


@pytest.mark.parametrize("private", [False, True], ids=["", "private"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_client_of_a_stack_is_saved_as_what_peft_computes(family, kind, private, tmp_path):
    """With a private adapter (FedDPA) the folder holds one LoRA of rank 2r."""
    inputs = family.inputs()
    adapted = attach(family.make(), settings_of(family, kind, private), seed=0)
    clients = [random_client(adapted, seed) for seed in (1, 2)]
    adapted.load(clients, trained=())
    together = adapted({name: values.repeat(2, 1) for name, values in inputs.items()}).chunk(2)
    assert (together[0] - together[1]).abs().max() > 1e-2
    for k, client in enumerate(clients):
        save_peft_adapter(adapted, client, tmp_path / str(k), base_model="tiny")
        theirs = PeftModel.from_pretrained(family.make(), tmp_path / str(k)).eval()
        assert theirs.peft_config["default"].r == (10 if private else 5)
        torch.testing.assert_close(together[k], theirs(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_client_lacks_is_saved_at_its_public_start(kind, tmp_path):
    family = FAMILIES["roberta"]
    adapted = attach(family.make(), settings_of(family, kind), seed=0)
    client = random_client(adapted, seed=1)
    only_b = {name: client[name] for name in adapted.names([Role.B])}
    save_peft_adapter(adapted, only_b, tmp_path, base_model="tiny")
    adapted.load([only_b], trained=())
    theirs = PeftModel.from_pretrained(family.make(), tmp_path).eval()
    inputs = family.inputs()
    torch.testing.assert_close(adapted(inputs), theirs(**inputs).logits, atol=1e-5, rtol=1e-5)


def make_electra() -> nn.Module:
    config = ElectraConfig(
        vocab_size=200,
        embedding_size=16,
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
    )
    return ElectraForSequenceClassification(config)


@pytest.mark.parametrize("kind", ["lora", "vera"])
@pytest.mark.parametrize("name", [*FAMILIES, "electra"])
def test_default_targets_are_those_of_peft(name, kind):
    make = make_electra if name == "electra" else FAMILIES[name].make
    config = {"lora": LoraConfig, "vera": VeraConfig}[kind](
        task_type=None, fan_in_fan_out=name.startswith("gpt2")
    )
    theirs = get_peft_model(make(), config)
    ours = attach(make(), AdapterSettings(kind=kind, rank=5), seed=0)
    assert set(ours.layers()) == set(theirs.targeted_module_names)


def make_distilbert() -> nn.Module:
    config = DistilBertConfig(vocab_size=200, dim=32, n_layers=2, n_heads=2, hidden_dim=48)
    return DistilBertForSequenceClassification(config)


def test_saved_folder_is_the_same_every_time(tmp_path):
    settings = AdapterSettings(rank=5, target_modules=("v_lin", "q_lin"))
    written = []
    for k in range(2):
        adapted = attach(make_distilbert(), settings, seed=0)
        client = {name: torch.full_like(start, 0.5) for name, start in adapted.initial.items()}
        save_peft_adapter(adapted, client, tmp_path / str(k), base_model="tiny")
        files = sorted((tmp_path / str(k)).iterdir())
        written.append({file.name: file.read_bytes() for file in files})
    assert written[0] == written[1]
    # A set of strings has another order in every process, so a list of one must be sorted.
    config = json.loads(written[0]["adapter_config.json"])
    assert len(config["target_modules"]) == 4
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["modules_to_save"] == ["classifier", "pre_classifier"]
