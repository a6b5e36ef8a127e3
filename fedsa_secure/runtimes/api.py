"""``train``, ``resume``, ``evaluate`` and ``load``: what users call."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from flwr_datasets.partitioner import Partitioner
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedsa_secure.adapters import AdaptedModel, LoRASettings, attach, load_pretrained
from fedsa_secure.adapters.pretrained import load_tokenizer
from fedsa_secure.config import TrainConfig
from fedsa_secure.data import FederatedData, collate, divide, encode_division
from fedsa_secure.errors import AdapterError, CheckpointError, ConfigError
from fedsa_secure.federation.observer import Observer, TensorBoard
from fedsa_secure.federation.run import Run
from fedsa_secure.federation.run_folder import OBJECT, RunFolder, RunSummary
from fedsa_secure.federation.stacking import clients_per_pass
from fedsa_secure.methods import find_method
from fedsa_secure.runtimes.simulation import Simulation

_log = logging.getLogger(__name__)


_KINDS: dict[str, tuple[type, ...]] = {
    "model": (str, PreTrainedModel),
    "dataset": (str, Dataset, DatasetDict),
    "partition": (str, Partitioner),
    "tokenizer": (str, PreTrainedTokenizerBase),
}


@dataclass(frozen=True)
class _Given:
    """Model, data and partition as the user gave them: names or objects."""

    model: Any = None
    dataset: Any = None
    partition: Any = None
    tokenizer: Any = None

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
            if isinstance(value, Path):
                object.__setattr__(self, name, str(value))
            elif value is not None and not isinstance(value, kinds):
                expected = ", ".join(kind.__name__ for kind in kinds)
                raise ConfigError(
                    name, f"a {type(value).__name__} was given", f"give one of: {expected}"
                )

    def options(self) -> dict[str, str]:
        """What the configuration notes of them; of an object only its kind."""
        return {
            name: value if isinstance(value, str) else OBJECT + type(value).__name__
            for name, value in (
                ("model", self.model),
                ("dataset", self.dataset),
                ("partition", self.partition),
            )
            if value is not None
        }

    def pick(self, name: str, config: TrainConfig) -> Any:
        """The object that was given, or the name in the configuration.

        Raises:
            ConfigError: if the run was begun with an object, and it is not given again.
        """
        value, noted = getattr(self, name), getattr(config, name)
        if value is not None:
            return value
        if noted.startswith(OBJECT):
            raise ConfigError(
                name,
                f"the run was begun with a {noted.removeprefix(OBJECT)} object, which cannot be "
                "stored",
                f"pass it again as {name}=…",
            )
        return noted


def train(
    model: str | PreTrainedModel | None = None,
    dataset: str | Dataset | DatasetDict | None = None,
    partition: str | Partitioner | None = None,
    *,
    tokenizer: Any = None,
    observers: Sequence[Observer] = (),
    **options: Any,
) -> Run:
    """Fine-tune a language model over simulated clients.

    Without arguments: the embedded model and data, ten clients, FedSA-LoRA, no network.

    Args:
        model: hub id, local folder, ``"minilm"``, or a transformers model for sequence
            classification, which stays as it is.
        dataset: hub id, local folder or file, ``"lexicon"``, or a ``datasets`` object.
        partition: such as ``"dirichlet:0.5"``, or a partitioner of ``flwr-datasets``.
        tokenizer: if the model is an object whose name does not lead to its tokenizer.
        observers: told of the progress.
        options: any other field of ``TrainConfig``.

    Returns:
        The finished run.

    Raises:
        ConfigError: if an option, the data or the model do not fit; nothing is written.
        CheckpointError: if the run folder cannot be written; ``resume`` goes on from there.

    Example:
        >>> run = fedsa_secure.train(rounds=2, clients=3)  # doctest: +SKIP
        >>> run.clients[0].predict(["what a wonderful day"])  # doctest: +SKIP
        ['positive']
    """
    given = _Given(model, dataset, partition, tokenizer)
    config = TrainConfig.build(**given.options(), **options)
    prepared = _prepare(given, config)
    folder = RunFolder.create(prepared.config)
    return _simulate(prepared, folder, observers, fresh=True)


def resume(
    path: str | Path,
    model: PreTrainedModel | None = None,
    dataset: Dataset | DatasetDict | None = None,
    partition: Partitioner | None = None,
    *,
    tokenizer: Any = None,
    observers: Sequence[Observer] = (),
) -> Run:
    """Go on with a run that was interrupted; a finished run is returned as it is.

    The result is the same, byte for byte, as without the interruption (same machine and versions).

    Args:
        path: the run folder.
        model: again, if the run was begun with an object.
        dataset: again, if the run was begun with an object.
        partition: again, if the run was begun with an object.
        tokenizer: again, if the run was begun with one.
        observers: told of the progress.

    Raises:
        CheckpointError: if the folder is no run, is damaged, or its configuration or data changed.
    """
    folder, config = RunFolder.open(Path(path))
    given = _Given(model, dataset, partition, tokenizer)
    if folder.read_summary() is not None:
        return _open(folder, config, given)
    return _simulate(_prepare(given, config), folder, observers, fresh=False)


def evaluate(
    path: str | Path,
    model: PreTrainedModel | None = None,
    dataset: Dataset | DatasetDict | None = None,
    partition: Partitioner | None = None,
    *,
    tokenizer: Any = None,
) -> Run:
    """Measure the personal models of a finished run again, from its checkpoint and its data.

    Args and errors: as for ``resume``.
    """
    folder, config = RunFolder.open(Path(path))
    _finished(folder)
    prepared = _prepare(_Given(model, dataset, partition, tokenizer), config)
    simulation = Simulation(prepared.config, prepared.model, prepared.data, folder)
    simulation.restore()
    summary = RunSummary(
        label_names=prepared.data.label_names, clients=tuple(simulation.evaluate())
    )
    return Run(folder, config, summary, prepared.model, prepared.tokenizer)


def load(path: str | Path, model: PreTrainedModel | None = None, *, tokenizer: Any = None) -> Run:
    """Open a finished run, for its history, metrics and personal models.

    Args:
        path: the run folder.
        model: again, if the run was begun with an object.
        tokenizer: again, if the run was begun with one.

    Raises:
        CheckpointError: if the folder is no run, is damaged, or the run is not finished.
    """
    folder, config = RunFolder.open(Path(path))
    return _open(folder, config, _Given(model=model, tokenizer=tokenizer))


@dataclass(frozen=True)
class _Prepared:
    config: TrainConfig
    model: AdaptedModel
    data: FederatedData
    tokenizer: Any


def _prepare(given: _Given, config: TrainConfig) -> _Prepared:
    """Everything that can be refused is refused here, before anything is written."""
    find_method(config.method, config.head)
    device = _device(config.device)
    division = divide(given.pick("dataset", config), given.pick("partition", config), config)
    model, tokenizer = _model(given, config, len(division.label_names))
    data = encode_division(division, tokenizer, config.max_length)
    adapted = _attach(model, config, device)
    config = config.replace(
        clients=len(data.shards),
        clients_per_pass=_clients_per_pass(config, adapted, data),
        text_column=division.pool.texts,
    )
    return _Prepared(config, adapted, data, tokenizer)


def _clients_per_pass(config: TrainConfig, model: AdaptedModel, data: FederatedData) -> int:
    """Resolve the option, and try it with two rows: some models cannot be stacked at all.

    Raises:
        AdapterError: if the model cannot be stacked and the user asked for it by number.
        ConfigError: if the model is not one that classifies sequences.
    """
    wanted = clients_per_pass(config, data, model.device)
    stack, row = min(wanted, 2), data.shards[0].train[:1]
    model.load([{}] * stack, trained=())
    try:
        with torch.no_grad():
            logits = model(collate(data.rows, [row] * stack, model.device).inputs)
    except AdapterError as error:
        if config.clients_per_pass != "auto":  # noqa: S105 - no password
            raise
        _log.info("clients_per_pass is 1: %s", error)
        return 1
    if logits.shape != (stack, len(data.label_names)):
        raise ConfigError(
            "model", "it does not classify sequences", "give a model for sequence classification"
        )
    return wanted


def _simulate(
    prepared: _Prepared, folder: RunFolder, observers: Sequence[Observer], fresh: bool
) -> Run:
    if TensorBoard.available():
        observers = [*observers, TensorBoard(folder.tensorboard)]
    simulation = Simulation(prepared.config, prepared.model, prepared.data, folder, observers)
    if not fresh:
        simulation.restore()
    summary = simulation.run()
    return Run(folder, prepared.config, summary, prepared.model, prepared.tokenizer)


def _open(folder: RunFolder, config: TrainConfig, given: _Given) -> Run:
    summary = _finished(folder)
    model, tokenizer = _model(given, config, len(summary.label_names))
    adapted = _attach(model, config, _device(config.device))
    return Run(folder, config, summary, adapted, tokenizer)


def _finished(folder: RunFolder) -> RunSummary:
    summary = folder.read_summary()
    if summary is None:
        raise CheckpointError(
            f"the run in {folder.path} is not finished; run: fedsa-secure resume {folder.path}"
        )
    return summary


def _model(given: _Given, config: TrainConfig, labels: int) -> tuple[Any, Any]:
    """The base model and its tokenizer, checked against each other and the data."""
    source = given.pick("model", config)
    if isinstance(source, str):
        model, tokenizer = load_pretrained(source, labels, config.seed)
    else:
        model, tokenizer = copy.deepcopy(source), None
        if model.config.num_labels != labels:
            raise ConfigError(
                "model",
                f"it has {model.config.num_labels} labels and the data have {labels}",
                f"build it with num_labels={labels}",
            )
    if isinstance(given.tokenizer, str):
        tokenizer = load_tokenizer(given.tokenizer)
    else:
        tokenizer = given.tokenizer or tokenizer or load_tokenizer(model.config.name_or_path)
    if len(tokenizer) > model.config.vocab_size:
        raise ConfigError(
            "tokenizer",
            f"it has {len(tokenizer)} tokens and the model only {model.config.vocab_size}",
            "pass the tokenizer that belongs to the model",
        )
    positions = getattr(model.config, "max_position_embeddings", None) or config.max_length
    # RoBERTa's embeddings have a padding index of their own and count positions from behind it.
    padding = getattr(getattr(model.base_model, "embeddings", None), "padding_idx", None)
    positions -= 0 if padding is None else padding + 1
    longest = min(positions, tokenizer.model_max_length)
    if config.max_length > longest:
        raise ConfigError(
            "max_length", f"the model takes at most {longest} tokens", f"set at most {longest}"
        )
    return model, tokenizer


def _attach(model: Any, config: TrainConfig, device: torch.device) -> AdaptedModel:
    settings = LoRASettings(
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        target_modules=config.target_modules,
    )
    return attach(model.to(device), settings, config.seed)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigError("device", f"cannot use {name!r}: {reason}", "use auto or cpu") from error
    return device
