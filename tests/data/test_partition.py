"""Dividing a pool over clients."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    PathologicalPartitioner,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsa_secure.config import TrainConfig
from fedsa_secure.data import Pool, divide, federated, load_pool
from fedsa_secure.data import partition as partitioning
from fedsa_secure.data.partition import DEFAULT_CLIENTS
from fedsa_secure.errors import ConfigError

MIN_ROWS = TrainConfig().min_rows


def partition(pool: Pool, spec: object, clients: int | None, seed: int) -> list[np.ndarray]:
    return partitioning.partition(pool, spec, TrainConfig(clients=clients, seed=seed))


HOSPITALS = ("north", "south", "east")


def make_pool(rows: int = 240, classes: int = 4) -> Pool:
    labels = np.arange(rows) % classes
    data = Dataset.from_dict(
        {
            "text": [f"w{row % 196}" for row in range(rows)],
            "label": labels.tolist(),
            "hospital": [HOSPITALS[row % 7 % 3] for row in range(rows)],
        },
        features=Features(
            text=Value("string"),
            label=ClassLabel(names=[f"class{k}" for k in range(classes)]),
            hospital=Value("string"),
        ),
    )
    return load_pool(data, TrainConfig())[0]


def assert_each_row_once(shards: list[np.ndarray], rows: int) -> None:
    assert sorted(np.concatenate(shards).tolist()) == list(range(rows))
    assert all(len(shard) >= MIN_ROWS for shard in shards)
    assert all((np.diff(shard) > 0).all() for shard in shards)


@pytest.mark.parametrize("seed", [0, 1, 2, 2**63 - 1])
@pytest.mark.parametrize(
    ("spec", "clients"),
    [
        ("iid", 7),
        ("iid", 1),
        ("dirichlet:0.5", 5),
        ("dirichlet:100", 8),
        ("pathological:1", 6),
        ("pathological:2", 6),
        ("pathological:4", 6),
        ("column:hospital", 3),
    ],
)
def test_each_row_belongs_to_exactly_one_client(spec, clients, seed):
    pool = make_pool()
    shards = partition(pool, spec, clients, seed)
    assert len(shards) == clients
    assert_each_row_once(shards, len(pool))


@settings(max_examples=15)
@given(
    spec=st.sampled_from(["iid", "dirichlet:0.3", "dirichlet:10"]),
    clients=st.integers(1, 12),
    rows=st.integers(60, 120),
    seed=st.integers(0, 2**63 - 1),
)
def test_division_is_complete_and_repeatable_or_refused(spec, clients, rows, seed):
    pool = make_pool(rows=rows)
    try:
        shards = partition(pool, spec, clients, seed)
    except ConfigError:
        assert spec.startswith("dirichlet"), "equal shares of enough rows are always possible"
        return
    assert len(shards) == clients
    assert_each_row_once(shards, rows)
    again = partition(pool, spec, clients, seed)
    assert all(np.array_equal(one, two) for one, two in zip(shards, again, strict=True))


@pytest.mark.parametrize("spec", ["iid", "dirichlet:1", "pathological:2"])
def test_another_seed_gives_another_division(spec):
    pool = make_pool()
    one, two = (partition(pool, spec, 6, seed) for seed in (0, 1))
    assert any(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_iid_shares_are_equal_and_mixed():
    """The pool is sorted here by its second half, so contiguous pieces would not be mixed."""
    shards = partition(make_pool(rows=241), "iid", 4, 0)
    assert sorted(len(shard) for shard in shards) == [60, 60, 60, 61]
    assert all(shard.min() < 60 and shard.max() > 180 for shard in shards)


def test_smaller_alpha_skews_the_labels_more():
    pool = make_pool(rows=800)

    def largest_share(alpha: float) -> float:
        shards = partition(pool, f"dirichlet:{alpha}", 4, 0)
        shares = [np.bincount(pool.labels[rows], minlength=4).max() / len(rows) for rows in shards]
        return float(np.mean(shares))

    assert largest_share(0.2) > largest_share(100) + 0.2


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_pathological_clients_hold_that_many_classes(classes):
    pool = make_pool()
    for rows in partition(pool, f"pathological:{classes}", 6, 0):
        assert len(set(pool.labels[rows])) == classes


def test_column_gives_every_value_its_client():
    pool = make_pool()
    shards = partition(pool, "column:hospital", None, 0)
    found = [set(pool.rows.select(rows)["hospital"]) for rows in shards]
    assert sorted(found, key=str) == [{"east"}, {"north"}, {"south"}]


def test_number_of_clients_is_ten_unless_given():
    assert len(partition(make_pool(), "iid", None, 0)) == DEFAULT_CLIENTS == 10


OWN = pytest.mark.parametrize(
    "own",
    [
        lambda: IidPartitioner(3),
        lambda: DirichletPartitioner(3, partition_by="label", alpha=5.0, min_partition_size=2),
        lambda: PathologicalPartitioner(3, partition_by="label", num_classes_per_partition=4),
        lambda: NaturalIdPartitioner(partition_by="hospital"),
    ],
    ids=["iid", "dirichlet", "pathological", "natural-id"],
)


@OWN
@pytest.mark.parametrize("clients", [None, 3])
def test_own_partitioner_divides_by_the_users_columns(own, clients):
    pool = make_pool()
    shards = partition(pool, own(), clients, 0)
    assert len(shards) == 3
    assert_each_row_once(shards, len(pool))


@OWN
def test_own_partitioner_can_be_given_again(own):
    pool, partitioner = make_pool(), own()
    first, second = (partition(pool, partitioner, None, 0) for _ in range(2))
    assert_each_row_once(second, len(pool))
    assert all(np.array_equal(one, two) for one, two in zip(first, second, strict=True))


def test_partitioner_that_already_holds_a_data_set_is_refused():
    partitioner = IidPartitioner(3)
    partitioner.dataset = make_pool().rows
    with pytest.raises(ConfigError, match="already holds a data set"):
        partition(make_pool(), partitioner, None, 0)


def test_pool_is_not_changed_by_its_division():
    pool = make_pool()
    columns = list(pool.rows.column_names)
    partition(pool, "iid", 3, 0)
    assert pool.rows.column_names == columns


# --- refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["iid", "dirichlet:0.5", "pathological:2"])
def test_too_many_clients_are_refused_with_rows_clients_and_remedy(spec):
    with pytest.raises(
        ConfigError, match=f"{spec} cannot divide 30 rows over 40 clients.*take fewer clients"
    ) as refused:
        partition(make_pool(rows=30), spec, 40, 0)
    assert refused.value.option == "partition"


def test_client_with_a_single_row_is_refused():
    data = Dataset.from_dict(
        {"text": ["a"] * 5, "label": [0, 1, 0, 1, 0], "site": ["x", "x", "x", "x", "y"]}
    )
    pool = load_pool(data, TrainConfig())[0]
    with pytest.raises(ConfigError, match="client 1 would have 1 rows, and 2 are needed"):
        partition(pool, "column:site", None, 0)


def test_other_number_of_clients_than_the_column_has_is_refused():
    with pytest.raises(ConfigError, match="has 3 clients, but 4 were asked for") as refused:
        partition(make_pool(), "column:hospital", 4, 0)
    assert refused.value.option == "clients"


def test_unknown_column_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="no column 'hospitl'; did you mean 'hospital'"):
        partition(make_pool(), "column:hospitl", None, 0)


def test_column_with_missing_values_is_refused():
    data = Dataset.from_dict(
        {"text": ["a"] * 6, "label": [0, 1] * 3, "site": ["x", "x", "y", "y", None, None]}
    )
    pool = load_pool(data, TrainConfig())[0]
    with pytest.raises(ConfigError, match="column .site. has empty values"):
        partition(pool, "column:site", None, 0)


@pytest.mark.parametrize("argument", ["0", "-1", "nan", "inf", "many", ""])
@pytest.mark.parametrize("kind", ["dirichlet", "pathological"])
def test_number_that_is_none_is_refused(kind, argument):
    with pytest.raises(ConfigError, match="needs a positive") as refused:
        partition(make_pool(), f"{kind}:{argument}", 3, 0)
    assert refused.value.option == "partition"


@pytest.mark.parametrize(
    ("spec", "nearest"),
    [
        ("idd", "iid"),
        ("drichlet:0.5", "dirichlet:0.5"),
        ("iid:3", "iid"),
        ("column:", "column:NAME"),
    ],
)
def test_unknown_kind_is_refused_with_the_nearest_name(spec, nearest):
    with pytest.raises(ConfigError, match=f"cannot read '{spec}'; did you mean '{nearest}'"):
        partition(make_pool(), spec, 3, 0)


def test_more_classes_per_client_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="pathological:5 cannot divide"):
        partition(make_pool(classes=4), "pathological:5", 3, 0)


@pytest.mark.parametrize("seed", range(5))
def test_few_clients_hold_all_classes_or_are_refused(seed):
    pool = make_pool(classes=4)
    try:
        shards = partition(pool, "pathological:2", 3, seed)
    except ConfigError:
        return
    assert_each_row_once(shards, len(pool))


def test_classes_that_no_client_would_hold_are_refused():
    """Two clients with one class each cannot hold four classes: rows would be lost unnoticed."""
    with pytest.raises(ConfigError):
        partition(make_pool(classes=4), "pathological:1", 2, 0)


# --- drawn again -----------------------------------------------------------------------------


def test_skewed_draw_is_repeated_until_every_client_has_enough():
    pool = make_pool(rows=400, classes=2)
    config = TrainConfig(clients=6, min_rows=20, common_rows=0, partition="dirichlet:0.3")
    with pytest.raises(ConfigError):  # the first draw alone would not do
        partitioning.partition(pool, "dirichlet:0.3", config, 0)
    shards = divide(pool.rows, "dirichlet:0.3", config).shards
    assert min(len(shard.train) + len(shard.test) for shard in shards) >= 20
    assert_each_row_once([np.sort(np.concatenate([s.train, s.test])) for s in shards], 400)


def test_draws_differ_and_can_be_repeated():
    pool, config = make_pool(), TrainConfig(clients=4)
    one, two, again = (
        partitioning.partition(pool, "dirichlet:1", config, draw) for draw in (0, 1, 1)
    )
    assert not all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(two, again, strict=True))


def test_impossible_skew_is_refused_after_all_draws():
    config = TrainConfig(clients=30, min_rows=9, common_rows=0)
    with pytest.raises(ConfigError, match="dirichlet:0.1 cannot divide 240 rows over 30 clients"):
        divide(make_pool().rows, "dirichlet:0.1", config)


def test_draw_without_a_test_part_is_repeated(monkeypatch):
    tried, split = [], federated._split

    def refuse_twice(pool, assigned, config, key):
        tried.append(assigned)
        if len(tried) < 3:
            raise ConfigError("test_fraction", "client 0 has no test part")
        return split(pool, assigned, config, key)

    monkeypatch.setattr(federated, "_split", refuse_twice)
    config = TrainConfig(clients=3, common_rows=0)
    divide(make_pool().rows, "dirichlet:1", config)
    assert len({str(rows) for rows in tried}) == 3
    tried.clear()
    with pytest.raises(ConfigError, match="no test part"):
        divide(make_pool().rows, "iid", config)  # every draw of it is alike
    assert len(tried) == 1
