"""A run, finished or freshly opened: its history, its clients, and their personal models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedsa_secure.adapters import AdaptedModel, save_peft_adapter
from fedsa_secure.config import TrainConfig
from fedsa_secure.data import PromptForm, encode_texts
from fedsa_secure.errors import CheckpointError, ConfigError
from fedsa_secure.federation.checkpoint import Checkpoint, StateStore
from fedsa_secure.federation.evaluation import ClientMetrics, mean_of, predict_classes
from fedsa_secure.federation.generation import write_answers
from fedsa_secure.federation.history import History, RoundRecord, RoundTiming, best_round
from fedsa_secure.federation.run_folder import RunFolder, RunSummary, config_digest
from fedsa_secure.federation.similarity import LayerSimilarity, layer_similarity
from fedsa_secure.files import writing
from fedsa_secure.types import NamedTensors, Role


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
        return f"Client({self.number}, {_score_shown(self.metrics.accuracy, self.metrics.loss)})"

    def tensors(self) -> NamedTensors:
        """Its trained tensors by name: the shared ones as of the last round and its own."""
        return self._run.client_tensors(self.number)

    def predict(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> list[str]:
        """The class that the client's personal model gives to each text or pair of texts.

        Raises:
            ConfigError: if a pair is given to a model of single texts, or the other way round, or
                the model generates.
        """
        return self._run.predict(self.number, texts)

    def generate(self, prompts: Sequence[str], max_new_tokens: int | None = None) -> list[str]:
        """What the client's personal model answers to each prompt, decoded greedily.

        Args:
            prompts: texts that are put into the form of the run's own prompts.
            max_new_tokens: longest answer; None for that of the run.

        Raises:
            ConfigError: if the model classifies.
        """
        return self._run.generate(self.number, prompts, max_new_tokens)


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
        self.privacy = summary.privacy
        """What the run promises about a record or a client; None without dp_epsilon."""
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
            f"{_score_shown(self.accuracy, self.loss)})"
        )

    @property
    def path(self) -> Path:
        """The run folder."""
        return self._folder.path

    @property
    def epsilon(self) -> float | None:
        """Certified ε of what was released; None without noise, or with noise from a seed."""
        return None if self.privacy is None else self.privacy.epsilon

    @property
    def metrics(self) -> list[ClientMetrics]:
        """Metrics of every client."""
        return [client.metrics for client in self.clients]

    @property
    def loss(self) -> float | None:
        """Mean over the clients of the personal model's loss on the client's own test part."""
        return mean_of(self.metrics, "loss")

    @property
    def accuracy(self) -> float | None:
        """Mean over the clients of the personal model's accuracy on the client's own test part."""
        return mean_of(self.metrics, "accuracy")

    @property
    def macro_f1(self) -> float | None:
        """Mean over the clients of the personal model's macro F1 on the client's own test part."""
        return mean_of(self.metrics, "macro_f1")

    @property
    def majority(self) -> float | None:
        """Mean over the clients of the majority-class baseline on the client's own test part."""
        return mean_of(self.metrics, "majority")

    @property
    def cross_loss(self) -> float | None:
        """Mean loss of the personal models on test rows of the other clients."""
        return mean_of(self.metrics, "cross_loss")

    @property
    def common_loss(self) -> float | None:
        """Mean loss of the personal models on the common test, if there is one."""
        return mean_of(self.metrics, "common_loss")

    @property
    def cross_accuracy(self) -> float | None:
        """Mean accuracy of the personal models on test rows of the other clients."""
        return mean_of(self.metrics, "cross_accuracy")

    @property
    def common_accuracy(self) -> float | None:
        """Mean accuracy of the personal models on the common balanced test, if there is one."""
        return mean_of(self.metrics, "common_accuracy")

    @property
    def best(self) -> RoundRecord | None:
        """The evaluated round with the best accuracy, chosen on the test rows: optimistic."""
        return best_round(self.history)

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
        return self._store.get(client).tensors(self._shared)

    def predict(self, client: int, texts: Sequence[str] | Sequence[tuple[str, str]]) -> list[str]:
        """Classes that one client's personal model gives; see ``Client.predict``."""
        if self._model.generates:
            raise ConfigError("model", "it writes answers and tells no classes", "use generate()")
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
        classes, _ = predict_classes(self._model, rows, np.arange(len(rows)))
        return [self.label_names[k] for k in classes]

    def generate(
        self, client: int, prompts: Sequence[str], max_new_tokens: int | None = None
    ) -> list[str]:
        """What one client's personal model answers; see ``Client.generate``."""
        if not self._model.generates:
            raise ConfigError("model", "it tells classes and writes no answers", "use predict()")
        if isinstance(prompts, str) or not all(isinstance(text, str) for text in prompts):
            raise ConfigError("prompts", "something else was given", "give a list of texts")
        if len(prompts) == 0:
            return []
        form = PromptForm(
            self._tokenizer, self.config.prompt_template, self._model.decoder_start_token
        )
        chats = [[{"role": "user", "content": text}] for text in prompts]
        cut = self.config.max_length if self._model.encoder_decoder else None
        tokens = form.prompt_ids(chats, cut)
        if not all(len(ids) for ids in tokens):
            raise ConfigError("prompts", "one of them is empty", "leave it out")
        self._model.load([self.client_tensors(client)], trained=())
        longest = max_new_tokens or self.config.max_new_tokens
        return write_answers(self._model, self._tokenizer, tokens, longest)

    def similarity(self) -> list[LayerSimilarity]:
        """How alike the clients' tensors are, layer by layer; see ``layer_similarity``."""
        pairs = zip(self._model.names([Role.A]), self._model.names([Role.B]), strict=True)
        clients = [self.client_tensors(client.number) for client in self.clients]
        return layer_similarity(clients, self._model.initial, list(pairs))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write one PEFT adapter folder per client, which ``PeftModel.from_pretrained`` reads."""
        for client in self.clients:
            name = f"client-{client.number:05d}"
            with writing(Path(folder)):
                save_peft_adapter(
                    self._model, client.tensors(), Path(folder) / name, self.config.model
                )


def _score_shown(accuracy: float | None, loss: float | None) -> str:
    return f"loss={loss:.3f}" if accuracy is None else f"accuracy={accuracy:.3f}"


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
