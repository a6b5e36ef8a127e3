"""A run, finished or freshly opened: its history, its clients, and their personal models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedsa_secure.adapters import AdaptedModel, save_peft_adapter
from fedsa_secure.config import TrainConfig
from fedsa_secure.data import encode_texts
from fedsa_secure.errors import CheckpointError, ConfigError
from fedsa_secure.federation.checkpoint import Checkpoint, StateStore
from fedsa_secure.federation.evaluation import ClientMetrics, predict_classes
from fedsa_secure.federation.files import writing
from fedsa_secure.federation.history import History, RoundRecord, RoundTiming
from fedsa_secure.federation.run_folder import RunFolder, RunSummary, config_digest
from fedsa_secure.types import NamedTensors


class Client:
    """One client of a finished run.

    Args:
        run: the run it belongs to.
        number: counted from 0.
        metrics: how its personal model did.
    """

    def __init__(self, run: "Run", number: int, metrics: ClientMetrics) -> None:
        self._run = run
        self.number = number
        self.metrics = metrics

    def __repr__(self) -> str:
        return f"Client({self.number}, accuracy={self.metrics.accuracy:.3f})"

    def tensors(self) -> NamedTensors:
        """Its trained tensors by name: the shared ones as of the last round and its own."""
        return self._run.client_tensors(self.number)

    def predict(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> list[str]:
        """The class that the client's personal model gives to each text or pair of texts.

        Raises:
            ConfigError: if a pair is given to a model of single texts, or the other way round.
        """
        return self._run.predict(self.number, texts)


class Run:
    """What ``train``, ``resume`` and ``load`` return.

    Args:
        folder: the run folder.
        config: its resolved configuration.
        summary: the metrics of its clients.
        model: the base model with adapters.
        tokenizer: the tokenizer of the model.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: TrainConfig,
        summary: RunSummary,
        model: AdaptedModel,
        tokenizer: Any,
    ) -> None:
        self._folder, self._model, self._tokenizer = folder, model, tokenizer
        self.config = config
        self.label_names = summary.label_names
        self.clients = [Client(self, m.client, m) for m in summary.clients]
        self._store = StateStore(folder.checkpoint, in_memory=False)
        restored = self._store.restore()
        if restored is None:
            raise CheckpointError(f"{folder.path} has a result but no checkpoint")
        check_origin(restored[0], folder.path, config, model)
        self._shared = restored[1]

    def __repr__(self) -> str:
        return (
            f"Run({str(self.path)!r}, {self.config.method}-{self.config.adapter}, "
            f"accuracy={self.accuracy:.3f})"
        )

    @property
    def path(self) -> Path:
        """The run folder."""
        return self._folder.path

    @property
    def metrics(self) -> list[ClientMetrics]:
        """Metrics of every client."""
        return [client.metrics for client in self.clients]

    @property
    def accuracy(self) -> float:
        """Mean over the clients of the personal model's accuracy on the client's own test part."""
        return float(np.mean([m.accuracy for m in self.metrics]))

    @property
    def macro_f1(self) -> float:
        """Mean over the clients of the personal model's macro F1 on the client's own test part."""
        return float(np.mean([m.macro_f1 for m in self.metrics]))

    @property
    def majority(self) -> float:
        """Mean over the clients of the majority-class baseline on the client's own test part."""
        return float(np.mean([m.majority for m in self.metrics]))

    @property
    def common_accuracy(self) -> float | None:
        """Mean accuracy of the personal models on the common balanced test, if there is one."""
        values = [m.common_accuracy for m in self.metrics if m.common_accuracy is not None]
        return float(np.mean(values)) if values else None

    @property
    def history(self) -> list[RoundRecord]:
        """One record per round."""
        return History(self.path).records()

    @property
    def timings(self) -> dict[int, RoundTiming]:
        """Seconds per phase, by round."""
        return History(self.path).timings()

    def client_tensors(self, client: int) -> NamedTensors:
        """All trained tensors of one client by name, without client axis."""
        return {**self._shared, **self._store.get(client).personal}

    def predict(self, client: int, texts: Sequence[str] | Sequence[tuple[str, str]]) -> list[str]:
        """Classes that one client's personal model gives; see ``Client.predict``."""
        if isinstance(texts, str):
            raise ConfigError("texts", "one string was given", "give a list of texts")
        if len(texts) == 0:
            return []
        pairs = [tuple(t) if isinstance(t, tuple | list) else (t,) for t in texts]
        expected = len(self.config.text_column or ()) or len(pairs[0])
        if any(
            len(pair) != expected or not all(isinstance(text, str) for text in pair)
            for pair in pairs
        ):
            raise ConfigError(
                "texts", f"each text must be {'a pair' if expected == 2 else 'one string'}"
            )
        columns_of_text = [list(column) for column in zip(*pairs, strict=True)]
        rows = encode_texts(columns_of_text, self._tokenizer, self.config.max_length)
        self._model.load([self.client_tensors(client)], trained=())
        classes = predict_classes(self._model, rows, np.arange(len(rows)))
        return [self.label_names[k] for k in classes]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write one PEFT adapter folder per client, which ``PeftModel.from_pretrained`` reads."""
        for client in self.clients:
            name = f"client-{client.number:05d}"
            with writing(Path(folder)):
                save_peft_adapter(
                    self._model, client.tensors(), Path(folder) / name, self.config.model
                )


def check_origin(
    checkpoint: Checkpoint, folder: Path, config: TrainConfig, model: AdaptedModel
) -> None:
    """Refuse a configuration or a base model that a checkpoint was not made with.

    Raises:
        CheckpointError: naming which of them differs.
    """
    if checkpoint.config != config_digest(config):
        raise CheckpointError(
            f"{folder / 'config.toml'} has changed since the run began; put it back, or train anew "
            "into another output_dir"
        )
    if checkpoint.model != model.fingerprint:
        raise CheckpointError(
            "the base model is not the one that the run began with; give the same model, or train "
            "anew into another output_dir"
        )
