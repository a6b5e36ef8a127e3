"""Divide a pool over clients, with the partitioners of ``flwr-datasets``."""

import copy

import numpy as np
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    Partitioner,
    PathologicalPartitioner,
)

from fedsa_secure.config import TrainConfig
from fedsa_secure.data.pool import Pool
from fedsa_secure.data.sources import quiet
from fedsa_secure.errors import ConfigError, did_you_mean
from fedsa_secure.streams import derive

DRAWS = 50
"""How often a Dirichlet partition is drawn before it is refused."""
DEFAULT_CLIENTS = 10
_LABEL, _ROW = "__fedsa_label__", "__fedsa_row__"
_SPECS = ("iid", "dirichlet:0.5", "pathological:2", "column:NAME", "length")


def partition(
    pool: Pool, spec: str | Partitioner, config: TrainConfig, draw: int = 0
) -> list[np.ndarray]:
    """Rows of each client, in the order of the pool.

    Args:
        pool: what is divided.
        spec: ``iid``, ``dirichlet:ALPHA``, ``pathological:CLASSES``, ``column:NAME``, ``length``,
            or a partitioner of ``flwr-datasets``.
        config: number of clients (None for 10, or for as many as the column has values), fewest
            rows of a client, and the seed.
        draw: counts the draws of one configuration.

    Raises:
        ConfigError: if the division is impossible, with rows, clients and the remedy.
    """
    if spec == "length":
        shards = _by_length(pool, config.clients or DEFAULT_CLIENTS)
    else:
        shards = _by_partitioner(pool, spec, config, draw)
    clients = config.clients
    if clients is not None and len(shards) != clients:
        raise ConfigError(
            "clients",
            f"the partition has {len(shards)} clients, but {clients} were asked for",
            f"set clients={len(shards)} or leave it out",
        )
    held = sum(len(shard) for shard in shards)
    if isinstance(spec, str) and held != len(pool):
        raise _refused(pool, spec, clients, f"{len(pool) - held} rows would be no client's")
    for k, shard in enumerate(shards):
        if len(shard) < config.min_rows:
            reason = f"client {k} would have {len(shard)} rows, and {config.min_rows} are needed"
            raise _refused(pool, spec, len(shards), reason)
    return shards


def _by_length(pool: Pool, clients: int) -> list[np.ndarray]:
    """Equal shares in order of length: the first client has the shortest rows."""
    order = np.argsort(pool.lengths(), kind="stable")
    return [np.sort(part) for part in np.array_split(order, clients)]


def _by_partitioner(
    pool: Pool, spec: str | Partitioner, config: TrainConfig, draw: int
) -> list[np.ndarray]:
    if isinstance(spec, str):
        keys = (draw,) if draw else ()
        partitioner = _build(pool, spec, config, derive(config.seed, "partition", *keys) % 2**31)
    elif spec.is_dataset_assigned():
        raise ConfigError(
            "partition", "this partitioner already holds a data set", "give it as it was made"
        )
    else:
        partitioner = copy.deepcopy(spec)  # so that the user's own can be given again
    # Partitioners see their own copy of the labels, whatever the user's column is called.
    extra = {_LABEL: pool.labels.tolist(), _ROW: list(range(len(pool)))}
    try:
        with quiet():
            rows = pool.rows
            for name, values in extra.items():
                rows = rows.add_column(name, values)
            partitioner.dataset = rows
            return [
                np.sort(np.asarray(partitioner.load_partition(k)[_ROW], dtype=np.int64))
                for k in range(partitioner.num_partitions)
            ]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _refused(pool, spec, config.clients, str(error).split("\n")[0]) from error


def _build(pool: Pool, spec: str, config: TrainConfig, own_seed: int) -> Partitioner:
    kind, _, argument = spec.partition(":")
    count = config.clients or DEFAULT_CLIENTS
    if kind in ("dirichlet", "pathological") and not pool.label_names:
        raise ConfigError(
            "partition",
            f"{spec} divides by label, and the data have none",
            "set label_column, or take iid, length or column:NAME",
        )
    if kind == "iid" and not argument:
        # IidPartitioner takes contiguous pieces, so the order has to be shuffled first.
        return _ShuffledIid(count, own_seed)
    if kind == "dirichlet":
        return DirichletPartitioner(
            num_partitions=count,
            partition_by=_LABEL,
            alpha=_number(spec, argument, float),
            min_partition_size=config.min_rows,
            self_balancing=False,
            seed=own_seed,
        )
    if kind == "pathological":
        return PathologicalPartitioner(
            num_partitions=count,
            partition_by=_LABEL,
            num_classes_per_partition=int(_number(spec, argument, int)),
            # "random" may leave a class to no client, whose rows would be lost without a word
            class_assignment_mode="first-deterministic",
            seed=own_seed,
        )
    if kind == "column" and argument:
        if argument not in pool.rows.column_names:
            raise ConfigError(
                "partition",
                f"the data set has no column {argument!r}",
                did_you_mean(argument, pool.rows.column_names),
            )
        if any(value is None for value in pool.rows[argument]):
            raise ConfigError(
                "partition", f"column {argument!r} has empty values", "leave those rows out"
            )
        return NaturalIdPartitioner(partition_by=argument)
    raise ConfigError("partition", f"cannot read {spec!r}", did_you_mean(spec, _SPECS))


class _ShuffledIid(IidPartitioner):  # type: ignore[misc]
    """Equal shares of a shuffled pool."""

    def __init__(self, num_partitions: int, seed: int) -> None:
        super().__init__(num_partitions)
        self._seed = seed

    @property
    def dataset(self) -> object:
        return super().dataset

    @dataset.setter
    def dataset(self, value: object) -> None:
        IidPartitioner.dataset.fset(self, value.shuffle(seed=self._seed))  # type: ignore[attr-defined]


def _number(spec: str, argument: str, kind: type[int] | type[float]) -> float:
    try:
        value = kind(argument)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise ConfigError(
            "partition",
            f"{spec!r} needs a positive {'number' if kind is float else 'whole number'} after ':'",
            did_you_mean(spec, _SPECS),
        )
    return float(value)


def _refused(pool: Pool, spec: object, clients: int | None, reason: str) -> ConfigError:
    shown = spec if isinstance(spec, str) else type(spec).__name__
    return ConfigError(
        "partition",
        f"{shown} cannot divide {len(pool)} rows over {clients or DEFAULT_CLIENTS} clients: "
        f"{reason}",
        "take fewer clients, more rows, or a larger alpha (dirichlet) or more classes "
        "(pathological)",
    )
