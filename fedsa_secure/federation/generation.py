"""Answers that a personal model writes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from fedsa_secure.adapters import AdaptedModel
from fedsa_secure.data import pad_prompts, pad_token
from fedsa_secure.errors import ConfigError

_DECODED_ROWS = 32
"""Prompts that are answered side by side."""


def write_answers(
    model: AdaptedModel, tokenizer: Any, prompts: Sequence[np.ndarray], max_new_tokens: int
) -> list[str]:
    """The most likely next token, again and again, until the answer ends.

    Args:
        model: with one client loaded.
        tokenizer: that of the model.
        prompts: tokens of each prompt.
        max_new_tokens: longest answer; shorter where the model has no positions left.

    Returns:
        The answers as text, without special tokens and outer white space.

    Raises:
        ConfigError: if a prompt leaves no position for an answer.
    """
    config = _greedy(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), _DECODED_ROWS):
        places = order[start : start + _DECODED_ROWS]
        chosen = [prompts[k] for k in places]
        config.max_new_tokens = _room(model, len(chosen[-1]), max_new_tokens)
        ids, mask = pad_prompts(chosen, config.pad_token_id, left=not model.encoder_decoder)
        inputs = {"input_ids": ids, "attention_mask": mask}
        written = model.generate(
            {name: torch.from_numpy(v).to(model.device) for name, v in inputs.items()}, config
        )
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        for place, text in zip(places, texts, strict=True):
            answers[place] = text.strip()
    return answers


def _greedy(model: AdaptedModel, tokenizer: Any) -> GenerationConfig:
    """Greedy decoding, whatever sampling a model's own configuration proposes."""
    own = model.model.generation_config
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        pad_token_id=pad_token(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
    )


def _room(model: AdaptedModel, prompt: int, wanted: int) -> int:
    """Tokens that an answer may have: as wanted, but not more than the model has positions for."""
    positions = getattr(model.model.config, "max_position_embeddings", None)
    if positions is None:
        return wanted
    room = int(positions) - (0 if model.encoder_decoder else prompt)
    if room < 1:
        raise ConfigError(
            "prompts",
            f"a prompt of {prompt} tokens leaves no room in the model's {positions} positions",
            "shorten it",
        )
    return min(wanted, room)
