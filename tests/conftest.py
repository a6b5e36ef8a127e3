"""Shared fixtures: tiny random models, a tokenizer of made-up words, and a learnable data set."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: no test may reach for a network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Workers that run side by side share the cores: threads that wait for each other spin.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

# The same examples in every run, and no limit on the time of one: the machine may be busy.
settings.register_profile("fedsa", derandomize=True, deadline=None)
settings.load_profile("fedsa")

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = tuple(f"w{k}" for k in range(196))
TINY = {
    "vocab_size": len(SPECIALS) + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.2,  # wide enough for the logits to depend on the words
}

SUITES = {
    "privacy": (
        "tests/privacy/",
        "tests/audit/",
        "/test_private_",
        "/test_distributed_noise",
        "/test_clipped_grad.py",
        "/test_frozen_b",
        "/test_personal_marker",
        "/test_dp",
    ),
    "interpreter": ("_interpreted.py",),
    "aot": ("_aot.py",),
    "protocol": (
        "tests/secagg/test_crash_faults",
        "tests/secagg/test_leakage",
        "tests/secagg/test_secrets_are_fresh",
    ),
}
"""Which tests have a marker and a run of their own in the gate, by place."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker, places in SUITES.items():
            if any(place in item.path.as_posix() for place in places):
                item.add_marker(marker)


ModelFactory = Callable[..., nn.Module]
DatasetFactory = Callable[..., Dataset]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `datasets` writes while reading files goes into a folder of this test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What data sets have spent is counted below a folder of this test, made when it is needed."""
    home = tmp_path_factory.getbasetemp() / "homes" / os.urandom(8).hex()
    monkeypatch.setenv("FEDSA_SECURE_HOME", str(home))


@pytest.fixture(scope="session")
def tiny_bert() -> ModelFactory:
    """`tiny_bert(labels=3, seed=0)`: a random BERT with a classification head."""

    def make(labels: int = 3, seed: int = 0) -> nn.Module:
        config = BertConfig(**TINY, max_position_embeddings=64, num_labels=labels)
        return _seeded(BertForSequenceClassification, config, seed)

    return make


@pytest.fixture
def tiny_roberta() -> ModelFactory:
    """`tiny_roberta(labels=3, seed=0)`: a random RoBERTa, whose head has two linear layers.

    Its padding id is that of `tiny_tokenizer`, so both models take the same inputs.
    """

    def make(labels: int = 3, seed: int = 0) -> nn.Module:
        config = RobertaConfig(
            **TINY, max_position_embeddings=66, num_labels=labels, pad_token_id=0
        )
        return _seeded(RobertaForSequenceClassification, config, seed)

    return make


@pytest.fixture
def tiny_deberta() -> ModelFactory:
    """`tiny_deberta(layers=1)`: its queries and keys also see relative positions."""

    def make(layers: int = 1) -> nn.Module:
        config = DebertaV2Config(
            **{**TINY, "num_hidden_layers": layers, "initializer_range": 0.02},
            max_position_embeddings=64,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            position_biased_input=False,
            num_labels=3,
        )
        return _seeded(DebertaV2ForSequenceClassification, config, 0)

    return make


def _seeded(kind: type[nn.Module], config: object, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts them at zero, which hides mistakes
                nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 … w195 as ids 4 … 199, framed as BERT frames them."""
    words = {word: k for k, word in enumerate(SPECIALS + WORDS)}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, words[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def small_dataset() -> DatasetFactory:
    """`small_dataset(rows=60, classes=3, seed=0, words=(3, 8))`: columns text and label.

    Four words of five belong to the class alone (word k belongs to class k mod classes), so the
    label can be learnt. Classes take turns, so they are balanced; `words` bounds a row's length.
    """

    def make(
        rows: int = 60, classes: int = 3, seed: int = 0, words: Sequence[int] = (3, 8)
    ) -> Dataset:
        stream = np.random.default_rng(seed)
        labels = [row % classes for row in range(rows)]
        return Dataset.from_dict(
            {"text": [_text(stream, k, classes, words) for k in labels], "label": labels},
            features=Features(
                text=Value("string"), label=ClassLabel(names=[f"class{k}" for k in range(classes)])
            ),
        )

    return make


def _text(stream: np.random.Generator, label: int, classes: int, words: Sequence[int]) -> str:
    picked = stream.integers(len(WORDS), size=stream.integers(words[0], words[1] + 1))
    own = picked // classes * classes + label
    of_class = (stream.random(len(picked)) < 0.8) & (own < len(WORDS))
    return " ".join(WORDS[k] for k in np.where(of_class, own, picked))
