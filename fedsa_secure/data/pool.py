"""The pool: the rows that are to be divided, in one form whatever they came from."""

from dataclasses import dataclass

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict

from fedsa_secure.config import TrainConfig
from fedsa_secure.data.columns import (
    MESSAGES,
    answer_columns,
    is_generation,
    labels_of,
    require,
    text_columns,
)
from fedsa_secure.data.lexicon import NAME
from fedsa_secure.data.sources import open_dataset
from fedsa_secure.errors import ConfigError, did_you_mean
from fedsa_secure.streams import numpy_stream

_COMMON_SPLITS = ("validation", "validation_matched", "test")


@dataclass(frozen=True)
class Pool:
    """Rows with texts, labels and groups.

    Args:
        rows: the data set itself, with all its columns; partitioners may look at any of them.
        texts: columns that hold the text, one or two; for generation that of the prompt.
        labels: class of each row, in [0, classes); all 0 where there is none. [row]
        groups: value of the group column of each row, or None. [row]
        label_names: name of each class; empty where there is none.
        answer: column of the answers for generation, else None.
    """

    rows: Dataset
    texts: tuple[str, ...]
    labels: np.ndarray
    groups: np.ndarray | None
    label_names: tuple[str, ...]
    answer: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: np.ndarray) -> "Pool":
        """Some of the rows."""
        return Pool(
            self.rows.select(rows),
            self.texts,
            self.labels[rows],
            None if self.groups is None else self.groups[rows],
            self.label_names,
            self.answer,
        )

    def texts_of(self, column: str) -> list[str]:
        """The texts of a column; of chats the last message, which is the answer."""
        values = self.rows[column]
        return [str(v[-1]["content"]) if column == MESSAGES else str(v) for v in values]

    def lengths(self) -> np.ndarray:
        """Characters of each row's answer, or of its text where there is none. [row]"""
        columns = self.texts if self.answer is None else (self.answer,)
        counts = [[len(text) for text in self.texts_of(c)] for c in columns]
        return np.asarray(np.sum(counts, axis=0))


def load_pool(source: str | Dataset | DatasetDict, config: TrainConfig) -> tuple[Pool, Pool | None]:
    """The pool to divide over the clients, and the split for the common test if there is one.

    Raises:
        ConfigError: naming the option whose split, column or label does not fit.
    """
    splits = open_dataset(source, config.subset)
    if config.split not in splits:
        raise ConfigError(
            "split",
            f"the data set has no split {config.split!r}",
            did_you_mean(config.split, splits),
        )
    group_column = config.group_column
    if isinstance(source, str) and source == NAME and group_column is None:
        group_column = "stem"
    pool = _read(_limited(splits[config.split], config), config, group_column, None)
    common_split = _common_split(splits, config)
    if common_split is None:
        return pool, None
    common = _read(splits[common_split], config, None, pool.label_names)
    if pool.groups is not None and group_column in common.rows.column_names:
        common = _without_groups(common, str(group_column), set(pool.groups.tolist()))
    unseen = set(common.labels.tolist()) - set(pool.labels.tolist())
    if unseen:
        names = ", ".join(repr(pool.label_names[k]) for k in sorted(unseen))
        raise ConfigError(
            "label_column",
            f"label {names} occurs only in split {common_split!r} and not in {config.split!r}",
            "leave those rows out, set another common_split, or set common_rows=0",
        )
    return pool, common


def _without_groups(common: Pool, column: str, known: set[str]) -> Pool:
    """Rows of the common test whose group is not in the pool."""
    kept = [k for k, value in enumerate(common.rows[column]) if str(value) not in known]
    if not kept:
        raise ConfigError(
            "group_column",
            "every group of the common test is also in the data that are trained on",
            "set another common_split, or common_rows=0",
        )
    return common.select(np.asarray(kept))


def _limited(rows: Dataset, config: TrainConfig) -> Dataset:
    """A seeded choice of max_rows rows, in their own order."""
    if config.max_rows is None or config.max_rows >= len(rows):
        return rows
    stream = numpy_stream(config.seed, "max_rows")
    return rows.select(np.sort(stream.permutation(len(rows))[: config.max_rows]))


def _common_split(splits: DatasetDict, config: TrainConfig) -> str | None:
    if config.common_rows == 0:
        return None
    if config.common_split is not None:
        if config.common_split not in splits:
            raise ConfigError(
                "common_split",
                f"the data set has no split {config.common_split!r}",
                did_you_mean(config.common_split, splits),
            )
        if config.common_split == config.split:
            raise ConfigError(
                "common_split",
                f"{config.split!r} is the split that is trained on",
                "set another, or leave it out",
            )
        return config.common_split
    return next((s for s in _COMMON_SPLITS if s in splits and s != config.split), None)


def _read(
    rows: Dataset,
    config: TrainConfig,
    group_column: str | None,
    names: tuple[str, ...] | None,
) -> Pool:
    if len(rows) == 0:
        raise ConfigError("dataset", "the split has no rows", "choose another split")
    generation = is_generation(rows, config)
    answer = None
    if generation:
        prompt, answer = answer_columns(rows, config)
        texts: tuple[str, ...] = (prompt,)
        _check_answers(rows, prompt, answer)
    else:
        texts = text_columns(rows, config)
        _check_texts(rows, "text_column", texts)
    labels, label_names = np.zeros(len(rows), dtype=np.int64), tuple[str, ...]()
    if not generation or config.label_column is not None:
        label_column = config.label_column or "label"
        require(rows, "label_column", label_column)
        declared = config.label_names is not None
        if config.dp_epsilon is not None and not generation:
            _check_declared(rows, label_column, config)
        labels, label_names = labels_of(rows, label_column, names or config.label_names, declared)
        if names is None and not declared and len(set(labels.tolist())) < 2:
            raise ConfigError(
                "label_column", f"all rows have the same {label_column!r}", "name another column"
            )
    groups = None
    if group_column is not None:
        require(rows, "group_column", group_column)
        groups = np.asarray([str(value) for value in rows[group_column]])
    return Pool(rows, texts, labels, groups, label_names, answer)


def _check_declared(rows: Dataset, column: str, config: TrainConfig) -> None:
    """A set of classes that is read off the labels tells of a single record."""
    if config.label_names is None and not isinstance(rows.features[column], ClassLabel):
        raise ConfigError(
            "label_names",
            f"with dp_epsilon the classes have to be declared, and column {column!r} declares none",
            "give them in order, such as label_names='negative,positive'",
        )


def _check_texts(rows: Dataset, option: str, columns: tuple[str, ...]) -> None:
    for column in columns:
        empty = [row for row, text in enumerate(rows[column]) if not isinstance(text, str)]
        if empty:
            raise ConfigError(
                option,
                f"column {column!r} has no text in {len(empty)} rows, first in row {empty[0]}",
                "leave those rows out, or name another column",
            )


def _check_answers(rows: Dataset, prompt: str, answer: str) -> None:
    if prompt != MESSAGES:
        _check_texts(rows, "text_column", (prompt,))
        _check_texts(rows, "answer_column", (answer,))
        return
    for row, chat in enumerate(rows[MESSAGES]):
        if not _is_chat(chat):
            raise ConfigError(
                "dataset",
                f"row {row} of column {MESSAGES!r} is no chat that ends with an answer",
                'give lists of {"role", "content"} of which the last has the role assistant',
            )


def _is_chat(chat: object) -> bool:
    return (
        isinstance(chat, list)
        and len(chat) > 1
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in chat)
        and chat[-1].get("role") == "assistant"
    )
