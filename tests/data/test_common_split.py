"""The common test comes from a split of its own, and shares no group with the pool."""

import pytest
from datasets import Dataset, DatasetDict

from fedsa_secure import ConfigError, TrainConfig
from fedsa_secure.data import divide, load_pool


def splits(test_stems: list[str]) -> DatasetDict:
    train = {"text": ["a"] * 40, "label": [0, 1] * 20, "stem": ["x", "x", "y", "y"] * 10}
    test = {"text": ["b"] * 8, "label": [0, 1] * 4, "stem": test_stems}
    return DatasetDict(train=Dataset.from_dict(train), test=Dataset.from_dict(test))


def test_the_split_that_is_trained_on_is_refused() -> None:
    config = TrainConfig.build(common_split="train")
    with pytest.raises(ConfigError, match="common_split: 'train' is the split that is trained on"):
        load_pool(splits(["z"] * 8), config)


def test_rows_whose_group_is_trained_on_are_left_out() -> None:
    config = TrainConfig.build(group_column="stem")
    _, common = load_pool(splits(["x", "z", "z", "y", "z", "z", "x", "y"]), config)
    assert common.rows["stem"][:] == ["z"] * 4
    assert common.labels.tolist() == [1, 0, 0, 1]
    with pytest.raises(ConfigError, match="group_column: every group of the common test"):
        load_pool(splits(["x", "y"] * 4), config)


def test_no_common_test_where_the_held_groups_lack_a_class() -> None:
    """Groups of four rows and one class: a tenth of forty rows is one group, so one class."""
    rows = {
        "text": ["a"] * 40,
        "label": [k // 4 % 2 for k in range(40)],
        "stem": [str(k // 4) for k in range(40)],
    }
    options = {"group_column": "stem", "clients": 2, "common_rows": 4, "test_fraction": 0.4}
    division = divide(Dataset.from_dict(rows), "iid", TrainConfig.build(**options))
    assert division.common is None
    assert sum(len(shard.train) + len(shard.test) for shard in division.shards) == 40
