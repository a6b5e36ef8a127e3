"""Model, data and partition as the user gave them, checked against each other."""

import copy
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from flwr_datasets.partitioner import Partitioner
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedsa_secure.adapters import (
    AdaptedModel,
    AdapterSettings,
    PeftAdapter,
    attach,
    load_pretrained,
    load_tokenizer,
    read_peft_adapter,
)
from fedsa_secure.config import TrainConfig
from fedsa_secure.csprng import derive_key
from fedsa_secure.data import FederatedData, collate, divide, encode_division, pad_token
from fedsa_secure.errors import AdapterError, ConfigError, PrivacyError
from fedsa_secure.federation.local_training import method_of
from fedsa_secure.federation.mechanism import calibrated
from fedsa_secure.federation.private_options import check_private_options
from fedsa_secure.federation.private_training import released_method
from fedsa_secure.federation.run_folder import OBJECT
from fedsa_secure.federation.secure_aggregation import check_options
from fedsa_secure.federation.stacking import clients_per_pass
from fedsa_secure.methods import Method, find_method
from fedsa_secure.privacy import home_folder
from fedsa_secure.runtimes.private_probe import refuse_unsound_model
from fedsa_secure.streams import derive

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
    """Everything a run needs, and its configuration with all choices made.

    ``split_key`` is the secret that splits train from test in a private run, else None.
    """

    config: TrainConfig
    model: AdaptedModel
    data: FederatedData
    tokenizer: Any
    split_key: bytes | None = None


def prepare(given: Given, config: TrainConfig, split_key: bytes | None = None) -> Prepared:
    """Everything that can be refused is refused here, before anything is written.

    Args:
        given: what the user passed.
        config: the options.
        split_key: that of a private run that was begun before; None draws a new one.
    """
    find_method(config.method, config.head)
    _device(config.device)
    config = with_initial_adapter(config)
    split_key = _split_key(config, split_key)
    source, spec = given.pick("dataset", config), given.pick("partition", config)
    division = divide(source, spec, config, split_key)
    method = method_of(config, division.generation)
    task = "generation" if division.generation else "classification"
    labels = None if division.generation else len(division.label_names)
    adapted, tokenizer = open_model(given, config, labels)
    data = encode_division(division, tokenizer, config, adapted.decoder_start_token)
    pool = division.pool
    config = config.replace(
        task=task,
        clients=len(data.shards),
        clients_per_pass=_clients_per_pass(config, method, adapted, data),
        text_column=pool.texts,
        answer_column=pool.answer,
        partition=division.spec if isinstance(division.spec, str) else config.partition,
    )
    if config.secure_aggregation:
        check_options(config, method)
    if config.dp_epsilon is not None:
        config = _with_privacy(config, method, adapted, data)
    if config.compile:
        adapted.compile()
    return Prepared(config, adapted, data, tokenizer, split_key)


def _split_key(config: TrainConfig, given: bytes | None) -> bytes | None:
    """From the operating system: the server knows the seed, and must not know who is tested."""
    if config.dp_epsilon is None:
        return None
    if given is not None:
        return given
    if config.dp_test_seed is not None:
        return derive_key(config.dp_test_seed.to_bytes(8, "big"), b"", b"fedsa-secure split key")
    return os.urandom(32)


def _with_privacy(
    config: TrainConfig, method: Method, model: AdaptedModel, data: FederatedData
) -> TrainConfig:
    """The configuration with its noise multiplier, after everything that could be refused.

    Raises:
        PrivacyError: naming the option, operator or model that breaks the promise.
    """
    check_private_options(config, method, [len(shard.train) for shard in data.shards])
    if config.dp_unit == "record":
        refuse_unsound_model(model, released_method(method, config), data, config.max_length)
    values = sum(model.initial[name].numel() for name in model.names(method.shared))
    return config.replace(
        dp_noise_multiplier=calibrated(config, values),
        dp_dataset_id=config.dp_dataset_id or _resolved(config.dataset),
        dp_home=str(home_folder(config.dp_home).absolute()),
    )


def _resolved(source: str) -> str:
    """One name for one folder or file, from wherever a run is started."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def with_initial_adapter(config: TrainConfig) -> TrainConfig:
    """The configuration with the shape of the adapter that it starts from.

    Raises:
        ConfigError: if the adapter cannot be read, or an option says otherwise.
        PrivacyError: if the run is private and the adapter is one client's own.
    """
    if config.initial_adapter is None:
        return config
    source = config.initial_adapter
    if Path(source).is_dir():
        source = str(Path(source).resolve())  # a run is opened from other places, too
    start = read_peft_adapter(source)
    settings = start.settings
    _check_private_start(config, start)
    found: dict[str, Any] = {
        "initial_adapter": source,
        "adapter": settings.kind,
        "rank": settings.rank,
        "target_modules": settings.target_modules,
    }
    if settings.kind != "vera":
        found["alpha"] = float(settings.alpha)
    for option, value in found.items():
        asked = getattr(config, option)
        given = option in config.model_fields_set and option != "initial_adapter"
        if given and asked not in (None, value):
            raise ConfigError(
                option,
                f"{config.initial_adapter} has {value!r}, and {asked!r} was asked for",
                "leave the option out, or start from another adapter",
            )
    return TrainConfig.build(**{**config.model_dump(exclude_unset=True), **found})


def _check_private_start(config: TrainConfig, start: PeftAdapter) -> None:
    """With differential privacy, starting weights have to be public.

    Raises:
        PrivacyError: if the start is one client's own.
        ConfigError: if B is to start at a random matrix.
    """
    if config.dp_epsilon is None:
        return
    if start.personal:
        raise PrivacyError(
            "initial_adapter",
            f"{start.source} holds a client's own adapter, which was trained without noise",
            "start from public weights",
        )
    if _has_frozen_b(config):
        raise ConfigError(
            "dp_release",
            "frozen-b draws B at random and starts A at zero, which an initial_adapter would undo",
            "take dp_release='twin', or leave initial_adapter out",
        )


def _has_frozen_b(config: TrainConfig) -> bool:
    private = config.dp_epsilon is not None and config.dp_unit == "record"
    return private and config.dp_release == "frozen-b"


def _clients_per_pass(
    config: TrainConfig, method: Method, model: AdaptedModel, data: FederatedData
) -> int:
    """Resolve the option, and try it with two rows: some models cannot be stacked at all.

    Raises:
        AdapterError: if the model cannot be stacked and the user asked for it by number, or cannot
            be trained.
        ConfigError: if the model is not one that does the task.
    """
    wanted = clients_per_pass(config, data, model.device)
    try:
        _try(method, model, data, min(wanted, 2))
    except AdapterError as error:
        if config.clients_per_pass != "auto":  # noqa: S105 - no password
            raise
        _try(method, model, data, 1)
        _log.info("clients_per_pass is 1: %s", error)
        return 1
    return wanted


def _try(method: Method, model: AdaptedModel, data: FederatedData, clients: int) -> None:
    """One pass of one row per client, with gradients, since some layers refuse those."""
    row = data.shards[0].train[:1]
    model.load([{}] * clients, trained=method.trained)
    inputs = collate(data.rows, [row] * clients, model.device).inputs
    logits = model(inputs)
    if not data.generation and logits.shape != (clients, len(data.label_names)):
        raise ConfigError(
            "model", "it does not classify sequences", "give a model for sequence classification"
        )
    if data.generation and not model.encoder_decoder:
        _check_causal(model, inputs, logits)


def _check_causal(model: AdaptedModel, inputs: dict[str, Tensor], logits: Tensor) -> None:
    """Refuse masked language models: they see the answer that they have to predict."""
    changed = inputs["input_ids"].clone()
    changed[:, -1] = (changed[:, -1] + 1) % logits.shape[-1]
    with torch.no_grad():
        again = model({**inputs, "input_ids": changed})
    if not torch.allclose(again[:, :-1], logits[:, :-1], atol=1e-2, rtol=1e-2):
        raise ConfigError(
            "model",
            f"a {type(model.model).__name__} looks ahead: earlier predictions change with the last "
            "token",
            "give a decoder (is_decoder=True), or an encoder-decoder",
        )


def open_model(given: Given, config: TrainConfig, labels: int | None) -> tuple[AdaptedModel, Any]:
    """The base model with adapters, and its tokenizer.

    Args:
        given: what the user passed.
        config: the options.
        labels: number of classes; None for generation.

    Raises:
        ConfigError: if model, tokenizer and data do not fit each other.
    """
    model, tokenizer = _model(given, config, labels)
    start, settings = None, _settings(config)
    if config.initial_adapter is not None:
        start = read_peft_adapter(config.initial_adapter)
        settings = replace(start.settings, private=settings.private, dropout=settings.dropout)
    adapted = attach(model.to(_device(config.device)), settings, config.seed, start)
    adapted.half_precision = config.precision == "bf16"
    if config.gradient_checkpointing:
        adapted.checkpoint_gradients()
    return adapted, tokenizer


def _settings(config: TrainConfig) -> AdapterSettings:
    return AdapterSettings(
        kind=config.adapter,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        target_modules=config.target_modules,
        private=find_method(config.method, config.head).has_private_adapter,
        projection_key=derive(config.seed, "projections") % 2**31,
        frozen_b=_has_frozen_b(config),
    )


def _model(given: Given, config: TrainConfig, labels: int | None) -> tuple[Any, Any]:
    """The base model and its tokenizer, checked against each other and the data."""
    source = given.pick("model", config)
    if isinstance(source, str):
        model, tokenizer = load_pretrained(source, labels, config.seed)
    else:
        model, tokenizer = copy.deepcopy(source), None
        _check_task(model, labels)
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
    # Decoders that classify look for the last token that is no padding.
    model.config.get_text_config().pad_token_id = pad_token(tokenizer)
    longest = min(_positions(model, config.max_length), tokenizer.model_max_length)
    if config.max_length > longest:
        raise ConfigError(
            "max_length", f"the model takes at most {longest} tokens", f"set at most {longest}"
        )
    return model, tokenizer


def _check_task(model: Any, labels: int | None) -> None:
    """Refuse a model object whose task is not that of the data."""
    if (labels is None) != model.can_generate():
        wanted = "writes answers" if labels is None else "classifies sequences"
        raise ConfigError(
            "model",
            f"the task needs a model that {wanted}, and a {type(model).__name__} was given",
            "give another model, or set task=",
        )
    if labels is not None and model.config.num_labels != labels:
        raise ConfigError(
            "model",
            f"it has {model.config.num_labels} labels and the data have {labels}",
            f"build it with num_labels={labels}",
        )


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
