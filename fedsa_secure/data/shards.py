"""A client's own train and test part, split off its own rows."""

import hmac
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import StratifiedShuffleSplit

from fedsa_secure.data.pool import Pool
from fedsa_secure.errors import ConfigError
from fedsa_secure.streams import numpy_stream


@dataclass(frozen=True)
class Shard:
    """Rows of one client, as indices into the pool. train [n], test [m]"""

    train: np.ndarray
    test: np.ndarray


def split_shard(pool: Pool, rows: np.ndarray, client: int, fraction: float, seed: int) -> Shard:
    """Split a client's rows, stratified by class.

    A class with fewer than two rows stays in train, so the client never is tested on a class that
    it has not seen.

    Args:
        pool: what the rows point into.
        rows: the client's rows.
        client: its number; the split depends on it and the seed alone.
        fraction: share of the rows for the test.
        seed: root seed.

    Raises:
        ConfigError: if no row can be spared for the test.
    """
    labels = pool.labels[rows]
    classes, counts = np.unique(labels, return_counts=True)
    single = np.isin(labels, classes[counts < 2])
    splittable, kept = rows[~single], rows[single]
    size = max(round(len(splittable) * fraction), 1)
    strata = len(classes) - int((counts < 2).sum())
    stream = numpy_stream(seed, "train/test", client)
    if strata == 0 or len(splittable) < 2:
        raise _no_test(client, len(rows))
    own = pool.labels[splittable]
    train, test = _few(own, size, stream)
    if strata <= size <= len(splittable) - strata:
        splitter = StratifiedShuffleSplit(
            n_splits=1, test_size=size, random_state=int(stream.integers(2**31))
        )
        stratified = next(splitter.split(splittable, own))
        # With few rows of a class, rounding can put all of them to the test.
        if len(np.unique(own[stratified[0]])) == strata:
            train, test = stratified
    return Shard(np.sort(np.concatenate([splittable[train], kept])), np.sort(splittable[test]))


def _few(
    labels: np.ndarray, size: int, stream: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A test part of at most size rows that leaves one row of every class in train."""
    order = stream.permutation(len(labels))
    first = {int(labels[i]): int(i) for i in order[::-1]}
    spare = [int(i) for i in order if first[int(labels[i])] != i]
    test = np.asarray(spare[:size], dtype=np.int64)
    return np.setdiff1d(np.arange(len(labels)), test), test


def split_shard_by_group(
    pool: Pool, rows: np.ndarray, client: int, sides: np.ndarray
) -> tuple[Shard, int]:
    """Split a client's rows by the side their group is on, which is the same for all clients.

    Test rows of a class that the client has no train row of are left out: their group may not go
    to train, and the client cannot be tested on a class that it has not seen.

    Args:
        pool: what the rows point into.
        rows: the client's rows.
        client: its number, for the error.
        sides: True where a row's group is on the test side. [row of the pool]

    Returns:
        The shard, and how many rows were left out.

    Raises:
        ConfigError: if one of the two parts would be empty.
    """
    train, test = rows[~sides[rows]], rows[sides[rows]]
    known = np.isin(pool.labels[test], pool.labels[train])
    if len(train) == 0 or not known.any():
        raise _no_test(client, len(rows))
    return Shard(train, test[known]), int((~known).sum())


def choose_groups(groups: np.ndarray, fraction: float, seed: int, purpose: str) -> np.ndarray:
    """Choose whole groups until they hold this share of the rows.

    Returns:
        True for the rows of the chosen groups. [row]
    """
    names, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = numpy_stream(seed, purpose).permutation(len(names))
    before = np.cumsum(counts[order]) - counts[order]
    chosen = np.zeros(len(names), dtype=bool)
    chosen[order[before < fraction * len(groups)]] = True
    return np.asarray(chosen[inverse])


def split_shard_privately(
    rows: np.ndarray, client: int, key: bytes, fraction: float, groups: np.ndarray | None = None
) -> Shard:
    """Split a client's rows by HMAC-SHA256 of the row's place, or of its group, under a secret key.

    A row's side depends on its own place in the shard (or its own group's name) and on nothing
    else: no permutation, no class counts. So a record that is changed, or replaced by a null record
    in its place, moves no other record, which the adjacency of differential privacy needs. What a
    row says is not looked at, and test rows of a class that has no train row stay.

    Assumption: HMAC-SHA256 is a pseudo-random function and the key is secret; under a key that an
    attacker knows the sides are known, too. A null record keeps its group.

    Args:
        rows: the client's rows, as indices into the pool, in the client's own order. [row]
        client: its number.
        key: 32 secret bytes. With groups it has to be the same for all clients, so that a group is
            on the same side everywhere.
        fraction: probability of a row, or of a group, to be in the test.
        groups: name of the group of each row of the pool, or None. [row of the pool]

    Raises:
        ConfigError: if one of the two parts would be empty.
    """
    if groups is None:
        names = [f"row:{client}:{place}" for place in range(len(rows))]
    else:
        names = [f"group:{group}" for group in groups[rows]]
    test = np.asarray([_is_test(key, name, fraction) for name in names], dtype=bool)
    if test.all() or not test.any():
        raise _no_test(client, len(rows))
    return Shard(rows[~test], rows[test])


def _is_test(key: bytes, name: str, fraction: float) -> bool:
    digest = hmac.digest(key, name.encode("utf-8", "surrogatepass"), "sha256")
    return int.from_bytes(digest[:8], "big") < int(fraction * 2**64)


def _no_test(client: int, rows: int) -> ConfigError:
    return ConfigError(
        "test_fraction",
        f"client {client} has {rows} rows, which do not give it a train and a test part",
        "take fewer clients, more rows, or another partition",
    )
