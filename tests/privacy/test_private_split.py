"""Train and test of a private run: a record's side depends on its own place or group alone."""

import hashlib
import hmac
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from fedsa_secure import CheckpointError, ConfigError, TrainConfig
from fedsa_secure.data import Division, FederatedData, divide, load_pool
from fedsa_secure.data.partition import partition
from fedsa_secure.data.shards import split_shard_privately
from fedsa_secure.federation.run_folder import RunFolder
from fedsa_secure.runtimes import api

KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))
keys = st.binary(min_size=32, max_size=32)
PRIVATE = {"dp_epsilon": 8.0, "common_rows": 0}
FEATURES = Features(
    text=Value("string"),
    label=ClassLabel(names=["no", "yes"]),
    site=Value("string"),
    patient=Value("string"),
)


def two_sites(**changed: list) -> Dataset:
    """Two clients of 30 rows each, by the column site."""
    columns = {
        "text": [f"w{k}" for k in range(60)],
        "label": [k % 2 for k in range(60)],
        "site": ["a", "b"] * 30,
        "patient": [f"p{k % 17}" for k in range(60)],
    }
    return Dataset.from_dict(columns | changed, features=FEATURES)


def division_of(rows: Dataset, key: bytes = KEY, **options: Any) -> Division:
    config = TrainConfig(**{**PRIVATE, **options})
    return divide(rows, "column:site", config, key)


def sides_of(division: Division) -> np.ndarray:
    """For every row of the pool its client, and whether it is for the test. [row, 2]"""
    found = np.full((len(division.pool), 2), -1)
    for client, shard in enumerate(division.shards):
        found[shard.train] = client, 0
        found[shard.test] = client, 1
    return found


def expected_sides(key: bytes, client: int, count: int, fraction: float) -> np.ndarray:
    """What the split should be, written down a second time. [row]"""
    found = []
    for place in range(count):
        digest = hmac.new(key, f"row:{client}:{place}".encode(), hashlib.sha256).digest()
        found.append(int.from_bytes(digest, "big") < fraction * 2**256)
    return np.asarray(found)


# --- a shard ---------------------------------------------------------------------------------


@given(
    rows=st.lists(st.integers(0, 500), min_size=1, max_size=60, unique=True).map(np.asarray),
    client=st.integers(0, 99),
    key=keys,
    fraction=st.sampled_from([0.125, 0.2, 0.5]),
)
def test_sides_are_those_of_the_formula_in_two_parts(rows, client, key, fraction):
    expected = expected_sides(key, client, len(rows), fraction)
    if expected.all() or not expected.any():
        with pytest.raises(ConfigError, match=f"client {client} has {len(rows)} rows") as refused:
            split_shard_privately(rows, client, key, fraction)
        assert refused.value.option == "test_fraction"
        return
    shard = split_shard_privately(rows, client, key, fraction)
    assert shard.test.tolist() == rows[expected].tolist()
    assert shard.train.tolist() == rows[~expected].tolist()


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.9])
def test_share_of_the_test_is_the_fraction(fraction):
    """Bounds that a right split misses for one key in 10⁹; the key is fixed."""
    count = 20_000
    low, high = binom.ppf([5e-10, 1 - 5e-10], count, fraction)
    for groups in (None, np.arange(count)):
        shard = split_shard_privately(np.arange(count), 0, KEY, fraction, groups)
        assert low <= len(shard.test) <= high


def test_key_and_client_each_make_an_independent_split():
    """Two independent fair splits agree on half of the rows; bounds as above."""
    count = 20_000
    low, high = binom.ppf([5e-10, 1 - 5e-10], count, 0.5)

    def is_test(client: int, key: bytes) -> np.ndarray:
        test = split_shard_privately(np.arange(count), client, key, 0.5).test
        return np.isin(np.arange(count), test)

    base = is_test(0, KEY)
    for other in (is_test(1, KEY), is_test(0, OTHER_KEY)):
        assert low <= np.sum(base == other) <= high


def test_later_rows_move_no_earlier_row():
    few, many = (split_shard_privately(np.arange(n), 3, KEY, 0.3) for n in (40, 60))
    assert few.test.tolist() == [row for row in many.test if row < 40]


# --- changed records -------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    row=st.integers(0, 59),
    text=st.sampled_from(["", "something else"]),
    label=st.integers(0, 1),
    grouped=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_changed_or_nulled_record_moves_no_record(row, text, label, grouped, seed):
    before = two_sites()
    texts, labels = list(before["text"]), list(before["label"])
    texts[row], labels[row] = text, label
    column = "patient" if grouped else None
    one = sides_of(division_of(before, group_column=column))
    two = sides_of(division_of(two_sites(text=texts, label=labels), group_column=column, seed=seed))
    assert (one >= 0).all()
    assert np.array_equal(one, two)


@settings(max_examples=20)
@given(row=st.integers(0, 59), group=st.sampled_from(["p0", "p5", "new"]))
def test_a_record_of_another_group_moves_alone(row, group):
    groups = list(two_sites()["patient"])
    groups[row] = group
    one = sides_of(division_of(two_sites(), group_column="patient"))
    two = sides_of(division_of(two_sites(patient=groups), group_column="patient"))
    others = np.arange(60) != row
    assert np.array_equal(one[others], two[others])


@given(key=keys)
@settings(max_examples=30)
def test_a_group_is_on_the_same_side_everywhere(key):
    try:
        division = division_of(two_sites(), key, group_column="patient", test_fraction=0.5)
    except ConfigError:
        return  # all groups of a client are on one side
    sides = sides_of(division)[:, 1]
    groups = np.asarray(two_sites()["patient"])
    for group in set(groups):
        assert len(set(sides[groups == group])) == 1


def test_test_rows_of_a_class_without_train_rows_stay():
    test = np.flatnonzero(sides_of(division_of(two_sites()))[:, 1])
    labels = [int(row in test) for row in range(60)]
    assert np.array_equal(sides_of(division_of(two_sites(label=labels)))[:, 1], labels)


def test_key_moves_the_split_of_a_run():
    one, two = (sides_of(division_of(two_sites(), key)) for key in (KEY, OTHER_KEY))
    assert np.array_equal(one[:, 0], two[:, 0])
    assert not np.array_equal(one, two)


@pytest.mark.parametrize("unit", ["record", "client"])
def test_a_private_division_needs_a_key(unit):
    config = TrainConfig(dp_epsilon=8, dp_unit=unit)
    with pytest.raises(ValueError, match="secret key"):
        divide(two_sites(), "column:site", config)


def test_without_privacy_a_key_changes_nothing():
    config = TrainConfig(common_rows=0)
    one, two = (divide(two_sites(), "column:site", config, key) for key in (None, KEY))
    assert np.array_equal(sides_of(one), sides_of(two))


def test_a_skewed_draw_without_a_test_part_is_drawn_again():
    config = TrainConfig(**PRIVATE, clients=4, seed=1)
    first = partition(load_pool(two_sites(), config)[0], "dirichlet:0.3", config)
    split = [expected_sides(KEY, k, len(rows), 0.2) for k, rows in enumerate(first)]
    assert any(sides.all() or not sides.any() for sides in split)
    shards = divide(two_sites(), "dirichlet:0.3", config, KEY).shards
    assert all(len(shard.train) and len(shard.test) for shard in shards)


# --- the key of a run ------------------------------------------------------------------------


class ReadyError(Exception):
    """Raised in place of training; holds the data that were made ready."""

    def __init__(self, *given: Any) -> None:
        self.data = next(part for part in given if isinstance(part, FederatedData))
        super().__init__()


@pytest.fixture
def tests_of(
    tiny_bert: Any,
    tiny_tokenizer: Any,
    small_dataset: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """`tests_of(how, **options)`: everybody's test rows, as `train`, … make them ready.

    Half of the rows are for the test: a client without any happens for one key in 10⁸.
    """

    def stop(*given: Any) -> None:
        raise ReadyError(*given)

    monkeypatch.setattr(api, "Simulation", stop)
    monkeypatch.setattr(api, "_finished", lambda folder: None)  # for evaluate
    objects = {
        "model": tiny_bert(),
        "dataset": small_dataset(rows=90),
        "tokenizer": tiny_tokenizer,
    }
    small = {"clients": 3, "rank": 2, "max_length": 16, "partition": "iid", "test_fraction": 0.5}

    def make(how: str = "train", folder: str = "run", **options: Any) -> list[list[int]]:
        path = tmp_path / folder
        given = {**small, **PRIVATE, **options, "output_dir": str(path)}
        arguments, more = ((), given) if how == "train" else ((path,), {})
        with pytest.raises(ReadyError) as stopped:
            getattr(api, how)(*arguments, **objects, **more)
        return [shard.test.tolist() for shard in stopped.value.data.shards]

    return make


@pytest.mark.parametrize("how", ["resume", "evaluate"])
def test_a_run_is_split_again_by_the_key_that_was_kept(tests_of, tmp_path, how):
    tests = tests_of("train")
    kept = tmp_path / "run" / "split.key"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert len(kept.read_bytes()) == 32
    assert tests_of(how) == tests
    kept.write_bytes(OTHER_KEY)
    assert tests_of(how) != tests


def test_key_is_fresh_for_every_run_though_the_seed_is_not(tests_of, tmp_path):
    one, two = (tests_of(folder=name) for name in ("one", "two"))
    assert one != two
    assert len({(tmp_path / name / "split.key").read_bytes() for name in ("one", "two")}) == 2


def test_seeded_key_is_for_tests_and_not_from_the_public_seed(tests_of, tmp_path):
    def key_of(folder: str, **options: int) -> bytes:
        tests_of(folder=folder, **options)
        return RunFolder(tmp_path / folder).read_split_key()

    one = key_of("one", dp_test_seed=1)
    assert key_of("two", dp_test_seed=1, seed=5) == one
    assert key_of("three", dp_test_seed=2) != one


@pytest.mark.parametrize("how", ["resume", "evaluate"])
def test_a_private_run_without_its_key_is_refused(tests_of, tmp_path, how):
    tests_of("train")
    key = tmp_path / "run" / "split.key"
    key.write_bytes(bytes(31))
    with pytest.raises(CheckpointError, match="31 bytes"):
        getattr(api, how)(tmp_path / "run")
    key.unlink()
    with pytest.raises(CheckpointError, match=r"without its split\.key"):
        getattr(api, how)(tmp_path / "run")


def test_a_run_without_privacy_has_no_key(tests_of, tmp_path):
    tests = tests_of("train", dp_epsilon=None)
    assert not (tmp_path / "run" / "split.key").exists()
    assert tests_of("resume") == tests
