"""``train``, ``resume``, ``evaluate`` and ``load``: what users call."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from flwr_datasets.partitioner import Partitioner
from transformers import PreTrainedModel

from fedsa_secure.config import TrainConfig
from fedsa_secure.errors import CheckpointError
from fedsa_secure.federation.observer import Observer, TensorBoard
from fedsa_secure.federation.run import Run
from fedsa_secure.federation.run_folder import RunFolder, RunSummary
from fedsa_secure.runtimes.prepare import Given, Prepared, open_model, prepare
from fedsa_secure.runtimes.simulation import Simulation


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
        model: hub id, local folder, .gguf file, ``"minilm"``, or a transformers model for sequence
            classification or generation, which stays as it is.
        dataset: hub id, local folder or file, ``"lexicon"``, or a ``datasets`` object.
        partition: such as ``"dirichlet:0.5"``, or a partitioner of ``flwr-datasets``.
        tokenizer: name or object, if the model's own name does not lead to its tokenizer.
        observers: told of the progress.
        options: any other field of ``TrainConfig``.

    Returns:
        The finished run.

    Raises:
        ConfigError: if an option, the data or the model do not fit; nothing is written.
        PrivacyError: if an option, the model, or its start would break what ``dp_epsilon``
            promises; nothing is written.
        AdapterError: if ``clients_per_pass`` is a number above 1 and the model cannot be stacked.
        BudgetExceededError: before a round in which a data set would spend too much; the last good
            model is saved, and ``load`` opens it.
        DivergedError: if a client's training leaves the finite numbers (without privacy).
        CheckpointError: if the run folder cannot be written; ``resume`` goes on from there.

    Example:
        >>> run = fedsa_secure.train(rounds=2, clients=3)  # doctest: +SKIP
        >>> run.clients[0].predict(["what a wonderful day"])  # doctest: +SKIP
        ['positive']
    """
    given = Given(model, dataset, partition, tokenizer)
    config = TrainConfig.build(**given.options(), **options)
    prepared = prepare(given, config)
    folder = RunFolder.create(prepared.config)
    if prepared.split_key is not None:
        folder.write_split_key(prepared.split_key)
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
    Not so in a private run: what is made again has new coins and noise, and is counted.

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
    given = Given(model, dataset, partition, tokenizer)
    if folder.read_summary() is not None:
        return _open(folder, config, given)
    prepared = prepare(given, config, _split_key(folder, config))
    return _simulate(prepared, folder, observers, fresh=False)


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
    finished = _finished(folder)
    given = Given(model, dataset, partition, tokenizer)
    prepared = prepare(given, config, _split_key(folder, config))
    simulation = Simulation(prepared.config, prepared.model, prepared.data, folder)
    with closing(simulation):
        simulation.restore()
        summary = RunSummary(
            label_names=prepared.data.label_names,
            clients=tuple(simulation.evaluate()),
            privacy=finished.privacy,
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
        ConfigError: if the model, or the PEFT adapter that the run began with, is no longer there.
    """
    folder, config = RunFolder.open(Path(path))
    return _open(folder, config, Given(model=model, tokenizer=tokenizer))


def _simulate(
    prepared: Prepared, folder: RunFolder, observers: Sequence[Observer], fresh: bool
) -> Run:
    if TensorBoard.available():
        observers = [*observers, TensorBoard(folder.tensorboard)]
    simulation = Simulation(prepared.config, prepared.model, prepared.data, folder, observers)
    with closing(simulation):
        if not fresh:
            simulation.restore()
        summary = simulation.run()
    return Run(folder, prepared.config, summary, prepared.model, prepared.tokenizer)


def _split_key(folder: RunFolder, config: TrainConfig) -> bytes | None:
    """The key of a private run: under another one, rows that were tested would be trained on."""
    key = folder.read_split_key()
    if key is None and config.dp_epsilon is not None:
        raise CheckpointError(
            f"{folder.path} is a private run without its split.key, so it cannot be told which "
            "rows were for the test; put the file back, or start a new run"
        )
    return key


def _open(folder: RunFolder, config: TrainConfig, given: Given) -> Run:
    summary = _finished(folder)
    model, tokenizer = open_model(given, config, _labels(config, summary))
    return Run(folder, config, summary, model, tokenizer)


def _labels(config: TrainConfig, summary: RunSummary) -> int | None:
    return None if config.task == "generation" else len(summary.label_names)


def _finished(folder: RunFolder) -> RunSummary:
    summary = folder.read_summary()
    if summary is None:
        raise CheckpointError(
            f"the run in {folder.path} is not finished; run: fedsa-secure resume {folder.path}"
        )
    return summary
