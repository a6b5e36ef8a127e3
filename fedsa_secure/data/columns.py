"""Which columns hold the texts, the answers and the labels."""

import numpy as np
from datasets import ClassLabel, Dataset

from fedsa_secure.config import TrainConfig
from fedsa_secure.errors import ConfigError, did_you_mean

# The column conventions of GLUE and of common text data sets, most specific first.
_TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)
# Prompt and answer, as in GSM8K and in common instruction data sets.
_ANSWERS = (
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
)
MESSAGES = "messages"
"""Column of chats: a list of {"role", "content"} per row, of which the last is the answer."""


def is_generation(rows: Dataset, config: TrainConfig) -> bool:
    """Whether answers are to be written and not classes to be told."""
    if config.task != "auto":
        return config.task == "generation"
    names = set(rows.column_names)
    if config.answer_column is not None:
        return True
    if config.label_column is not None or "label" in names:
        return False
    return MESSAGES in names or any(names.issuperset(pair) for pair in _ANSWERS)


def answer_columns(rows: Dataset, config: TrainConfig) -> tuple[str, str]:
    """Columns of the prompt and of the answer; both are ``messages`` for chats.

    Raises:
        ConfigError: if they cannot be told, or are not there.
    """
    given, answer = config.text_column, config.answer_column
    if given is not None and len(given) > 1:
        raise ConfigError("text_column", "generation takes one column of prompts", "name one")
    known = [pair for pair in _ANSWERS if set(rows.column_names).issuperset(pair)]
    chat = given in (None, (MESSAGES,)) and answer in (None, MESSAGES)
    if chat and MESSAGES in rows.column_names:
        return MESSAGES, MESSAGES
    prompt = given[0] if given else next((p for p, a in known if answer in (None, a)), None)
    answer = answer or next((a for p, a in known if p == prompt), None)
    for option, column in (("text_column", prompt), ("answer_column", answer)):
        if column is None:
            raise ConfigError(
                option,
                "cannot tell which of the columns holds the "
                f"{'prompt' if option == 'text_column' else 'answer'}: "
                f"{', '.join(rows.column_names)}",
                "name it",
            )
        require(rows, option, column)
    return str(prompt), str(answer)


def text_columns(rows: Dataset, config: TrainConfig) -> tuple[str, ...]:
    """Columns of the text to classify, one or two.

    Raises:
        ConfigError: if they cannot be told, or are not there.
    """
    if config.text_column is not None:
        for column in config.text_column:
            require(rows, "text_column", column)
        return config.text_column
    for columns in _TEXTS:
        if all(column in rows.column_names for column in columns):
            return columns
    raise ConfigError(
        "text_column",
        f"cannot tell which of the columns holds the text: {', '.join(rows.column_names)}",
        "name it, or two of them for a sentence pair; or set task='generation'",
    )


def require(rows: Dataset, option: str, column: str) -> None:
    """Refuse a column that the data set has not.

    Raises:
        ConfigError: naming the option that asked for it.
    """
    if column not in rows.column_names:
        raise ConfigError(
            option,
            f"the data set has no column {column!r}",
            did_you_mean(column, rows.column_names),
        )


def labels_of(
    rows: Dataset, column: str, names: tuple[str, ...] | None, declared: bool = False
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Classes and their names. Without declared names, the sorted distinct values are the names.

    Args:
        rows: the data set.
        column: that of the labels.
        names: the classes in order, if they are known.
        declared: whether the user declared them. Whole numbers then are places in them, unless one
            of the names is a number.

    Returns:
        Class of each row [row], and the names.

    Raises:
        ConfigError: if the column holds no labels, or one that is not among the names.
    """
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
    _check_classes(column, values[0])
    if declared and names is not None and _are_places(rows, column, names):
        names_by_place = dict(enumerate(names))
        values = [names_by_place.get(value, value) for value in values]
    distinct = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    if names is None:
        names = tuple(str(value) for value in distinct)
    place = {name: k for k, name in enumerate(names)}
    unknown = [value for value in distinct if str(value) not in place]
    if unknown and declared:
        raise ConfigError(
            "label_names",
            f"column {column!r} has the label {str(unknown[0])!r}, which is not among "
            f"{', '.join(names)}",
            "name all classes, or leave those rows out",
        )
    if unknown:
        raise ConfigError(
            "label_column",
            f"label {str(unknown[0])!r} occurs only in the common test split",
            "leave those rows out, set another common_split, or set common_rows=0",
        )
    return np.asarray([place[str(value)] for value in values], dtype=np.int64), names


def _check_classes(column: str, value: object) -> None:
    if not isinstance(value, str | int | float):
        raise ConfigError(
            "label_column", f"column {column!r} holds no labels", "name a column of classes"
        )
    if isinstance(value, float):
        raise ConfigError(
            "label_column", f"column {column!r} holds real numbers, not classes", "name another"
        )


def _are_places(rows: Dataset, column: str, names: tuple[str, ...]) -> bool:
    """Whether labels are places in the names; told from the column's type and not its values."""
    whole = str(getattr(rows.features[column], "dtype", "")).startswith(("int", "uint"))
    numbers = any(name.lstrip("+-").isdigit() for name in names)
    return whole and not numbers and not isinstance(rows.features[column], ClassLabel)
