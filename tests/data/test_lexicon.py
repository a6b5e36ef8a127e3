"""The embedded sentiment lexicon."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

from fedsa_secure.config import TrainConfig
from fedsa_secure.data import load_pool
from fedsa_secure.data.lexicon import load_lexicon
from fedsa_secure.errors import MissingExtraError


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return load_lexicon()


def ratings() -> list[tuple[str, float]]:
    """The file, read another way: by the mean of the ten raters instead of its own mean."""
    origin = importlib.util.find_spec("vaderSentiment").origin
    rows = []
    with Path(origin).with_name("vader_lexicon.txt").open(encoding="utf-8") as file:
        for line in file:
            text, _mean, _deviation, raters = line.rstrip("\n").split("\t")
            votes = [int(vote) for vote in raters.strip(" []").split(",")]
            rows.append((text.strip(), sum(votes) / len(votes)))
    return rows


def test_label_is_the_sign_of_the_raters_mean(rows):
    names = rows.features["label"].names
    assert names == ["negative", "positive"]
    expected = Counter(
        (text, "positive" if mean > 0 else "negative") for text, mean in ratings() if mean != 0
    )
    found = Counter((row["text"], names[row["label"]]) for row in rows)
    differing = (expected - found) + (found - expected)
    assert sum(found.values()) > 7000
    assert sum(differing.values()) <= 0.01 * len(rows), differing


@pytest.mark.parametrize(
    ("word", "label"), [("good", 1), ("happy", 1), ("foolish", 0), ("terrible", 0)]
)
def test_known_words_have_their_label(rows, word, label):
    assert [row["label"] for row in rows if row["text"] == word] == [label]


def test_words_of_one_stem_share_their_group(rows):
    stems = {row["text"]: row["stem"] for row in rows}
    assert stems["foolish"] == stems["foolishly"] == stems["foolishness"] == "fool"
    assert stems["lol"] == "lol"
    assert stems["happy"] != stems["hardy"]


def test_the_lexicon_is_grouped_by_stem_without_being_asked():
    pool, common = load_pool("lexicon", TrainConfig())
    assert pool.texts == ("text",)
    assert pool.groups.tolist() == list(pool.rows["stem"])
    assert common is None


def test_lexicon_that_is_not_installed_names_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"vaderSentiment.*fedsa-secure\[demo\]"):
        load_lexicon()
