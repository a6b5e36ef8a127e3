"""Adapters that PEFT wrote as the start of ours: the same logits, or refused by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Family
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedsa_secure.adapters import (
    attach,
    read_peft_adapter,
    save_peft_adapter,
)
from fedsa_secure.errors import ConfigError

WEIGHTS = "adapter_model.safetensors"
BERT = FAMILIES["bert"]


def write(config: PeftConfig, folder: Path, base: nn.Module | None = None) -> PeftModel:
    """Let PEFT save an adapter, and a head, of random values."""
    model = get_peft_model(BERT.make() if base is None else base, config).eval()
    stream = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=stream))
    model.save_pretrained(folder)
    return model


def peft_form(family: Family, kind: str, **options: Any) -> PeftConfig:
    """A configuration that a user may have written."""
    common = {
        "task_type": "SEQ_CLS" if family.head else None,
        "r": 5,
        "target_modules": list(family.targets),
        "modules_to_save": family.head,
        "fan_in_fan_out": "c_attn" in family.targets,
        **options,
    }
    if kind == "vera":
        return VeraConfig(d_initial=0.3, **{"projection_prng_key": 11, **common})
    return LoraConfig(lora_alpha=12, use_rslora=kind == "rslora", **common)


def logits_from(folder: Path, family: Family, inputs: dict[str, Tensor]) -> Tensor:
    start = read_peft_adapter(str(folder))
    return attach(family.make(), start.settings, 0, start)(inputs)


@pytest.mark.parametrize("kind", ["lora", "rslora", "vera"])
@pytest.mark.parametrize("name", FAMILIES)
def test_from_peft_to_ours_and_back_the_logits_stay(name, kind, tmp_path):
    family = FAMILIES[name]
    inputs = family.inputs()
    theirs = write(peft_form(family, kind), tmp_path / "theirs", family.make())
    expected = theirs(**inputs).logits
    assert (expected - family.make()(**inputs).logits).abs().max() > 1e-2

    start = read_peft_adapter(str(tmp_path / "theirs"))
    assert (start.settings.kind, start.settings.rank) == (kind, 5)
    adapted = attach(family.make(), start.settings, 0, start)
    torch.testing.assert_close(adapted(inputs), expected, atol=1e-5, rtol=1e-5)

    save_peft_adapter(adapted, {}, tmp_path / "ours", base_model="tiny")
    again = PeftModel.from_pretrained(family.make(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    before, after = load_file(tmp_path / "theirs" / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A")
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-classes", "t5"])
def test_factors_of_vera_that_were_not_saved_follow_from_the_key(name, tmp_path):
    family = FAMILIES[name]
    inputs = family.inputs()
    theirs = write(peft_form(family, "vera", save_projection=False), tmp_path, family.make())
    assert not [key for key in load_file(tmp_path / WEIGHTS) if "vera_A" in key]
    start = read_peft_adapter(str(tmp_path))
    assert start.projections is None
    adapted = attach(family.make(), start.settings, 0, start)
    expected = theirs(**inputs).logits
    torch.testing.assert_close(adapted(inputs), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(adapted.projections[0].A, theirs.base_model.vera_A["default"])
    assert torch.equal(adapted.projections[0].B, theirs.base_model.vera_B["default"])
    with pytest.warns(UserWarning, match="Specified to not load vera_A"):
        again = PeftModel.from_pretrained(family.make(), tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def test_saved_factors_of_vera_go_before_those_of_the_key(tmp_path):
    """As after training on a machine that draws others."""
    inputs, family = BERT.inputs(), BERT
    write(peft_form(family, "vera"), tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    stream = torch.Generator().manual_seed(6)
    for key in ("base_model.vera_A", "base_model.vera_B"):
        state[key] = torch.randn(state[key].shape, generator=stream)
    before = logits_from(tmp_path, family, inputs)
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    theirs = PeftModel.from_pretrained(family.make(), tmp_path).eval()
    expected = theirs(**inputs).logits
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(logits_from(tmp_path, family, inputs), expected, atol=1e-5, rtol=0)

    start = read_peft_adapter(str(tmp_path))
    adapted = attach(family.make(), start.settings, 0, start)
    save_peft_adapter(adapted, {}, tmp_path / "ours", base_model="tiny")
    again = PeftModel.from_pretrained(family.make(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-5, rtol=0)


def test_layers_that_peft_left_out_are_left_out(tmp_path):
    config = peft_form(BERT, "lora", layers_to_transform=[1], exclude_modules=["query"])
    theirs = write(config, tmp_path)
    start = read_peft_adapter(str(tmp_path))
    adapted = attach(BERT.make(), start.settings, 0, start)
    assert set(adapted.layers()) == {
        "bert.encoder.layer.1.attention.self.value",
        "bert.encoder.layer.1.intermediate.dense",
    }
    inputs = BERT.inputs()
    torch.testing.assert_close(adapted(inputs), theirs(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_private_adapter_beside_a_start_changes_nothing_at_first(tmp_path):
    inputs = BERT.inputs()
    for kind in ("lora", "vera"):
        theirs = write(peft_form(BERT, kind), tmp_path / kind)
        start = read_peft_adapter(str(tmp_path / kind))
        adapted = attach(BERT.make(), replace(start.settings, private=True), 0, start)
        torch.testing.assert_close(adapted(inputs), theirs(**inputs).logits, atol=1e-5, rtol=1e-5)


# --- refused ---------------------------------------------------------------------------------


def check_refused(match: str) -> Any:
    return pytest.raises(ConfigError, match=rf"^initial_adapter: .*{match}")


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"rank_pattern": {"query": 3}},
        {"alpha_pattern": {"query": 3}},
        {"init_lora_weights": "pissa"},
        {"lora_bias": True},
        {"trainable_token_indices": [3]},
        {"layer_replication": [(0, 2), (1, 2)]},
    ],
    ids=lambda options: "-".join(str(part) for item in options.items() for part in item)[:24],
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT misreads its own lora_bias
def test_unsupported_feature_of_lora_is_refused_by_name(options, tmp_path):
    write(peft_form(BERT, "lora", **options), tmp_path)
    ((feature, _),) = options.items()
    with check_refused(f"PEFT's {feature}=") as error:
        read_peft_adapter(str(tmp_path))
    assert error.value.option == "initial_adapter"


def test_unsupported_feature_of_vera_is_refused_by_name(tmp_path):
    write(peft_form(BERT, "vera", bias="all"), tmp_path)
    with check_refused("PEFT's bias='all'"):
        read_peft_adapter(str(tmp_path))


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(task_type="SEQ_CLS", target_modules=["value"], feedforward_modules=[]),
        LoHaConfig(task_type="SEQ_CLS", r=5, target_modules=["value"]),
        PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    ],
    ids=["IA3", "LOHA", "PROMPT_TUNING"],
)
def test_other_adapters_of_peft_are_refused_by_name(config, tmp_path):
    write(config, tmp_path)
    with check_refused(f"PEFT type {config.peft_type.value}"):
        read_peft_adapter(str(tmp_path))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_adapter_on_an_embedding_is_refused_by_name(tmp_path):
    write(peft_form(BERT, "lora", target_modules=["word_embeddings", "value"]), tmp_path)
    with check_refused("word_embeddings"):
        read_peft_adapter(str(tmp_path))


def test_trained_layer_outside_the_head_is_refused_by_name(tmp_path):
    write(peft_form(BERT, "lora", modules_to_save=["classifier", "LayerNorm"]), tmp_path)
    start = read_peft_adapter(str(tmp_path))
    with check_refused("LayerNorm"):
        attach(BERT.make(), start.settings, 0, start)


def test_missing_folder_is_refused(tmp_path):
    with check_refused("nowhere"):
        read_peft_adapter(str(tmp_path / "nowhere"))


def test_truncated_weights_are_refused(tmp_path):
    write(peft_form(BERT, "lora"), tmp_path)
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    with check_refused("cannot read"):
        read_peft_adapter(str(tmp_path))


def test_folder_that_adapts_nothing_is_refused(tmp_path):
    write(peft_form(BERT, "lora"), tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    head = {key: value for key, value in state.items() if "lora_" not in key}
    assert head
    save_file(head, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with check_refused("adapts no layer"):
        read_peft_adapter(str(tmp_path))


@pytest.mark.parametrize("lost", ["lora_A", "lora_B"])
def test_half_of_a_layer_is_refused_by_name(lost, tmp_path):
    write(peft_form(BERT, "lora"), tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    state.pop(f"base_model.model.bert.encoder.layer.1.attention.self.value.{lost}.weight")
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with check_refused("encoder.layer.1.attention.self.value"):
        read_peft_adapter(str(tmp_path))


@pytest.mark.parametrize("kind", ["lora", "vera"])
def test_head_of_another_number_of_labels_is_refused_by_name(kind, tmp_path):
    write(peft_form(BERT, kind), tmp_path)
    start = read_peft_adapter(str(tmp_path))
    with check_refused(r"classifier.bias has shape \(3,\).*\(4,\)"):
        attach(BERT.make(labels=4), start.settings, 0, start)


@pytest.mark.parametrize("other", ["roberta", "gpt2"])
def test_layer_that_the_model_lacks_is_refused_by_name(other, tmp_path):
    write(peft_form(BERT, "lora"), tmp_path)
    start = read_peft_adapter(str(tmp_path))
    with check_refused("bert.encoder.layer.0.attention.self.query"):
        attach(FAMILIES[other].make(), start.settings, 0, start)


def test_adapter_on_the_head_is_refused_by_name(tmp_path):
    config = LoraConfig(r=5, target_modules=["classifier", "value"])
    write(config, tmp_path)
    start = read_peft_adapter(str(tmp_path))
    with check_refused("classifier"):
        attach(BERT.make(), start.settings, 0, start)


def test_factors_of_vera_for_a_smaller_model_are_refused(tmp_path):
    """d and b would fit: the widths of a VeRA are in its frozen factors alone."""
    write(peft_form(BERT, "vera"), tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    state["base_model.vera_A"] = state["base_model.vera_A"][:, :31].contiguous()
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    start = read_peft_adapter(str(tmp_path))
    with check_refused(r"vera_A has shape \(5, 31\).*\(5, 32\)"):
        attach(BERT.make(), start.settings, 0, start)


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x80\x02."])
def test_damaged_weights_of_the_older_format_are_refused(content, tmp_path):
    write(peft_form(BERT, "lora"), tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(content)
    with check_refused("cannot read"):
        read_peft_adapter(str(tmp_path))
