"""Every kind of data that can be read, and what is refused."""

import gc
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from fedsa_secure.config import TrainConfig
from fedsa_secure.data import load_pool
from fedsa_secure.data.sources import open_dataset
from fedsa_secure.errors import ConfigError

TEXTS = ["plain", "with, comma", 'with "quotes"', "Grüße, 你好", "two  spaces", "last one"]
LABELS = [0, 1, 2, 0, 1, 2]
REAL_DATA = Path(__file__).parents[3] / "shared" / "data"
needs_real_data = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason="no ../shared/data beside the checkout"
)


def plain_rows() -> Dataset:
    return Dataset.from_dict({"text": TEXTS, "label": LABELS})


def one_class(names: list[str], labels: list[int]) -> Dataset:
    """Rows whose text is the name of their class."""
    features = Features(text=Value("string"), label=ClassLabel(names=names))
    return Dataset.from_dict({"text": [names[k] for k in labels], "label": labels}, features)


# --- kinds -----------------------------------------------------------------------------------


def write_parquet(folder: Path) -> Path:
    plain_rows().to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def write_parquet_file(folder: Path) -> Path:
    plain_rows().to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def write_csv(folder: Path) -> Path:
    plain_rows().to_csv(folder / "rows.csv", index=False)
    return folder / "rows.csv"


def write_csv_folder(folder: Path) -> Path:
    plain_rows().to_csv(folder / "train.csv", index=False)
    return folder


def write_tsv(folder: Path) -> Path:
    plain_rows().to_csv(folder / "rows.tsv", index=False, sep="\t")
    return folder / "rows.tsv"


def write_jsonl(folder: Path) -> Path:
    lines = [json.dumps({"text": text, "label": k}) for text, k in zip(TEXTS, LABELS, strict=True)]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "rows.jsonl"


def write_to_disk(folder: Path) -> Path:
    plain_rows().save_to_disk(folder / "saved")
    return folder / "saved"


def write_splits_to_disk(folder: Path) -> Path:
    DatasetDict(train=plain_rows()).save_to_disk(folder / "saved")
    return folder / "saved"


WRITERS = (
    write_parquet,
    write_parquet_file,
    write_csv,
    write_csv_folder,
    write_tsv,
    write_jsonl,
    write_to_disk,
    write_splits_to_disk,
)


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_kind_of_file_gives_the_same_pool(write: Callable[[Path], Path], tmp_path):
    pool, common = load_pool(str(write(tmp_path)), TrainConfig())
    assert list(pool.rows["text"]) == TEXTS
    assert pool.texts == ("text",)
    assert pool.labels.tolist() == LABELS
    assert pool.label_names == ("0", "1", "2")
    assert common is None


def test_objects_are_taken_as_they_are():
    rows = plain_rows()
    assert open_dataset(rows, None)["train"] is rows
    splits = DatasetDict(train=rows, other=rows)
    assert open_dataset(splits, None) is splits


def test_files_of_a_folder_are_its_splits(tmp_path):
    for split, count in (("train", 6), ("test", 2)):
        plain_rows().select(range(count)).to_parquet(tmp_path / f"{split}.parquet")
    splits = open_dataset(str(tmp_path), None)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 6, "test": 2}


def test_reading_prints_nothing(tmp_path, capfd):
    open_dataset(str(write_jsonl(tmp_path)), None)
    assert capfd.readouterr() == ("", "")


# --- columns and labels ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns",
    [
        ("sentence",),
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("question1", "question2"),
        ("question", "sentence"),
    ],
    ids="+".join,
)
def test_glue_names_its_text_columns(columns):
    rows = Dataset.from_dict(
        {"idx": [0, 1], "label": [0, 1]} | {column: ["a", "b"] for column in columns}
    )
    assert load_pool(rows, TrainConfig())[0].texts == columns


def test_own_columns_go_before_the_usual_ones():
    rows = plain_rows().add_column("note", ["x"] * 6).add_column("grade", list("abcabc"))
    config = TrainConfig(text_column=("note", "text"), label_column="grade")
    pool, _ = load_pool(rows, config)
    assert pool.texts == ("note", "text")
    assert pool.label_names == ("a", "b", "c")
    assert pool.labels.tolist() == LABELS


def test_declared_class_names_are_kept_in_their_order():
    pool, _ = load_pool(one_class(["pos", "neg", "unused"], [1, 0, 1, 0]), TrainConfig())
    assert pool.label_names == ("pos", "neg", "unused")
    assert pool.labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("values", "names", "labels"),
    [
        (["no", "yes", "no"], ("no", "yes"), [0, 1, 0]),
        ([10, 2, 10], ("2", "10"), [1, 0, 1]),
        ([True, False, True], ("False", "True"), [1, 0, 1]),
    ],
    ids=["words", "numbers", "truth values"],
)
def test_undeclared_classes_are_the_sorted_distinct_values(values, names, labels):
    pool, _ = load_pool(Dataset.from_dict({"text": list("abc"), "label": values}), TrainConfig())
    assert pool.label_names == names
    assert pool.labels.tolist() == labels


def test_group_column_is_read():
    rows = plain_rows().add_column("patient", [1, 1, 2, 2, 3, 3])
    pool, _ = load_pool(rows, TrainConfig(group_column="patient"))
    assert pool.groups.tolist() == ["1", "1", "2", "2", "3", "3"]


def test_max_rows_is_a_seeded_choice_in_the_order_of_the_data():
    rows = Dataset.from_dict({"text": [f"{k:03}" for k in range(100)], "label": [0, 1] * 50})

    def chosen(seed: int) -> list[str]:
        return list(load_pool(rows, TrainConfig(max_rows=20, seed=seed))[0].rows["text"])

    assert len(set(chosen(0))) == 20
    assert chosen(0) == sorted(chosen(0)) == chosen(0)
    assert chosen(0) != chosen(1)
    assert len(load_pool(rows, TrainConfig(max_rows=1000))[0]) == 100


# --- the common test split -------------------------------------------------------------------


def named_splits(*names: str) -> DatasetDict:
    """Splits that can be told apart by their length: 6, 5, 4, …"""
    return DatasetDict({name: plain_rows().select(range(6 - k)) for k, name in enumerate(names)})


@pytest.mark.parametrize(
    ("names", "options", "rows"),
    [
        (("train", "validation", "test"), {}, 5),
        (("train", "test"), {}, 5),
        (("train", "validation_matched", "validation_mismatched"), {}, 5),
        (("train", "validation", "test"), {"common_split": "test"}, 4),
        (("train", "validation"), {"split": "validation"}, None),
        (("train", "other"), {}, None),
        (("train", "validation"), {"common_rows": 0}, None),
    ],
)
def test_common_split_is_the_named_one_or_validation_or_test(names, options, rows):
    _, common = load_pool(named_splits(*names), TrainConfig(**options))
    assert (None if common is None else len(common)) == rows


def test_classes_of_the_common_split_are_those_of_the_pool_by_name():
    """In training 'b' comes first of two names; in the test, 'b' is the only one."""
    splits = DatasetDict(
        train=Dataset.from_dict({"text": list("abab"), "label": list("abab")}),
        test=Dataset.from_dict({"text": list("bb"), "label": list("bb")}),
    )
    pool, common = load_pool(splits, TrainConfig())
    assert pool.labels.tolist() == [0, 1, 0, 1]
    assert common.labels.tolist() == [1, 1]
    assert common.label_names == pool.label_names


@pytest.mark.parametrize("pool_declares", [True, False], ids=["both declare", "the test declares"])
def test_classes_declared_in_another_order_are_matched_by_name(pool_declares):
    train = one_class(["neg", "pos"], [0, 1, 0, 1])
    if not pool_declares:
        train = Dataset.from_dict({"text": train["text"], "label": train["text"]})
    splits = DatasetDict(train=train, test=one_class(["pos", "neg"], [0, 1]))
    pool, common = load_pool(splits, TrainConfig())
    assert [pool.label_names[k] for k in pool.labels] == list(pool.rows["text"])
    assert [pool.label_names[k] for k in common.labels] == list(common.rows["text"])


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "undeclared"])
def test_label_that_only_the_common_split_has_is_refused(declared):
    names = ["a", "b", "odd"]
    splits = {"train": one_class(names, [0, 1, 0, 1]), "test": one_class(names, [0, 2])}
    if not declared:
        splits = {
            split: Dataset.from_dict({"text": rows["text"], "label": rows["text"]})
            for split, rows in splits.items()
        }
    with pytest.raises(ConfigError, match="label 'odd' occurs only in") as refused:
        load_pool(DatasetDict(splits), TrainConfig())
    assert refused.value.option == "label_column"


# --- refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "option", "message"),
    [
        ({"split": "trian"}, "split", "no split 'trian'; did you mean 'train'"),
        ({"common_split": "tset"}, "common_split", "no split 'tset'; did you mean 'test'"),
        ({"text_column": "txt"}, "text_column", "no column 'txt'; did you mean 'text'"),
        ({"label_column": "lable"}, "label_column", "no column 'lable'; did you mean 'label'"),
        ({"group_column": "texts"}, "group_column", "no column 'texts'; did you mean 'text'"),
    ],
)
def test_missing_split_or_column_is_refused_with_the_nearest_name(options, option, message):
    with pytest.raises(ConfigError, match=message) as refused:
        load_pool(named_splits("train", "test"), TrainConfig(**options))
    assert refused.value.option == option


def test_unknown_text_column_is_refused_with_the_columns_there_are():
    rows = Dataset.from_dict({"body": ["a", "b"], "label": [0, 1]})
    with pytest.raises(ConfigError, match="which of the columns holds the text: body, label"):
        load_pool(rows, TrainConfig())


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, None, 1], "empty labels"), ([0.5, 1.0, 0.0], "real numbers, not classes")],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    rows = Dataset.from_dict({"text": list("abc"), "label": labels})
    with pytest.raises(ConfigError, match=message) as refused:
        load_pool(rows, TrainConfig())
    assert refused.value.option == "label_column"


def test_hidden_labels_are_refused():
    features = Features(text=Value("string"), label=ClassLabel(names=["a", "b"]))
    rows = Dataset.from_dict({"text": ["x", "y"], "label": [-1, -1]}, features)
    with pytest.raises(ConfigError, match=r"hidden labels \(-1\)"):
        load_pool(rows, TrainConfig())


def test_empty_split_is_refused():
    with pytest.raises(ConfigError, match="no rows"):
        load_pool(plain_rows().select([]), TrainConfig())


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_missing_texts_are_refused(kind, tmp_path):
    """A model must not be trained on the word 'None'."""
    path = tmp_path / f"rows.{kind}"
    rows = Dataset.from_dict({"text": ["a", None, "c"], "label": [0, 1, 0]})
    rows.to_csv(path, index=False) if kind == "csv" else rows.to_parquet(path)
    with pytest.raises(ConfigError) as refused:
        load_pool(str(path), TrainConfig())
    assert refused.value.option == "text_column"


def test_words_that_mean_nothing_elsewhere_stay_texts(tmp_path):
    path, words = tmp_path / "rows.csv", ["NA", "null", "None", "nan"]
    path.write_text("text,label\n" + "\n".join(f"{word},{k % 2}" for k, word in enumerate(words)))
    pool, _ = load_pool(str(path), TrainConfig())
    assert list(pool.rows["text"]) == words


@pytest.mark.parametrize(
    "source",
    ["no-such-user/no-such-set", "./no-such-folder", "no-such-file.csv", "/no/such/folder"],
)
def test_source_that_does_not_exist_is_refused_by_name(source):
    with pytest.raises(ConfigError, match=f"cannot read '{source}'") as refused:
        open_dataset(source, None)
    assert refused.value.option == "dataset"


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.parquet", b"PAR1 but not really"),
        ("rows.jsonl", b'{"text": "a", "label"\n'),
        ("rows.csv", b"\xff\xfe\x00text"),
        ("rows.csv", b""),
        ("rows.bin", b"text,label\n"),
        ("state.json", b"not json"),
    ],
)
def test_file_that_cannot_be_read_is_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    source = tmp_path if name == "state.json" else tmp_path / name
    with pytest.raises(ConfigError, match="cannot read") as refused:
        open_dataset(str(source), None)
    assert refused.value.option == "dataset"
    del refused  # holds the file that pandas leaves open, …
    gc.collect()  # … about which Python would complain in a later test


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        open_dataset(str(tmp_path), None)


# --- real data -------------------------------------------------------------------------------


@needs_real_data
@pytest.mark.parametrize("by", ["folder", "subset"])
def test_rte_is_a_pair_task_with_a_validation_split(by):
    root = REAL_DATA / "glue"
    source, subset = (root / "rte", None) if by == "folder" else (root, "rte")
    pool, common = load_pool(str(source), TrainConfig(subset=subset))
    assert pool.texts == ("sentence1", "sentence2")
    assert pool.label_names == ("entailment", "not_entailment")
    assert np.bincount(pool.labels).tolist() == [1249, 1241]
    assert np.bincount(common.labels).tolist() == [146, 131]


@needs_real_data
def test_sst2_is_a_sentence_task_with_a_validation_split():
    pool, common = load_pool(str(REAL_DATA / "glue" / "sst2"), TrainConfig())
    assert pool.texts == ("sentence",)
    assert pool.label_names == ("negative", "positive")
    assert np.bincount(pool.labels).tolist() == [29648, 37335]
    assert np.bincount(common.labels).tolist() == [428, 444]
