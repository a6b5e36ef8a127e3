"""Our modules against PEFT: logits, every gradient, and the folders that PEFT reads."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
)

from fedsa_secure.adapters import (
    AdaptedModel,
    AdapterSettings,
    attach,
    peft_config,
    peft_state,
    save_peft_adapter,
)
from fedsa_secure.types import NamedTensors, Role

SETTINGS = AdapterSettings(rank=5, alpha=12.0)


@pytest.fixture(params=["bert", "roberta"])
def make_base(request: pytest.FixtureRequest, tiny_bert, tiny_roberta):
    """A factory that makes the same random model each time."""
    return {"bert": tiny_bert, "roberta": tiny_roberta}[request.param]


@pytest.fixture
def batch(tiny_tokenizer, small_dataset) -> tuple[dict[str, Tensor], Tensor]:
    rows = small_dataset(rows=7)
    inputs = tiny_tokenizer(list(rows["text"]), padding=True, return_tensors="pt")
    return dict(inputs), torch.tensor(rows["label"])


def random_client(adapted: AdaptedModel, seed: int) -> NamedTensors:
    """Values for A, B and the head that are all different from the public start."""
    stream = torch.Generator().manual_seed(seed)
    return {
        name: start + 0.2 * torch.randn(start.shape, generator=stream)
        for name, start in adapted.initial.items()
    }


def with_peft(base: nn.Module, adapted: AdaptedModel, client: NamedTensors) -> PeftModel:
    """A trainable PeftModel with a client's values, not by way of a folder."""
    config = peft_config(adapted, "tiny")
    config.inference_mode, config.base_model_name_or_path = False, None
    model = get_peft_model(base, config)
    result = set_peft_model_state_dict(model, peft_state(adapted, client))
    assert not result.unexpected_keys
    return model.eval()


def peft_gradients(model: PeftModel) -> dict[str, Tensor]:
    """Gradients under our names."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            ours = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            for factor in "AB":
                ours = ours.replace(f".lora_{factor}.default.weight", f".{factor}")
            found[ours] = parameter.grad
    return found


def test_logits_and_all_gradients_equal_those_of_peft(make_base, batch):
    inputs, labels = batch
    adapted = attach(make_base(), SETTINGS, seed=0)
    client = random_client(adapted, seed=1)
    theirs = with_peft(make_base(), adapted, client)
    adapted.load([client], trained=set(Role))

    expected = theirs(**inputs).logits
    actual = adapted(inputs)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)

    functional.cross_entropy(expected, labels).backward()
    functional.cross_entropy(actual, labels).backward()
    expected_gradients = peft_gradients(theirs)
    ours = adapted.parameters(set(Role))
    assert expected_gradients.keys() == ours.keys()
    for name, parameter in ours.items():
        assert expected_gradients[name].abs().max() > 1e-4, f"{name}: nothing to compare"
        torch.testing.assert_close(
            parameter.grad[0], expected_gradients[name], atol=1e-5, rtol=1e-5, msg=name
        )


def test_every_saved_client_gives_the_same_logits_in_peft(make_base, batch, tmp_path):
    inputs, _ = batch
    adapted = attach(make_base(), SETTINGS, seed=0)
    clients = [random_client(adapted, seed) for seed in (1, 2, 3)]
    seen = []
    for k, client in enumerate(clients):
        save_peft_adapter(adapted, client, tmp_path / str(k), base_model="tiny")
        adapted.load([client], trained=())
        theirs = PeftModel.from_pretrained(make_base(), tmp_path / str(k)).eval()
        expected = theirs(**inputs).logits
        torch.testing.assert_close(adapted(inputs), expected, atol=1e-5, rtol=1e-5)
        seen.append(expected)
    assert (seen[0] - seen[1]).abs().max() > 1e-2


def test_what_a_client_lacks_is_saved_at_its_public_start(make_base, batch, tmp_path):
    inputs, _ = batch
    adapted = attach(make_base(), SETTINGS, seed=0)
    client = random_client(adapted, seed=1)
    only_b = {name: client[name] for name in adapted.names([Role.B])}
    save_peft_adapter(adapted, only_b, tmp_path, base_model="tiny")
    adapted.load([only_b], trained=())
    theirs = PeftModel.from_pretrained(make_base(), tmp_path).eval()
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


@pytest.mark.parametrize("architecture", ["bert", "roberta", "electra"])
def test_default_targets_are_those_of_peft(architecture, tiny_bert, tiny_roberta):
    make = {"bert": tiny_bert, "roberta": tiny_roberta, "electra": make_electra}[architecture]
    theirs = get_peft_model(make(), LoraConfig(task_type=TaskType.SEQ_CLS))
    ours = attach(make(), SETTINGS, seed=0)
    adapted_paths = {name.removesuffix(".A") for name in ours.names([Role.A])}
    assert adapted_paths == set(theirs.targeted_module_names)


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
