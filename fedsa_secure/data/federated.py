"""The data of a whole run: everyone's shard, encoded, and the common test."""

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from flwr_datasets.partitioner import Partitioner

from fedsa_secure.config import TrainConfig
from fedsa_secure.data.encoding import EncodedRows, encode
from fedsa_secure.data.partition import partition
from fedsa_secure.data.pool import Pool, load_pool
from fedsa_secure.data.shards import Shard, choose_groups, split_shard, split_shard_by_group
from fedsa_secure.streams import numpy_stream

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FederatedData:
    """Everything that training and evaluation read.

    Args:
        rows: all encoded rows of the pool.
        shards: each client's own rows, as indices into ``rows``.
        common: the class-balanced test on which all personal models are compared, or None.
        label_names: name of each class.
        fingerprint: changes with any text, label or assignment; a resumed run compares it.
    """

    rows: EncodedRows
    shards: list[Shard]
    common: EncodedRows | None
    label_names: tuple[str, ...]
    fingerprint: str


@dataclass(frozen=True)
class Division:
    """A pool divided over clients, not yet tokenized.

    Args:
        pool: the rows that the shards point into.
        shards: each client's own rows.
        common: rows of the common test, or None.
    """

    pool: Pool
    shards: list[Shard]
    common: Pool | None

    @property
    def label_names(self) -> tuple[str, ...]:
        """Name of each class."""
        return self.pool.label_names


def divide(
    source: str | Dataset | DatasetDict, spec: str | Partitioner, config: TrainConfig
) -> Division:
    """Read a data set, set the common test aside and divide the rest over the clients.

    Raises:
        ConfigError: if columns, labels or the partition do not fit (see ``load_pool``,
            ``partition``, ``split_shard``).
    """
    pool, common = load_pool(source, config)
    if common is None:
        pool, common = _hold_out(pool, config)
    else:
        common = _balanced(common, config)
    assigned = partition(pool, spec, config.clients, config.seed)
    if pool.groups is None:
        shards = [
            split_shard(pool, rows, k, config.test_fraction, config.seed)
            for k, rows in enumerate(assigned)
        ]
    else:
        shards = _split_by_group(pool, pool.groups, assigned, config)
    return Division(pool, shards, common)


def encode_division(division: Division, tokenizer: Any, max_length: int) -> FederatedData:
    """Tokenize a division."""
    pool = division.pool
    rows = encode(pool, tokenizer, max_length)
    common = None
    if division.common is not None:
        common = encode(division.common, tokenizer, max_length)
    return FederatedData(
        rows=rows,
        shards=division.shards,
        common=common,
        label_names=pool.label_names,
        fingerprint=_fingerprint(rows, division.shards, pool.label_names, common),
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
    common = _balanced(_select(pool, np.flatnonzero(held)), config)
    left_out = int(held.sum()) - len(common or ())
    if left_out:
        _log.info("%d rows left out: their groups are those of the common test", left_out)
    return _select(pool, np.flatnonzero(~held)), common


def _balanced(pool: Pool, config: TrainConfig) -> Pool | None:
    rows = _balanced_rows(pool.labels, config.common_rows, config.seed)
    return _select(pool, rows) if len(rows) else None


def _balanced_rows(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """At most size rows, the same number of every class that occurs."""
    classes, counts = np.unique(labels, return_counts=True)
    each = min(size // len(classes), int(counts.min()))
    stream = numpy_stream(seed, "common rows")
    picked = [stream.permutation(np.flatnonzero(labels == k))[:each] for k in classes]
    return np.sort(np.concatenate(picked))


def _select(pool: Pool, rows: np.ndarray) -> Pool:
    return Pool(
        pool.rows.select(rows),
        pool.texts,
        pool.labels[rows],
        None if pool.groups is None else pool.groups[rows],
        pool.label_names,
    )


def _fingerprint(
    rows: EncodedRows, shards: list[Shard], names: tuple[str, ...], common: EncodedRows | None
) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update("\x1f".join(names).encode())
    for part in (rows, common):
        if part is not None:
            digest.update(part.labels.tobytes())
            for ids in part.columns["input_ids"]:
                digest.update(ids.tobytes() + b"|")
    for shard in shards:
        digest.update(shard.train.tobytes() + b"|" + shard.test.tobytes() + b"||")
    return digest.hexdigest()
