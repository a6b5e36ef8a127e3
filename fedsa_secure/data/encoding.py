"""Tokenize texts once; rows keep their own length."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsa_secure.data.pool import Pool


@dataclass(frozen=True)
class EncodedRows:
    """Token rows of unequal length.

    Args:
        columns: for each input of the model its rows of int64 values, such as input_ids.
        labels: class of each row. [row]
        pad: value that fills each column.
    """

    columns: dict[str, list[np.ndarray]]
    labels: np.ndarray
    pad: dict[str, int]

    def __len__(self) -> int:
        return len(self.labels)

    def lengths(self) -> np.ndarray:
        """Tokens of each row. [row]"""
        return np.asarray([len(ids) for ids in self.columns["input_ids"]], dtype=np.int64)


def encode(pool: Pool, tokenizer: Any, max_length: int) -> EncodedRows:
    """Tokenize all rows of a pool, sentence pairs as pairs."""
    texts = [[str(text) for text in pool.rows[column]] for column in pool.texts]
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
    pad = dict.fromkeys(columns, 0) | {"input_ids": tokenizer.pad_token_id or 0}
    if labels is None:
        labels = np.zeros(len(texts[0]), dtype=np.int64)
    return EncodedRows(columns, labels, pad)
