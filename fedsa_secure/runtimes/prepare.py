"""Model, data and partition as the user gave them, checked against each other."""

import copy
import logging
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
from fedsa_secure.errors import AdapterError, ConfigError
from fedsa_secure.federation.run_folder import OBJECT
from fedsa_secure.federation.stacking import clients_per_pass
from fedsa_secure.methods import find_method

_log = logging.getLogger(__name__)

_KINDS: dict[str, tuple[type, ...]] = {
    "model": (str, PreTrainedModel),
    "dataset": (str, Dataset, DatasetDict),
    "partition": (str, Partitioner),
    "tokenizer": (str, PreTrainedTokenizerBase),
}


@dataclass(frozen=True)
class Given:
    """What the user passed: names, objects, or None for what the configuration says.

    Raises:
        ConfigError: if one of them is neither a name nor an object of the right kind.
    """

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


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs, and its configuration with all choices made."""

    config: TrainConfig
    model: AdaptedModel
    data: FederatedData
    tokenizer: Any


def prepare(given: Given, config: TrainConfig) -> Prepared:
    """Everything that can be refused is refused here, before anything is written."""
    find_method(config.method, config.head)
    _device(config.device)
    division = divide(given.pick("dataset", config), given.pick("partition", config), config)
    adapted, tokenizer = open_model(given, config, len(division.label_names))
    data = encode_division(division, tokenizer, config.max_length)
    config = config.replace(
        clients=len(data.shards),
        clients_per_pass=_clients_per_pass(config, adapted, data),
        text_column=division.pool.texts,
    )
    return Prepared(config, adapted, data, tokenizer)


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


def open_model(given: Given, config: TrainConfig, labels: int) -> tuple[AdaptedModel, Any]:
    """The base model with adapters, and its tokenizer.

    Raises:
        ConfigError: if model, tokenizer and data do not fit each other.
    """
    model, tokenizer = _model(given, config, labels)
    settings = LoRASettings(
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        target_modules=config.target_modules,
    )
    return attach(model.to(_device(config.device)), settings, config.seed), tokenizer


def _model(given: Given, config: TrainConfig, labels: int) -> tuple[Any, Any]:
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
    longest = min(_positions(model, config.max_length), tokenizer.model_max_length)
    if config.max_length > longest:
        raise ConfigError(
            "max_length", f"the model takes at most {longest} tokens", f"set at most {longest}"
        )
    return model, tokenizer


def _positions(model: Any, wanted: int) -> int:
    """Tokens that a model has positions for; as many as wanted if it does not count them."""
    count = int(getattr(model.config, "max_position_embeddings", None) or wanted)
    # RoBERTa's embeddings have a padding index of their own and count positions from behind it.
    padding = getattr(getattr(model.base_model, "embeddings", None), "padding_idx", None)
    return count if padding is None else count - padding - 1


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
