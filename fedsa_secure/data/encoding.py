"""Tokenize texts once; rows keep their own length."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsa_secure.data.pool import Pool

IGNORED = -100
"""Label of a token that is not to be predicted."""


@dataclass(frozen=True)
class EncodedRows:
    """Token rows of unequal length.

    Args:
        columns: for each input of the model its rows of int64 values, such as input_ids. For
            generation also ``labels``: the token that each position has to predict, or IGNORED.
        labels: class of each row; all 0 for generation. [row]
        pad: value that fills each column.
        prompts: for generation the tokens that an answer is to follow.
        answers: for generation the texts that the answers are compared with.
    """

    columns: dict[str, list[np.ndarray]]
    labels: np.ndarray
    pad: dict[str, int]
    prompts: list[np.ndarray] | None = None
    answers: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def lengths(self) -> np.ndarray:
        """Tokens of each row that go into the model. [row]"""
        counted = [self.columns[n] for n in ("input_ids", "decoder_input_ids") if n in self.columns]
        return np.asarray(np.sum([[len(ids) for ids in column] for column in counted], axis=0))


def encode(pool: Pool, tokenizer: Any, max_length: int) -> EncodedRows:
    """Tokenize all rows of a pool for classification, sentence pairs as pairs."""
    texts = [pool.texts_of(column) for column in pool.texts]
    return encode_texts(texts, tokenizer, max_length, pool.labels)


def encode_texts(
    texts: list[list[str]], tokenizer: Any, max_length: int, labels: np.ndarray | None = None
) -> EncodedRows:
    """Tokenize one list of texts, or two lists for pairs.

    Args:
        texts: one or two lists of equal length.
        tokenizer: a transformers tokenizer.
        max_length: in tokens; longer rows are cut.
        labels: class of each row; all 0 where None. [row]
    """
    made = tokenizer(*texts, truncation=True, max_length=max_length, return_attention_mask=True)
    columns = {
        name: [np.asarray(row, dtype=np.int64) for row in rows] for name, rows in made.items()
    }
    if labels is None:
        labels = np.zeros(len(texts[0]), dtype=np.int64)
    return EncodedRows(columns, labels, padding(columns, tokenizer))


def padding(columns: dict[str, list[np.ndarray]], tokenizer: Any) -> dict[str, int]:
    """What fills each column. Models without a token for it take the one that ends a text."""
    token = pad_token(tokenizer)
    own = {"input_ids": token, "decoder_input_ids": token, "labels": IGNORED}
    return {name: own.get(name, 0) for name in columns}


def pad_token(tokenizer: Any) -> int:
    """What fills token rows; a model that looks for its last token has to know it."""
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id or 0)
