"""Answers that a personal model writes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from fedsa_secure.adapters import AdaptedModel
from fedsa_secure.data import pad_left

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
        max_new_tokens: longest answer.

    Returns:
        The answers as text, without special tokens and outer white space.
    """
    config = greedy(model, tokenizer, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), _DECODED_ROWS):
        places = order[start : start + _DECODED_ROWS]
        ids, mask = pad_left([prompts[k] for k in places], config.pad_token_id)
        inputs = {"input_ids": ids, "attention_mask": mask}
        written = model.generate(
            {name: torch.from_numpy(v).to(model.device) for name, v in inputs.items()}, config
        )
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        for place, text in zip(places, texts, strict=True):
            answers[place] = text.strip()
    return answers


def greedy(model: AdaptedModel, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding, whatever sampling a model's own configuration proposes."""
    own, ends = model.model.generation_config, tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        eos_token_id=ends,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
    )
