"""The data of a whole run: everyone's shard, encoded, and the common test."""

import hashlib
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from flwr_datasets.partitioner import Partitioner

from fedsa_secure.config import TrainConfig
from fedsa_secure.data.dialogue import PromptForm, encode_answers
from fedsa_secure.data.encoding import EncodedRows, encode
from fedsa_secure.data.partition import DRAWS, partition
from fedsa_secure.data.pool import Pool, load_pool
from fedsa_secure.data.shards import (
    Shard,
    choose_groups,
    split_shard,
    split_shard_by_group,
    split_shard_privately,
)
from fedsa_secure.errors import ConfigError
from fedsa_secure.streams import numpy_stream

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FederatedData:
    """Everything that training and evaluation read.

    Args:
        rows: all encoded rows of the pool.
        shards: each client's own rows, as indices into ``rows``.
        common: the class-balanced test on which all personal models are compared, or None.
        label_names: name of each class; empty for generation without classes.
        fingerprint: changes with any text, label or assignment; a resumed run compares it.
        tokenizer: reads what a model writes.
    """

    rows: EncodedRows
    shards: list[Shard]
    common: EncodedRows | None
    label_names: tuple[str, ...]
    fingerprint: str
    tokenizer: Any

    @property
    def generation(self) -> bool:
        """Whether answers are written and not classes told."""
        return self.rows.answers is not None


@dataclass(frozen=True)
class Division:
    """A pool divided over clients, not yet tokenized.

    Args:
        pool: the rows that the shards point into.
        shards: each client's own rows.
        common: rows of the common test, or None.
        spec: the partition that was chosen.
    """

    pool: Pool
    shards: list[Shard]
    common: Pool | None
    spec: str | Partitioner

    @property
    def generation(self) -> bool:
        """Whether answers are to be written and not classes to be told."""
        return self.pool.answer is not None

    @property
    def label_names(self) -> tuple[str, ...]:
        """Name of each class."""
        return self.pool.label_names


def divide(
    source: str | Dataset | DatasetDict,
    spec: str | Partitioner,
    config: TrainConfig,
    split_key: bytes | None = None,
) -> Division:
    """Read a data set, set the common test aside and divide the rest over the clients.

    The division itself stands for clients who have their rows already: it is simulation, and looks
    at all data. What differential privacy promises begins at a client's shard.

    Args:
        source: hub id, path, data set object, or ``"lexicon"``.
        spec: how to divide (see ``partition``).
        config: the options.
        split_key: with ``dp_epsilon`` the secret that splits train from test
            (see ``split_shard_privately``); not read without.

    Raises:
        ValueError: if ``dp_epsilon`` is set and there is no key.
        ConfigError: if columns, labels or the partition do not fit (see ``load_pool``,
            ``partition``, ``split_shard``).
    """
    if config.dp_epsilon is None:
        split_key = None
    elif split_key is None:
        raise ValueError("a private run splits train from test by a secret key")
    pool, common = load_pool(source, config)
    if common is None:
        pool, common = _hold_out(pool, config)
    else:
        common = _balanced(common, config)
    if spec == "auto":
        spec = "dirichlet:0.5" if pool.label_names else "iid"
    return Division(pool, _divided(pool, spec, config, split_key), common, spec)


def _divided(
    pool: Pool, spec: str | Partitioner, config: TrainConfig, key: bytes | None
) -> list[Shard]:
    """Everybody's shard. A draw that leaves a client without a test part is drawn again.

    Skewed draws over many clients often do; refusing them would leave strong skew to large data.

    Raises:
        ConfigError: of the last draw, if none will do.
    """
    draws = DRAWS if isinstance(spec, str) and spec.startswith("dirichlet") else 1
    for draw in range(draws):
        try:
            assigned = partition(pool, spec, config, draw)
            shards = _split(pool, assigned, config, key)
        except ConfigError as error:
            if draw == draws - 1 or error.option not in ("partition", "test_fraction"):
                raise
            continue
        if draw:
            _log.info("the partition was drawn %d times", draw + 1)
        return shards
    raise AssertionError("a loop over at least one draw ends inside it")


def _split(
    pool: Pool, assigned: list[np.ndarray], config: TrainConfig, key: bytes | None
) -> list[Shard]:
    if key is not None:
        fraction = config.test_fraction
        return [
            split_shard_privately(rows, k, key, fraction, pool.groups)
            for k, rows in enumerate(assigned)
        ]
    if pool.groups is not None:
        return _split_by_group(pool, pool.groups, assigned, config)
    return [
        split_shard(pool, rows, k, config.test_fraction, config.seed)
        for k, rows in enumerate(assigned)
    ]


def encode_division(
    division: Division, tokenizer: Any, config: TrainConfig, decoder_start: int | None = None
) -> FederatedData:
    """Tokenize a division.

    Args:
        division: what is to be tokenized.
        tokenizer: that of the model.
        config: longest sequence and form of the prompts.
        decoder_start: for generation the first token of an encoder-decoder model's decoder.
    """
    if division.generation:
        form = PromptForm(tokenizer, config.prompt_template, decoder_start)
        make = partial(encode_answers, form=form, max_length=config.max_length)
    else:
        make = partial(encode, tokenizer=tokenizer, max_length=config.max_length)
    pool = division.pool
    rows = make(pool)
    common = None if division.common is None else make(division.common)
    return FederatedData(
        rows=rows,
        shards=division.shards,
        common=common,
        label_names=pool.label_names,
        fingerprint=_fingerprint(rows, division.shards, pool.label_names, common),
        tokenizer=tokenizer,
    )


def _split_by_group(
    pool: Pool, groups: np.ndarray, assigned: list[np.ndarray], config: TrainConfig
) -> list[Shard]:
    sides = choose_groups(groups, config.test_fraction, config.seed, "test groups")
    split = [split_shard_by_group(pool, rows, k, sides) for k, rows in enumerate(assigned)]
    left_out = sum(count for _, count in split)
    if left_out:
        _log.info("%d test rows left out: their client has no train row of the class", left_out)
    return [shard for shard, _ in split]


def _hold_out(pool: Pool, config: TrainConfig) -> tuple[Pool, Pool | None]:
    """Take the common test out of the pool, by whole groups where there are groups.

    At most a tenth of the rows, so that little data stays with the clients.
    """
    size = min(config.common_rows, len(pool) // 10)
    if size < len(set(pool.labels.tolist())):
        return pool, None
    if pool.groups is None:
        held = np.isin(np.arange(len(pool)), _balanced_rows(pool.labels, size, config.seed))
    else:
        held = choose_groups(pool.groups, size / len(pool), config.seed, "common groups")
    if len(np.unique(pool.labels[held])) < len(np.unique(pool.labels)):
        return pool, None  # the chosen groups lack a class
    common = _balanced(pool.select(np.flatnonzero(held)), config)
    left_out = int(held.sum()) - len(common or ())
    if left_out:
        _log.info("%d rows left out: their groups are those of the common test", left_out)
    return pool.select(np.flatnonzero(~held)), common


def _balanced(pool: Pool, config: TrainConfig) -> Pool | None:
    rows = _balanced_rows(pool.labels, config.common_rows, config.seed)
    return pool.select(rows) if len(rows) else None


def _balanced_rows(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """At most size rows, the same number of every class that occurs."""
    classes, counts = np.unique(labels, return_counts=True)
    each = min(size // len(classes), int(counts.min()))
    stream = numpy_stream(seed, "common rows")
    picked = [stream.permutation(np.flatnonzero(labels == k))[:each] for k in classes]
    return np.sort(np.concatenate(picked))


def _fingerprint(
    rows: EncodedRows, shards: list[Shard], names: tuple[str, ...], common: EncodedRows | None
) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update("\x1f".join(names).encode())
    for part in (rows, common):
        if part is not None:
            digest.update(part.labels.tobytes())
            for name in ("input_ids", "labels"):
                for values in part.columns.get(name, ()):
                    digest.update(values.tobytes() + b"|")
    for shard in shards:
        digest.update(shard.train.tobytes() + b"|" + shard.test.tobytes() + b"||")
    return digest.hexdigest()
