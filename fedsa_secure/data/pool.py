"""The pool: the rows that are to be divided, in one form whatever they came from."""

from dataclasses import dataclass

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict

from fedsa_secure.config import TrainConfig
from fedsa_secure.data.lexicon import NAME
from fedsa_secure.data.sources import open_dataset
from fedsa_secure.errors import ConfigError, did_you_mean
from fedsa_secure.streams import numpy_stream

# The column conventions of GLUE and of common text data sets, most specific first.
_TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)
_COMMON_SPLITS = ("validation", "validation_matched", "test")


@dataclass(frozen=True)
class Pool:
    """Rows with texts, labels and groups.

    Args:
        rows: the data set itself, with all its columns; partitioners may look at any of them.
        texts: columns that hold the text, one or two.
        labels: class of each row, in [0, classes). [row]
        groups: value of the group column of each row, or None. [row]
        label_names: name of each class.
    """

    rows: Dataset
    texts: tuple[str, ...]
    labels: np.ndarray
    groups: np.ndarray | None
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)


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
    return Pool(
        common.rows.select(kept), common.texts, common.labels[kept], None, common.label_names
    )


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
    texts = _text_columns(rows, config)
    for column in texts:
        empty = [row for row, text in enumerate(rows[column]) if not isinstance(text, str)]
        if empty:
            raise ConfigError(
                "text_column",
                f"column {column!r} has no text in {len(empty)} rows, first in row {empty[0]}",
                "leave those rows out, or name another column",
            )
    label_column = config.label_column or "label"
    _require(rows, "label_column", label_column)
    labels, label_names = _labels(rows, label_column, names)
    if names is None and len(set(labels.tolist())) < 2:
        raise ConfigError(
            "label_column", f"all rows have the same {label_column!r}", "name another column"
        )
    groups = None
    if group_column is not None:
        _require(rows, "group_column", group_column)
        groups = np.asarray([str(value) for value in rows[group_column]])
    return Pool(rows, texts, labels, groups, label_names)


def _text_columns(rows: Dataset, config: TrainConfig) -> tuple[str, ...]:
    if config.text_column is not None:
        for column in config.text_column:
            _require(rows, "text_column", column)
        return config.text_column
    for columns in _TEXTS:
        if all(column in rows.column_names for column in columns):
            return columns
    raise ConfigError(
        "text_column",
        f"cannot tell which of the columns holds the text: {', '.join(rows.column_names)}",
        "name it, or two of them for a sentence pair",
    )


def _require(rows: Dataset, option: str, column: str) -> None:
    if column not in rows.column_names:
        raise ConfigError(
            option,
            f"the data set has no column {column!r}",
            did_you_mean(column, rows.column_names),
        )


def _labels(
    rows: Dataset, column: str, names: tuple[str, ...] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Classes and their names. Without declared names, the sorted distinct values are the names."""
    feature, values = rows.features[column], rows[column][:]
    if any(value is None for value in values):
        raise ConfigError("label_column", f"column {column!r} has empty labels", "leave them out")
    if isinstance(feature, ClassLabel):
        if min(values) < 0:
            raise ConfigError(
                "label_column", f"column {column!r} has hidden labels (-1)", "choose another split"
            )
        if names is None or names == tuple(feature.names):
            return np.asarray(values, dtype=np.int64), tuple(feature.names)
        values = [feature.names[value] for value in values]  # declared in another order
    if not isinstance(values[0], str | int | float):
        raise ConfigError(
            "label_column", f"column {column!r} holds no labels", "name a column of classes"
        )
    if isinstance(values[0], float):
        raise ConfigError(
            "label_column", f"column {column!r} holds real numbers, not classes", "name another"
        )
    distinct = sorted(set(values))
    if names is None:
        names = tuple(str(value) for value in distinct)
    place = {name: k for k, name in enumerate(names)}
    unknown = [value for value in distinct if str(value) not in place]
    if unknown:
        raise ConfigError(
            "label_column",
            f"label {str(unknown[0])!r} occurs only in the common test split",
            "leave those rows out, set another common_split, or set common_rows=0",
        )
    return np.asarray([place[str(value)] for value in values], dtype=np.int64), names
