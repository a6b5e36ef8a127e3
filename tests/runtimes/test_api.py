"""`train`, `resume`, `evaluate` and `load` as a user calls them, on tiny random models."""

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from flwr_datasets.partitioner import IidPartitioner
from peft import PeftModel
from sklearn.metrics import f1_score
from transformers import AutoModelForSequenceClassification

import fedsa_secure
from fedsa_secure import CheckpointError, ConfigError, TrainConfig
from fedsa_secure.federation.history import History, RoundRecord, RoundTiming
from fedsa_secure.federation.run import Run
from fedsa_secure.runtimes.prepare import Given

SMALL = {
    "clients": 3,
    "rounds": 3,
    "local_steps": 2,
    "batch_size": 4,
    "max_length": 16,
    "rank": 2,
    "common_rows": 9,
}


@pytest.fixture
def train(tiny_bert: Any, tiny_tokenizer: Any, small_dataset: Any, tmp_path: Path) -> Any:
    """`train(**options)` with a model and data set that are objects, into `tmp_path/run`."""

    def make(**options: Any) -> Run:
        defaults = {
            "model": tiny_bert(),
            "dataset": small_dataset(rows=120),
            "tokenizer": tiny_tokenizer,
            "output_dir": str(tmp_path / "run"),
            **SMALL,
        }
        return fedsa_secure.train(**{**defaults, **options})

    return make


def test_a_run_holds_what_happened(train: Any) -> None:
    run = train(evaluate_every=2)
    assert [record.round for record in run.history] == [1, 2, 3]
    assert [record.accuracy is not None for record in run.history] == [False, True, True]
    assert run.history[-1].accuracy == run.accuracy
    assert run.accuracy == pytest.approx(np.mean([c.metrics.accuracy for c in run.clients]))
    assert set(run.timings) == {1, 2, 3}
    assert run.config == TrainConfig.build(**{**run.config.model_dump()})
    a_values = 4 * 2 * 32  # query and value of two layers, rank 2, 32 inputs
    assert {r.uplink_bytes for r in run.history} == {
        4 * (a_values + 2)
    }  # and loss and clipped values
    assert [c.metrics.train_rows + c.metrics.test_rows for c in run.clients].__len__() == 3


def test_a_loaded_run_is_the_run(train: Any, tiny_bert: Any, tiny_tokenizer: Any) -> None:
    run = train()
    loaded = fedsa_secure.load(run.path, model=tiny_bert(), tokenizer=tiny_tokenizer)
    texts = ["w1 w4 w7", "w2 w5", "w3 w6 w9 w12"]
    assert loaded.metrics == run.metrics
    assert loaded.history == run.history
    for ours, theirs in zip(run.clients, loaded.clients, strict=True):
        assert ours.predict(texts) == theirs.predict(texts)
        assert set(ours.predict(texts)) <= {"class0", "class1", "class2"}


def test_evaluating_again_gives_the_same_metrics(
    train: Any, tiny_bert: Any, tiny_tokenizer: Any, small_dataset: Any
) -> None:
    run = train()
    again = fedsa_secure.evaluate(
        run.path, tiny_bert(), small_dataset(rows=120), tokenizer=tiny_tokenizer
    )
    assert again.metrics == run.metrics


def test_metrics_follow_from_predictions(train: Any, small_dataset: Any) -> None:
    """Accuracy, macro F1 and majority, computed again from `predict` on a client's own rows."""
    rows = small_dataset(rows=120)
    names = rows.features["label"].names
    run = train(dataset=rows, partition="iid", rounds=6, learning_rate=2e-2, common_rows=0)
    from fedsa_secure.data import divide

    shards = divide(rows, "iid", run.config).shards
    for client, shard in zip(run.clients, shards, strict=True):
        predicted = [names.index(p) for p in client.predict(list(rows[shard.test]["text"]))]
        labels = rows[shard.test]["label"]
        assert client.metrics.accuracy == pytest.approx(np.mean(np.equal(predicted, labels)))
        assert client.metrics.macro_f1 == pytest.approx(
            f1_score(labels, predicted, average="macro", zero_division=0.0)
        )
        assert client.metrics.majority == pytest.approx(max(np.bincount(labels)) / len(labels))


def test_training_learns(train: Any) -> None:
    """Twelve words, four of each class: what is learnt holds for rows that were not seen."""
    stream = np.random.default_rng(0)
    labels = np.arange(300) % 3
    words = 3 * stream.integers(4, size=(300, 5)) + labels[:, None]
    texts = [" ".join(f"w{word}" for word in row) for row in words]
    rows = Dataset.from_dict({"text": texts, "label": labels.tolist()})
    run = train(dataset=rows, partition="iid", rounds=8, local_steps=8, learning_rate=1e-2, rank=8)
    assert run.accuracy > 0.9 > run.majority + 0.3
    assert run.common_accuracy > 0.9


def test_saved_adapters_load_with_peft(
    train: Any, tiny_bert: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    run = train(rounds=6, learning_rate=2e-2)
    run.save_pretrained(tmp_path / "out")
    texts = ["w1 w4 w7", "w2 w5 w8", "w3 w6 w9 w12"]
    inputs = tiny_tokenizer(texts, padding=True, return_tensors="pt")
    seen = set()
    for client in run.clients:
        for folder in (tmp_path / "out", run.path / "adapters"):
            model = PeftModel.from_pretrained(tiny_bert(), folder / f"client-{client.number:05d}")
            with torch.no_grad():
                classes = model.eval()(**inputs).logits.argmax(-1).tolist()
            assert [run.label_names[k] for k in classes] == client.predict(texts)
            seen.add(tuple(classes))
    assert len(seen) > 1  # the models are personal


def test_the_users_model_stays_as_it_is(train: Any, tiny_bert: Any) -> None:
    model, other = tiny_bert(), tiny_bert()
    train(model=model)
    assert str(model) == str(other)
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)
        assert left.requires_grad == right.requires_grad


def test_partitioner_objects_are_taken(train: Any) -> None:
    run = train(partition=IidPartitioner(num_partitions=4), clients=None)
    assert len(run.clients) == 4


def test_local_folders_are_enough(
    tiny_bert: Any, tiny_tokenizer: Any, small_dataset: Any, tmp_path: Path
) -> None:
    """A model folder and a data file: what was begun by name is opened by name."""
    tiny_bert().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    small_dataset(rows=120).to_json(tmp_path / "rows.jsonl")
    run = fedsa_secure.train(
        str(tmp_path / "model"),
        str(tmp_path / "rows.jsonl"),
        output_dir=str(tmp_path / "run"),
        **SMALL,
    )
    assert fedsa_secure.load(run.path).clients[0].predict(["w1 w2"]) == run.clients[0].predict(
        ["w1 w2"]
    )
    assert fedsa_secure.evaluate(run.path).metrics == run.metrics
    assert fedsa_secure.resume(run.path).metrics == run.metrics
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=3)
    assert PeftModel.from_pretrained(base, run.path / "adapters" / "client-00002") is not None


def test_a_partitioner_can_be_given_twice_but_not_in_use(
    train: Any, small_dataset: Any, tmp_path: Path
) -> None:
    partitioner = IidPartitioner(num_partitions=3)
    runs = [train(partition=partitioner, output_dir=str(tmp_path / name)) for name in "ab"]
    assert runs[0].metrics == runs[1].metrics
    partitioner.dataset = small_dataset(rows=20)
    with pytest.raises(ConfigError, match="already holds a data set"):
        train(partition=partitioner)


def test_training_that_diverges_is_refused_and_not_kept(train: Any, tmp_path: Path) -> None:
    options = {"max_grad_norm": None, "update_range": 1.0}
    with pytest.raises(fedsa_secure.DivergedError, match="client 0 diverged in round .*learning"):
        train(optimizer="sgd", learning_rate=1e30, rounds=4, **options)
    assert all(np.isfinite(record.loss) for record in History(tmp_path / "run").records())
    assert not (tmp_path / "run" / "result.json").exists()


def test_personal_tensors_that_diverge_are_refused(train: Any) -> None:
    options = {"optimizer": "sgd", "learning_rate": 1e38, "max_grad_norm": None, "alpha": 1e3}
    with pytest.raises(fedsa_secure.DivergedError, match="client 0"):
        train(method="local", rounds=1, local_steps=1, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"dataset": Dataset.from_dict({"text": ["w1"] * 9, "label": [0] * 9})},
            "the same 'label'",
        ),
        ({"text_column": "label"}, "text_column: column 'label' has no text"),
        ({"tokenizer": 3}, "tokenizer: a int was given"),
        ({"output_dir": "x" * 300}, "output_dir: cannot write"),
        ({"output_dir": "a\0b"}, "output_dir: cannot write"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_model_or_data_is_refused(train: Any, options: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        train(**options)


def test_rows_without_text_are_refused(train: Any) -> None:
    rows = Dataset.from_dict({"text": ["w1", None] * 20, "label": [0, 1] * 20})
    with pytest.raises(ConfigError, match="no text in 20 rows, first in row 1"):
        train(dataset=rows)


def test_arguments_of_other_kinds_are_refused() -> None:
    """At the seam behind `train`, whose own annotations are checked while tests run."""
    for name, value in (("model", torch.nn.Linear(2, 2)), ("dataset", [1]), ("partition", 3)):
        with pytest.raises(ConfigError, match=f"{name}: a {type(value).__name__} was given"):
            Given(**{name: value})
    assert Given(dataset=Path("rows.csv")).options() == {"dataset": "rows.csv"}


class StopAfter:
    """An observer that breaks the run off after some rounds, as an error would."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self.closed, self.done_before = rounds, False, -1

    def started(self, config: TrainConfig, folder: Path, rounds_done: int) -> None:
        self.done_before = rounds_done

    def round_finished(self, record: RoundRecord, timing: RoundTiming) -> None:
        if record.round == self.rounds:
            raise InterruptedError

    def finished(self) -> None:
        self.closed = True


def interrupted(train: Any, tmp_path: Path, **options: Any) -> Path:
    watcher = StopAfter(2)
    with pytest.raises(InterruptedError):
        train(observers=[watcher], **options)
    assert watcher.closed
    return tmp_path / "run"


def test_an_interrupted_run_goes_on(
    train: Any, tiny_bert: Any, tiny_tokenizer: Any, small_dataset: Any, tmp_path: Path
) -> None:
    whole = train(output_dir=str(tmp_path / "whole"))
    path = interrupted(train, tmp_path)
    with pytest.raises(CheckpointError, match="not finished.*fedsa-secure resume"):
        fedsa_secure.load(path, model=tiny_bert(), tokenizer=tiny_tokenizer)
    watcher = StopAfter(99)
    run = fedsa_secure.resume(
        path,
        tiny_bert(),
        small_dataset(rows=120),
        tokenizer=tiny_tokenizer,
        observers=[watcher],
    )
    assert watcher.done_before == 2
    assert run.metrics == whole.metrics
    assert run.history == whole.history
    for left, right in zip(run.clients, whole.clients, strict=True):
        assert all(torch.equal(t, right.tensors()[n]) for n, t in left.tensors().items())


def test_rounds_after_the_checkpoint_are_run_again(
    train: Any, tiny_bert: Any, tiny_tokenizer: Any, small_dataset: Any, tmp_path: Path
) -> None:
    """Broken off in round 3 with checkpoints every other round: the history is cut to round 2."""
    options = {"rounds": 5, "checkpoint_every": 2}
    whole = train(output_dir=str(tmp_path / "whole"), **options)
    with pytest.raises(InterruptedError):
        train(observers=[StopAfter(3)], **options)
    path = tmp_path / "run"
    assert [r.round for r in History(path).records()] == [1, 2, 3]
    rest = (tiny_bert(), small_dataset(rows=120))
    assert fedsa_secure.resume(path, *rest, tokenizer=tiny_tokenizer).history == whole.history
    first = tmp_path / "first"
    with pytest.raises(InterruptedError):  # before any checkpoint
        train(observers=[StopAfter(1)], output_dir=str(first), **options)
    assert fedsa_secure.resume(first, *rest, tokenizer=tiny_tokenizer).history == whole.history


def test_a_changed_run_is_not_opened(
    train: Any, tiny_bert: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    path = train().path
    with pytest.raises(CheckpointError, match="base model is not the one"):
        fedsa_secure.load(path, model=tiny_bert(seed=9), tokenizer=tiny_tokenizer)
    config = (path / "config.toml").read_text()
    (path / "config.toml").write_text(config.replace("alpha = 16.0", "alpha = 160.0"))
    with pytest.raises(CheckpointError, match=r"config\.toml has changed"):
        fedsa_secure.load(path, model=tiny_bert(), tokenizer=tiny_tokenizer)


def test_resuming_with_other_data_is_refused(
    train: Any, tiny_bert: Any, tiny_tokenizer: Any, small_dataset: Any, tmp_path: Path
) -> None:
    path = interrupted(train, tmp_path)
    before = (path / "checkpoint" / "state.json").read_bytes()
    for other in (small_dataset(rows=120, seed=1), small_dataset(rows=119)):
        with pytest.raises(CheckpointError, match="data are not those"):
            fedsa_secure.resume(path, tiny_bert(), other, tokenizer=tiny_tokenizer)
    assert (path / "checkpoint" / "state.json").read_bytes() == before


def test_resuming_with_another_configuration_is_refused(
    train: Any, tiny_bert: Any, tiny_tokenizer: Any, small_dataset: Any, tmp_path: Path
) -> None:
    path = interrupted(train, tmp_path)
    config = (path / "config.toml").read_text()
    (path / "config.toml").write_text(config.replace("local_steps = 2", "local_steps = 3"))
    rest = (tiny_bert(), small_dataset(rows=120))
    with pytest.raises(CheckpointError, match=r"config\.toml has changed"):
        fedsa_secure.resume(path, *rest, tokenizer=tiny_tokenizer)
    (path / "config.toml").write_text(config.replace("local_steps = 2", "local_stepz = 2"))
    with pytest.raises(CheckpointError, match=r"config\.toml is damaged.*did you mean"):
        fedsa_secure.resume(path, *rest, tokenizer=tiny_tokenizer)


def test_objects_must_be_given_again(train: Any, tmp_path: Path, tiny_bert: Any) -> None:
    path = interrupted(train, tmp_path)
    with pytest.raises(ConfigError, match="dataset: the run was begun with a Dataset object"):
        fedsa_secure.resume(path, tiny_bert())


def test_models_that_do_not_fit_are_refused(
    train: Any, tiny_bert: Any, tiny_roberta: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="5 labels and the data have 3.*num_labels=3"):
        train(model=tiny_bert(labels=5))
    with pytest.raises(ConfigError, match="max_length.*at most 64"):
        train(max_length=65)
    patient = copy.deepcopy(tiny_tokenizer)
    patient.model_max_length = 1000
    with pytest.raises(ConfigError, match="max_length.*at most 65"):
        # 66 positions, of which the first is behind that of the padding
        train(model=tiny_roberta(), tokenizer=patient, max_length=66)
    tiny_tokenizer_copy = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    tiny_tokenizer_copy.add_tokens(["one", "more"])
    with pytest.raises(ConfigError, match="tokenizer: it has 202 tokens"):
        train(tokenizer=tiny_tokenizer_copy)
    assert not (tmp_path / "run").exists()


def test_pairs_and_single_texts_are_told_apart(train: Any) -> None:
    run = train()
    assert run.clients[0].predict([]) == []
    with pytest.raises(ConfigError, match="texts"):
        run.clients[0].predict(["w1", ("w1", "w2")])
    with pytest.raises(ConfigError, match="texts: one string was given"):
        run.clients[0].predict("w1 w2")


def test_pairs_are_trained_and_predicted(train: Any, small_dataset: Any) -> None:
    left, right = small_dataset(rows=120), small_dataset(rows=120, seed=5)
    rows = Dataset.from_dict(
        {"premise": left["text"], "hypothesis": right["text"], "label": left["label"]}
    )
    run = train(dataset=DatasetDict(train=rows), text_column=("premise", "hypothesis"))
    assert len(run.clients[0].predict([("w1 w2", "w3"), ("w4", "w5")])) == 2
    with pytest.raises(ConfigError, match="texts: each text must be a pair"):
        run.clients[0].predict(["w1 w2"])


def test_tensorboard_events_are_written(train: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train()
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3]
    assert events.Scalars("loss")[0].value == pytest.approx(run.history[0].loss)
    assert events.Scalars("accuracy")[-1].value == pytest.approx(run.accuracy)


def test_a_run_folder_is_never_written_twice(train: Any, tmp_path: Path) -> None:
    run = train()
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="holds a run already.*resume"):
        train()
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        train(output_dir=str(tmp_path / "other"))
    assert os.listdir(tmp_path / "other") == ["thesis.txt"]
