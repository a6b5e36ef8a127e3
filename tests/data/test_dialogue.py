"""Prompts and answers as tokens, by hand."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from generation import ANSWER, EOS, PAD, USER, make_tokenizer

from fedsa_secure import TrainConfig
from fedsa_secure.data import (
    IGNORED,
    EncodedRows,
    PromptForm,
    collate,
    divide,
    load_pool,
    pad_prompts,
)
from fedsa_secure.data.dialogue import encode_answers
from fedsa_secure.errors import ConfigError

ROWS = {"question": ["w0 w1", "w2 w3 w4"], "answer": ["w10", "w11 w12"]}


def encoded(rows: dict, form: PromptForm, max_length: int = 32, **options: object) -> EncodedRows:
    pool, _ = load_pool(Dataset.from_dict(rows), TrainConfig(**options))
    return encode_answers(pool, form, max_length)


def lists(rows: list[np.ndarray]) -> list[list[int]]:
    return [row.tolist() for row in rows]


def test_position_predicts_the_next_token_of_the_answer_and_nothing_else():
    rows = encoded(ROWS, PromptForm(make_tokenizer(), "{prompt}"))
    assert lists(rows.columns["input_ids"]) == [[5, 6, 15, EOS], [7, 8, 9, 16, 17, EOS]]
    assert lists(rows.columns["labels"]) == [
        [IGNORED, 15, EOS, IGNORED],
        [IGNORED, IGNORED, 16, 17, EOS, IGNORED],
    ]
    assert lists(rows.prompts) == [[5, 6], [7, 8, 9]]
    assert rows.answers == ROWS["answer"]
    assert rows.lengths().tolist() == [4, 6]


def test_encoder_and_decoder_get_prompt_and_answer_apart():
    rows = encoded(ROWS, PromptForm(make_tokenizer(), "{prompt}", decoder_start=PAD))
    assert lists(rows.columns["input_ids"]) == [[5, 6], [7, 8, 9]]
    assert lists(rows.columns["decoder_input_ids"]) == [[PAD, 15], [PAD, 16, 17]]
    assert lists(rows.columns["labels"]) == [[15, EOS], [16, 17, EOS]]


def test_padding_of_prompt_and_answer_counts_nowhere():
    rows = encoded(ROWS, PromptForm(make_tokenizer(), "{prompt}", decoder_start=PAD))
    batch = collate(rows, [np.asarray([0, 1])], torch.device("cpu"))
    assert batch.labels.tolist() == [[15, EOS, IGNORED], [16, 17, EOS]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[PAD, 15, PAD], [PAD, 16, 17]]


def test_long_answers_lose_their_end():
    rows = encoded(ROWS, PromptForm(make_tokenizer(), "{prompt}"), max_length=4)
    assert lists(rows.columns["input_ids"]) == [[5, 6, 15, EOS], [7, 8, 9, 16]]
    assert lists(rows.columns["labels"])[1] == [IGNORED, IGNORED, 16, IGNORED]


def test_prompts_that_leave_no_room_are_refused():
    with pytest.raises(ConfigError, match=r"max_length: .*1 rows \(first: row 1, 3 tokens\)"):
        encoded(ROWS, PromptForm(make_tokenizer(), "{prompt}"), max_length=3)


def test_template_stands_around_the_prompt():
    rows = encoded(ROWS, PromptForm(make_tokenizer(chat=True), "w90 {prompt} w91"))
    assert lists(rows.prompts) == [[95, 5, 6, 96], [95, 7, 8, 9, 96]]


def test_chat_template_is_the_default_where_there_is_one():
    rows = encoded(ROWS, PromptForm(make_tokenizer(chat=True)))
    assert lists(rows.prompts)[0] == [USER, 5, 6, ANSWER]
    assert lists(encoded(ROWS, PromptForm(make_tokenizer())).prompts)[0] == [5, 6]


def test_chats_learn_their_last_message():
    chat = [
        {"role": "user", "content": "w0"},
        {"role": "assistant", "content": "w1"},
        {"role": "user", "content": "w2"},
        {"role": "assistant", "content": "w3"},
    ]
    rows = encoded({"messages": [chat, chat[:2]]}, PromptForm(make_tokenizer(chat=True)))
    assert lists(rows.prompts) == [[USER, 5, USER, 6, USER, 7, ANSWER], [USER, 5, ANSWER]]
    assert rows.answers == ["w3", "w1"]


@pytest.mark.parametrize(
    "chat",
    [
        [{"role": "user", "content": "w0"}],
        [{"role": "user", "content": "w0"}, {"role": "user", "content": "w1"}],
        [{"role": "user", "content": "w0"}, {"role": "assistant", "content": None}],
    ],
)
def test_chat_without_an_answer_is_refused_by_row(chat):
    good = [{"role": "user", "content": "w0"}, {"role": "assistant", "content": "w1"}]
    with pytest.raises(ConfigError, match="row 1 of column 'messages' is no chat"):
        load_pool(Dataset.from_dict({"messages": [good, chat]}), TrainConfig())


def test_prompt_that_ends_with_the_end_of_a_text_goes_on():
    """Some tokenizers end every text; an answer is to follow."""
    rows = encoded({"question": ["w0 [EOS]"], "answer": ["w1"]}, PromptForm(make_tokenizer()))
    assert lists(rows.columns["input_ids"]) == [[5, 6, EOS]]


def test_tokenizer_without_an_end_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no token that ends an answer"):
        PromptForm(tokenizer)


@pytest.mark.parametrize(
    ("left", "ids", "mask"),
    [(True, [[PAD, PAD, 5], [6, 7, 8]], [0, 0, 1]), (False, [[5, PAD, PAD], [6, 7, 8]], [1, 0, 0])],
)
def test_prompts_are_padded_on_either_side(left, ids, mask):
    padded, seen = pad_prompts([np.asarray([5]), np.asarray([6, 7, 8])], PAD, left)
    assert padded.tolist() == ids
    assert seen.tolist() == [mask, [1, 1, 1]]


@pytest.mark.parametrize("start", [None, PAD])
def test_empty_prompts_are_refused_by_row(start):
    rows = {"question": ["w0", ""], "answer": ["w1", "w1"]}
    with pytest.raises(ConfigError, match="prompts of 1 rows are empty, first of row 1"):
        encoded(rows, PromptForm(make_tokenizer(), "{prompt}", start))


def test_template_that_refuses_a_chat_is_named():
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(ConfigError, match="prompt_template: .* roles user: no system messages"):
        encoded(ROWS, PromptForm(tokenizer))


# --- columns ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "options", "texts", "answer"),
    [
        (("question", "answer"), {}, ("question",), "answer"),
        (("prompt", "response", "score"), {}, ("prompt",), "response"),
        (("a", "b"), {"text_column": ("a",), "answer_column": "b"}, ("a",), "b"),
        (("question", "answer", "b"), {"answer_column": "b", "text_column": "question"}, None, "b"),
        (("text", "label", "answer"), {"task": "classification"}, ("text",), None),
        (("question", "sentence", "answer", "label"), {}, ("question", "sentence"), None),
    ],
)
def test_columns_are_found(columns, options, texts, answer):
    rows = Dataset.from_dict({name: ["w0", "w1"] for name in columns})
    pool, _ = load_pool(rows, TrainConfig(**options))
    assert pool.answer == answer
    assert pool.texts == (texts or ("question",))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"task": "generation"}, "text_column: cannot tell which of the columns holds the prompt"),
        ({"task": "generation", "text_column": "a"}, "answer_column: cannot tell"),
        ({"text_column": "a", "answer_column": "c"}, "answer_column: the data set has no column"),
        ({"text_column": ("a", "b"), "answer_column": "b"}, "generation takes one column"),
    ],
)
def test_columns_that_cannot_be_told_are_refused(options, expected):
    rows = Dataset.from_dict({"a": ["w0", "w1"], "b": ["w0", "w1"]})
    with pytest.raises(ConfigError, match=expected):
        load_pool(rows, TrainConfig(**options))


# --- division --------------------------------------------------------------------------------


def answers_of_length(lengths: list[int]) -> Dataset:
    return Dataset.from_dict(
        {"question": ["w0"] * len(lengths), "answer": ["w" * k for k in lengths]}
    )


def test_length_gives_the_first_client_the_shortest_answers():
    stream = np.random.default_rng(0)
    lengths = stream.permutation(np.arange(1, 61)).tolist()
    config = TrainConfig(clients=4, common_rows=0)
    shards = divide(answers_of_length(lengths), "length", config).shards
    held = [sorted(lengths[row] for row in (*s.train, *s.test)) for s in shards]
    assert held == [list(range(k, k + 15)) for k in (1, 16, 31, 46)]


def test_length_of_a_text_where_there_are_no_answers():
    rows = Dataset.from_dict({"text": ["w" * (40 - k) for k in range(40)], "label": [0, 1] * 20})
    shards = divide(rows, "length", TrainConfig(clients=2, common_rows=0)).shards
    assert min((*shards[0].train, *shards[0].test)) == 20


def test_auto_is_iid_without_labels_and_dirichlet_with_them(small_dataset):
    rows = answers_of_length([3] * 40)
    assert divide(rows, "auto", TrainConfig(clients=2)).spec == "iid"
    labelled = rows.add_column("kind", [0, 1] * 20)
    config = TrainConfig(clients=2, label_column="kind", task="generation")
    assert divide(labelled, "auto", config).spec == "dirichlet:0.5"
    assert divide(small_dataset(200), "auto", TrainConfig(clients=2)).spec == "dirichlet:0.5"


@pytest.mark.parametrize("spec", ["dirichlet:0.5", "pathological:2"])
def test_skew_over_labels_needs_labels(spec):
    with pytest.raises(ConfigError, match="divides by label, and the data have none"):
        divide(answers_of_length([3] * 40), spec, TrainConfig(clients=2))
