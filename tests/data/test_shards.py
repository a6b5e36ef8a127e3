"""Each client's own train and test part, and the common test."""

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsa_secure.config import TrainConfig
from fedsa_secure.data import Division, Pool, Shard, divide, encode_division
from fedsa_secure.data.shards import choose_groups, split_shard, split_shard_by_group
from fedsa_secure.errors import ConfigError

NO_ROWS = Dataset.from_dict({"text": []})


def make_pool(labels: np.ndarray, groups: np.ndarray | None = None) -> Pool:
    """A pool whose rows are never looked at."""
    names = tuple(f"class{k}" for k in range(int(labels.max()) + 1))
    return Pool(NO_ROWS, ("text",), labels, groups, names)


@st.composite
def clients_rows(draw: st.DrawFn) -> tuple[Pool, np.ndarray]:
    """A pool with classes of unequal size, and a client that has some of its rows."""
    own, others = (
        np.asarray(draw(st.lists(st.integers(0, 25), min_size=3, max_size=3))) + extra
        for extra in ([1, 0, 0], [0, 0, 0])
    )
    labels = np.concatenate([np.repeat(np.arange(3), own), np.repeat(np.arange(3), others)])
    stream = np.random.default_rng(draw(st.integers(0, 1000)))
    order = stream.permutation(len(labels))
    return make_pool(labels[order]), np.flatnonzero(order < own.sum())


splits = {
    "case": clients_rows(),
    "client": st.integers(0, 99),
    "fraction": st.floats(0.01, 0.99),
    "seed": st.integers(0, 2**63 - 1),
}


def split_or_none(case, client: int, fraction: float, seed: int) -> Shard | None:
    """None where it is right to refuse: no class has two rows."""
    pool, rows = case
    counts = np.bincount(pool.labels[rows])
    if counts.max() >= 2:
        return split_shard(pool, rows, client, fraction, seed)
    with pytest.raises(ConfigError, match=f"client {client} has {len(rows)} rows") as refused:
        split_shard(pool, rows, client, fraction, seed)
    assert refused.value.option == "test_fraction"
    return None


# --- split_shard -----------------------------------------------------------------------------


@given(**splits)
def test_train_and_test_are_the_shard_in_two_parts(**split):
    shard = split_or_none(**split)
    if shard is None:
        return
    assert len(shard.train) > 0
    assert len(shard.test) > 0
    assert not set(shard.train) & set(shard.test)
    assert sorted([*shard.train, *shard.test]) == split["case"][1].tolist()
    assert (np.diff(shard.train) > 0).all()
    assert (np.diff(shard.test) > 0).all()


@given(**splits)
def test_no_client_is_tested_on_a_class_that_it_has_not_seen(**split):
    shard, labels = split_or_none(**split), split["case"][0].labels
    if shard is not None:
        assert set(labels[shard.test]) <= set(labels[shard.train])


@pytest.mark.parametrize("fraction", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("counts", [(2, 38), (16, 2, 13, 23), (2, 2, 40)])
def test_rare_class_keeps_a_row_in_train_however_large_the_test(counts, fraction):
    labels = np.repeat(np.arange(len(counts)), counts)
    for seed in range(20):
        shard = split_shard(make_pool(labels), np.arange(len(labels)), 0, fraction, seed)
        assert set(labels[shard.train]) == set(labels)


@given(**splits)
def test_class_with_a_single_row_stays_in_train(**split):
    shard, (pool, rows) = split_or_none(**split), split["case"]
    if shard is not None:
        counts = np.bincount(pool.labels[rows])
        assert (counts[pool.labels[shard.test]] >= 2).all()


@given(**splits)
def test_split_is_a_function_of_its_arguments(**split):
    one, two = split_or_none(**split), split_or_none(**split)
    if one is not None:
        assert np.array_equal(one.train, two.train)
        assert np.array_equal(one.test, two.test)


@given(
    counts=st.lists(st.integers(20, 60), min_size=1, max_size=4),
    fraction=st.sampled_from([0.2, 0.25, 0.5]),
    seed=st.integers(0, 1000),
)
def test_large_shards_are_split_by_the_same_share_in_every_class(counts, fraction, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    shard = split_shard(make_pool(labels), np.arange(len(labels)), 0, fraction, seed)
    for k, count in enumerate(counts):
        assert abs(np.sum(labels[shard.test] == k) - fraction * count) <= 1


def test_seed_and_client_each_change_the_split():
    pool, rows = make_pool(np.arange(60) % 3), np.arange(60)
    base = split_shard(pool, rows, 0, 0.2, 0)
    for client, seed in ((1, 0), (0, 1)):
        assert not np.array_equal(base.test, split_shard(pool, rows, client, 0.2, seed).test)


# --- groups ----------------------------------------------------------------------------------


@given(
    groups=st.lists(st.integers(0, 15), min_size=1, max_size=80).map(np.asarray),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 1000),
)
def test_groups_are_chosen_whole_until_they_hold_the_share(groups, fraction, seed):
    chosen = choose_groups(groups, fraction, seed, "test")
    inside, outside = set(groups[chosen]), set(groups[~chosen])
    assert not inside & outside
    assert chosen.sum() >= fraction * len(groups)
    largest = max(np.sum(groups == group) for group in inside)
    assert chosen.sum() < fraction * len(groups) + largest


@given(
    labels=st.lists(st.integers(0, 3), min_size=2, max_size=60).map(np.asarray),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_split_by_group_keeps_to_its_sides_and_to_seen_classes(labels, seed, data):
    pool, rows = make_pool(labels), np.arange(len(labels))
    sides = np.asarray(data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))))
    seen = set(labels[~sides])
    expected = [row for row in rows if sides[row] and labels[row] in seen]
    if not expected:
        with pytest.raises(ConfigError, match="client 4"):
            split_shard_by_group(pool, rows, 4, sides)
        return
    shard, left_out = split_shard_by_group(pool, rows, 4, sides)
    assert shard.train.tolist() == rows[~sides].tolist()
    assert shard.test.tolist() == expected
    assert left_out == sides.sum() - len(expected)


# --- divide ----------------------------------------------------------------------------------


def grouped_rows(rows: int = 400) -> Dataset:
    stream = np.random.default_rng(0)
    return Dataset.from_dict(
        {
            "text": [f"w{k % 196} w{k // 196}" for k in range(rows)],
            "label": stream.integers(2, size=rows).tolist(),
            "patient": [f"p{k}" for k in stream.integers(60, size=rows)],
        }
    )


@pytest.mark.parametrize("spec", ["iid", "dirichlet:1"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_group_is_on_both_sides_anywhere(spec, seed):
    config = TrainConfig(group_column="patient", clients=4, seed=seed)
    division = divide(grouped_rows(), spec, config)
    groups = division.pool.groups
    train = {group for shard in division.shards for group in groups[shard.train]}
    test = {group for shard in division.shards for group in groups[shard.test]}
    common = set(division.common.groups)
    assert train
    assert test
    assert common
    assert not train & test
    assert not common & (train | test)


def texts_of(division: Division) -> tuple[list[str], list[str]]:
    common = [] if division.common is None else list(division.common.rows["text"])
    return list(division.pool.rows["text"]), common


@pytest.mark.parametrize("seed", [0, 1])
def test_common_test_is_held_out_balanced_and_at_most_a_tenth(seed):
    rows = grouped_rows()
    division = divide(rows, "iid", TrainConfig(clients=4, seed=seed))
    pool, common = texts_of(division)
    assert sorted(pool + common) == sorted(rows["text"])
    assert 0 < len(common) <= len(rows) // 10
    counts = np.bincount(division.common.labels, minlength=2)
    assert counts[0] == counts[1]


def test_given_common_split_is_balanced_and_takes_nothing_from_the_pool():
    labels = [0] * 30 + [1] * 10
    test = Dataset.from_dict({"text": [f"t{k}" for k in range(40)], "label": labels})
    rows = DatasetDict(train=grouped_rows().select_columns(["text", "label"]), test=test)
    division = divide(rows, "iid", TrainConfig(clients=4, common_rows=16))
    pool, common = texts_of(division)
    assert pool == list(rows["train"]["text"])
    assert set(common) <= set(test["text"])
    assert np.bincount(division.common.labels).tolist() == [8, 8]


def test_common_test_can_be_switched_off():
    rows = grouped_rows()
    division = divide(rows, "iid", TrainConfig(clients=4, common_rows=0))
    assert division.common is None
    assert texts_of(division)[0] == list(rows["text"])


def test_shards_of_all_clients_are_the_pool():
    division = divide(grouped_rows(), "dirichlet:1", TrainConfig(clients=4))
    everything = [row for shard in division.shards for row in (*shard.train, *shard.test)]
    assert sorted(everything) == list(range(len(division.pool)))


def test_client_without_a_test_part_is_refused_by_number():
    rows = Dataset.from_dict(
        {"text": list("abcdef"), "label": [0, 0, 0, 0, 0, 1], "site": list("xxxxyy")}
    )
    with pytest.raises(ConfigError, match="client 1 has 2 rows, which do not give it"):
        divide(rows, "column:site", TrainConfig())


def test_fingerprint_changes_with_every_text_label_and_assignment(tiny_tokenizer):
    def fingerprint(seed: int = 0, **changed: list) -> str:
        columns = {"text": [f"w{k}" for k in range(40)], "label": [0, 1] * 20} | changed
        config = TrainConfig(clients=2, common_rows=0, seed=seed)
        division = divide(Dataset.from_dict(columns), "iid", config)
        return encode_division(division, tiny_tokenizer, TrainConfig(max_length=16)).fingerprint

    base = fingerprint()
    assert fingerprint() == base
    others = {
        fingerprint(seed=1),
        fingerprint(text=[f"w{k}" for k in range(39)] + ["w100"]),
        fingerprint(label=[1, 0] * 20),
        fingerprint(label=["no", "yes"] * 20),
    }
    assert base not in others
    assert len(others) == 4


@settings(max_examples=20)
@given(seed=st.integers(0, 2**63 - 1), fraction=st.floats(0.1, 0.5))
def test_divided_clients_are_never_tested_on_an_unseen_class(seed, fraction):
    config = TrainConfig(
        clients=3, seed=seed, test_fraction=fraction, group_column="patient", common_rows=0
    )
    division = divide(grouped_rows(120), "iid", config)
    labels = division.pool.labels
    for shard in division.shards:
        assert set(labels[shard.test]) <= set(labels[shard.train])
