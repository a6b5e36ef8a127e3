"""Classes that the user declares, and what a private run asks for."""

from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from fedsa_secure import ConfigError, TrainConfig
from fedsa_secure.data import load_pool

SST2 = Path(__file__).parents[3] / "shared" / "data" / "glue" / "sst2"


def labelled(values: list) -> Dataset:
    return Dataset.from_dict({"text": [f"w{k}" for k in range(len(values))], "label": values})


def class_labels(names: list[str], values: list[int]) -> Dataset:
    features = Features(text=Value("string"), label=ClassLabel(names=names))
    texts = [f"w{k}" for k in range(len(values))]
    return Dataset.from_dict({"text": texts, "label": values}, features=features)


@pytest.mark.parametrize("epsilon", [None, 8.0])
@pytest.mark.parametrize(
    ("values", "names", "labels"),
    [
        (["no", "yes", "no"], "yes,no,maybe", [1, 0, 1]),
        ([0, 1, 0], "negative,positive", [0, 1, 0]),
        ([2, 2, 2], "negative,neutral,positive", [2, 2, 2]),
        ([10, 2, 10], "10,2", [0, 1, 0]),
        ([1, 0, 1], "1,0", [0, 1, 0]),
        ([True, False, True], "True,False", [0, 1, 0]),
    ],
    ids=["words", "places", "one class", "numbers", "numbers that could be places", "truth values"],
)
def test_declared_classes_are_those_of_the_declaration(values, names, labels, epsilon):
    config = TrainConfig(label_names=names, dp_epsilon=epsilon)
    pool, _ = load_pool(labelled(values), config)
    assert pool.label_names == tuple(names.split(","))
    assert pool.labels.tolist() == labels


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        (labelled(["no", "yes", "never"]), "'never'"),
        (labelled([0, 1, 2]), "'2'"),
        (labelled([0, -1, 1]), "'-1'"),
        (class_labels(["no", "yes", "never"], [0, 2, 1]), "'never'"),
    ],
    ids=["word", "place", "negative place", "declared otherwise"],
)
def test_a_label_outside_the_declaration_is_named(rows, shown):
    with pytest.raises(ConfigError, match=f"has the label {shown}") as refused:
        load_pool(rows, TrainConfig(label_names="no,yes"))
    assert refused.value.option == "label_names"


def test_own_declaration_goes_before_that_of_the_data():
    rows = class_labels(["no", "yes"], [0, 1, 1])
    pool, _ = load_pool(rows, TrainConfig(label_names="yes,no"))
    assert pool.label_names == ("yes", "no")
    assert pool.labels.tolist() == [1, 0, 0]


@pytest.mark.parametrize("names", ["no,yes,no", "no,no"])
def test_a_class_named_twice_is_refused(names):
    with pytest.raises(ConfigError, match="names a class twice"):
        TrainConfig.build(label_names=names)


def test_a_private_run_does_not_read_its_classes_off_the_labels():
    with pytest.raises(ConfigError, match="have to be declared") as refused:
        load_pool(labelled([0, 1, 0]), TrainConfig(dp_epsilon=8))
    assert refused.value.option == "label_names"


@pytest.mark.parametrize("values", [[0, 1, 2], [0, 1, 1], [1, 0, 1]])
def test_classes_of_a_private_run_are_the_same_whatever_the_labels(values):
    pool, _ = load_pool(class_labels(["a", "b", "c"], values), TrainConfig(dp_epsilon=8))
    assert pool.label_names == ("a", "b", "c")
    assert pool.labels.tolist() == values


def test_data_with_answers_need_no_classes():
    rows = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", "d"]})
    assert load_pool(rows, TrainConfig(dp_epsilon=8))[0].label_names == ()


def test_the_embedded_data_declare_their_classes():
    pool, _ = load_pool("lexicon", TrainConfig(dp_epsilon=8))
    assert pool.label_names == ("negative", "positive")


@pytest.mark.skipif(not SST2.is_dir(), reason="no ../shared/data beside the checkout")
def test_sst2_declares_its_classes():
    config = TrainConfig(dp_epsilon=8, max_rows=50, common_rows=0)
    assert load_pool(str(SST2), config)[0].label_names == ("negative", "positive")
