"""Options that change how a run is computed, and the scores that are reported beside its own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generation import make_questions, make_tokenizer, make_writer

import fedsa_secure
from fedsa_secure import AdapterError, ConfigError, TrainConfig
from fedsa_secure.adapters import AdaptedModel
from fedsa_secure.config import read_options
from fedsa_secure.data import divide, encode_division
from fedsa_secure.federation.evaluation import rows_of_others
from fedsa_secure.federation.history import RoundRecord, best_round
from fedsa_secure.federation.run_folder import config_digest
from fedsa_secure.federation.schedule import rate_factor

SMALL = {
    "clients": 3,
    "rounds": 2,
    "local_steps": 3,
    "batch_size": 6,
    "max_length": 16,
    "rank": 3,
    "common_rows": 0,
    "dropout": 0.2,
    "partition": "iid",
    "learning_rate": 5e-3,
}


@pytest.fixture
def train(tiny_bert: Any, tiny_tokenizer: Any, small_dataset: Any, tmp_path: Path) -> Any:
    """`train(name, **options)` on a classification task, into `tmp_path/name`."""

    def make(name: str = "run", **options: Any) -> fedsa_secure.Run:
        return fedsa_secure.train(
            options.pop("model", None) or tiny_bert(),
            options.pop("dataset", None) or small_dataset(rows=90),
            tokenizer=tiny_tokenizer,
            output_dir=str(tmp_path / name),
            **{**SMALL, **options},
        )

    return make


# --- memory ----------------------------------------------------------------------------------


def test_checkpointed_gradients_change_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    switched, original = [], AdaptedModel.checkpoint_gradients

    def switch(model: AdaptedModel) -> None:
        switched.append(model)
        original(model)

    monkeypatch.setattr(AdaptedModel, "checkpoint_gradients", switch)
    runs = [
        fedsa_secure.train(
            make_writer("llama"),
            make_questions(),
            tokenizer=make_tokenizer(),
            output_dir=str(tmp_path / str(on)),
            gradient_checkpointing=on,
            decode_rows=0,
            **SMALL,
        )
        for on in (False, True)
    ]
    assert len(switched) == 1
    for client in range(3):
        plain, ours = (run.clients[client].tensors() for run in runs)
        for name, expected in plain.items():
            torch.testing.assert_close(ours[name], expected, atol=1e-6, rtol=1e-5)


def test_a_model_without_marked_layers_cannot_checkpoint(train: Any, monkeypatch: Any) -> None:
    module = sys.modules["fedsa_secure.adapters.attach"]  # the name also is a function's
    monkeypatch.setattr(module, "GradientCheckpointingLayer", type(None))
    with pytest.raises(ConfigError, match="gradient_checkpointing: .*no layers marked for it"):
        train(gradient_checkpointing=True)


def test_half_precision_is_for_products_only(train: Any, monkeypatch: Any) -> None:
    seen = set()
    linear = torch.nn.functional.linear

    def spy(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        y = linear(x, *rest)
        seen.add(y.dtype)
        return y

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    half = train("half", precision="bf16")
    assert seen == {torch.bfloat16}
    seen.clear()
    full = train("full")
    assert seen == {torch.float32}
    for client in half.clients:
        assert {tensor.dtype for tensor in client.tensors().values()} == {torch.float32}
    assert half.history[-1].loss == pytest.approx(full.history[-1].loss, rel=0.05)
    assert half.history[-1].loss != full.history[-1].loss


@pytest.mark.parametrize(
    "models",
    [
        pytest.param(["llama-lora-fp32"], id="llama"),
        pytest.param(
            [
                *(f"{model}-fp32" for model in ("bert-lora", "bert-vera", "llama-vera")),
                *(
                    f"{family}-{kind}-{variant}"
                    for family in ("bert", "llama")
                    for kind in ("lora", "vera")
                    for variant in ("bf16", "checkpointed")
                ),
            ],
            marks=pytest.mark.slow,
            id="others",
        ),
    ],
)
def test_a_compiled_model_is_one_graph_and_the_same_model(models: list[str]) -> None:
    """In a process of its own: the checks of shapes that tests add cannot be compiled."""
    script = Path(__file__).parents[1] / "compiled_models.py"
    done = subprocess.run(
        [sys.executable, str(script), *models], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{model} 1" for model in models]


def test_the_option_compiles(train: Any, monkeypatch: Any) -> None:
    calls = []
    monkeypatch.setattr(AdaptedModel, "compile", lambda model: calls.append(model))
    train("plain")
    assert calls == []
    train("compiled", compile=True)
    assert len(calls) == 1


def test_layers_without_gradients_are_refused_before_anything_is_written(
    train: Any, tiny_bert: Any, tmp_path: Path
) -> None:
    class ForwardOnly(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.detach())

    model = tiny_bert()
    for layer in model.bert.encoder.layer:
        old = layer.attention.self.query
        layer.attention.self.query = ForwardOnly(old.in_features, old.out_features)
    with pytest.raises(AdapterError, match="query is a ForwardOnly, which passes no gradient"):
        train(model=model)
    assert not (tmp_path / "run").exists()


# --- schedule --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1, 0.8535533905932737, 0.5, 0.14644660940672627]),
    ],
)
def test_the_rate_rises_to_its_peak_and_then_falls(schedule: str, expected: list[float]) -> None:
    assert [rate_factor(schedule, k, 7, warmup=3) for k in range(7)] == pytest.approx(expected)


def test_the_whole_run_warms_up(train: Any) -> None:
    run = train(warmup_steps=5, schedule="constant")
    rates = [record.learning_rate for record in run.history]
    assert rates == pytest.approx([5e-3 / 6, 5e-3 * 4 / 6])


def test_a_run_that_only_warms_up_is_refused() -> None:
    with pytest.raises(ConfigError, match="warmup_steps=6 leaves nothing of the 6 local steps"):
        TrainConfig.build(rounds=2, local_steps=3, warmup_steps=6)


# --- scores ----------------------------------------------------------------------------------


def record(number: int, accuracy: float | None, loss: float | None) -> RoundRecord:
    return RoundRecord(
        round=number,
        clients=(0,),
        learning_rate=1,
        loss=1,
        uplink_bytes=0,
        downlink_bytes=0,
        accuracy=accuracy,
        test_loss=loss,
    )


def test_the_best_round_is_that_of_accuracy_and_then_of_loss() -> None:
    assert best_round([]) is None
    assert best_round([record(1, None, None)]) is None
    rounds = [record(1, 0.5, 0.1), record(2, 0.7, 0.4), record(3, 0.7, 0.3), record(4, None, None)]
    assert best_round(rounds).round == 3
    assert best_round([record(1, None, 0.5), record(2, None, 0.2)]).round == 2


def test_cross_scores_are_those_on_the_other_clients_tests(train: Any, small_dataset: Any) -> None:
    """By predicting all rows of the pool, and asking each shard which are its test rows."""
    data = small_dataset(rows=90)
    run = train(dataset=data, cross_rows=1000, rounds=4, local_steps=6)
    config = run.config
    shards = fedsa_secure.data.divide(data, config.partition, config).shards
    labels = np.asarray(data["label"])
    for client in run.clients:
        names = client.predict(list(data["text"]))
        right = np.asarray([name == f"class{k}" for name, k in zip(names, labels, strict=True)])
        others = np.concatenate([s.test for k, s in enumerate(shards) if k != client.number])
        assert client.metrics.cross_accuracy == pytest.approx(right[others].mean())
        assert client.metrics.accuracy == pytest.approx(right[shards[client.number].test].mean())
    assert run.cross_accuracy == pytest.approx(
        np.mean([c.metrics.cross_accuracy for c in run.clients])
    )


@pytest.mark.parametrize(("asked", "given"), [(0, 0), (7, 7), (1000, 12)])
def test_as_many_rows_of_others_are_tried_as_were_asked_for(
    federation_data: Any, asked: int, given: int
) -> None:
    config = TrainConfig(cross_rows=asked)
    rows = rows_of_others(federation_data, 1, config)
    others = {row for k, s in enumerate(federation_data.shards) if k != 1 for row in s.test}
    assert len(set(rows.tolist())) == given
    assert set(rows.tolist()) <= others


@pytest.fixture
def federation_data(tiny_tokenizer: Any, small_dataset: Any) -> Any:
    config = TrainConfig(clients=3, common_rows=0)
    division = divide(small_dataset(rows=90), "iid", config)
    return encode_division(division, tiny_tokenizer, config)


def test_cross_scores_can_be_left_out(train: Any) -> None:
    run = train(cross_rows=0)
    assert run.cross_accuracy is None
    assert train("alone", clients=1, secure_aggregation=False).cross_accuracy is None


# --- a start from PEFT -----------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", "rslora", "vera"])
def test_a_saved_client_is_a_start(
    train: Any, tiny_bert: Any, tiny_tokenizer: Any, adapter: str
) -> None:
    first = train("first", adapter=adapter, local_steps=6)
    folder = first.path / "adapters" / "client-00001"
    again = train(
        "again", initial_adapter=str(folder), rounds=1, local_steps=1, learning_rate=1e-30,
        head_learning_rate=1e-30,
    )  # fmt: skip
    assert (again.config.adapter, again.config.rank) == (adapter, 3)
    texts = [f"w{k} w{k + 5}" for k in range(20)]
    for client in again.clients:
        assert client.predict(texts) == first.clients[1].predict(texts)
    opened = fedsa_secure.load(again.path, tiny_bert(), tokenizer=tiny_tokenizer)
    assert opened.clients[0].predict(texts) == first.clients[1].predict(texts)


def test_a_run_that_starts_from_vera_keeps_its_defaults_and_opens_again(
    train: Any, tiny_bert: Any, tiny_tokenizer: Any, small_dataset: Any
) -> None:
    first = train("first", adapter="vera", learning_rate=0.1)
    options = {"rounds": 1, "local_steps": 1, "learning_rate": None}
    again = fedsa_secure.train(
        tiny_bert(),
        small_dataset(rows=90),
        tokenizer=tiny_tokenizer,
        output_dir=str(first.path.parent / "again"),
        initial_adapter=str(first.path / "adapters" / "client-00000"),
        **{k: v for k, v in {**SMALL, **options}.items() if v is not None},
    )
    assert (again.config.learning_rate, again.config.head_learning_rate) == (0.1, 4e-3)
    fedsa_secure.load(again.path, tiny_bert(), tokenizer=tiny_tokenizer)


def test_the_place_of_the_start_is_kept_in_full(train: Any, monkeypatch: Any) -> None:
    """A run that began from a relative path is opened from another folder."""
    first = train("first", rounds=1, local_steps=1)
    monkeypatch.chdir(first.path)
    again = train("again", initial_adapter="adapters/client-00000", rounds=1, local_steps=1)
    assert again.config.initial_adapter == str((first.path / "adapters/client-00000").resolve())


def test_the_digest_of_a_run_counts_what_differs_from_the_defaults_only() -> None:
    assert config_digest(TrainConfig()) == config_digest(TrainConfig(output_dir="elsewhere"))
    assert config_digest(TrainConfig()) == config_digest(TrainConfig(warmup_steps=0))
    assert config_digest(TrainConfig()) != config_digest(TrainConfig(warmup_steps=1))


def test_options_switched_off_stay_off_in_the_file(tmp_path: Path) -> None:
    config = TrainConfig.build(adapter="vera", head_learning_rate=None, max_grad_norm=None)
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert TrainConfig.build(**read_options(path)) == config


@pytest.mark.parametrize(
    ("option", "value"),
    [("rank", 4), ("alpha", 3.0), ("adapter", "rslora"), ("target_modules", ("query",))],
)
def test_options_that_contradict_the_start_are_refused(train: Any, option: str, value: Any) -> None:
    first = train("first", rounds=1, local_steps=1)
    folder = str(first.path / "adapters" / "client-00000")
    options = {"rank": 3, option: value}
    with pytest.raises(ConfigError, match=f"^{option}: .*client-00000 has .* was asked for"):
        train("again", initial_adapter=folder, **options)


# --- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedsa", "ffa", "random-a"])
@pytest.mark.parametrize("adapter", ["lora", "rslora", "vera"])
def test_one_name_stands_for_method_and_adapter(method: str, adapter: str) -> None:
    config = TrainConfig.build(method=f"{method}-{adapter}")
    assert (config.method, config.adapter) == (method, adapter)
    assert TrainConfig.build(method=f"{method}-{adapter}", adapter=adapter) == config


def test_a_name_that_contradicts_the_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match="method='fedsa-vera' does not go with adapter='lora'"):
        TrainConfig.build(method="fedsa-vera", adapter="lora")


def test_defaults_depend_on_the_adapter() -> None:
    assert TrainConfig.build().rank == TrainConfig.build(adapter="rslora").rank == 8
    vera = TrainConfig.build(adapter="vera")
    assert (vera.rank, vera.head_learning_rate) == (256, 4e-3)
    assert TrainConfig.build(adapter="vera", rank=3).rank == 3
