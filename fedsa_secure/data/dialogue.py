"""Prompts and answers as tokens: only the answer is learnt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError

from fedsa_secure.data.columns import MESSAGES
from fedsa_secure.data.encoding import IGNORED, EncodedRows, padding
from fedsa_secure.data.pool import Pool
from fedsa_secure.errors import ConfigError

Chat = list[dict[str, str]]
_PLAIN = "{prompt}\n"


@dataclass(frozen=True)
class PromptForm:
    """How prompts go into a model.

    Args:
        tokenizer: a transformers tokenizer.
        template: text with ``{prompt}`` in it; None for the tokenizer's chat template, or for the
            prompt and a new line where it has none. Without a chat template the messages of a chat
            become one prompt of a line each, without their roles.
        decoder_start: first token of the decoder of an encoder-decoder model; None for a model
            that goes on with the prompt.
    """

    tokenizer: Any
    template: str | None = None
    decoder_start: int | None = None

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(
                "tokenizer", "it has no token that ends an answer", "set its eos_token"
            )

    def prompt_ids(self, chats: Sequence[Chat], max_length: int | None = None) -> list[np.ndarray]:
        """Tokens of prompts.

        Args:
            chats: all messages up to the one that is asked for.
            max_length: longer ones are cut; None to keep them whole.
        """
        templated = self.template is None and self.tokenizer.chat_template is not None
        texts = [self._text(chat, templated) for chat in chats]
        made = self.tokenizer(
            texts,
            add_special_tokens=not templated,  # a chat template writes its own
            truncation=max_length is not None,
            max_length=max_length,
        )["input_ids"]
        ends = self.tokenizer.eos_token_id
        found = [np.asarray(ids, dtype=np.int64) for ids in made]
        if self.decoder_start is None and not templated:  # the answer is to follow, not the end
            found = [ids[:-1] if len(ids) and ids[-1] == ends else ids for ids in found]
        return found

    def answer_ids(self, answers: Sequence[str]) -> list[np.ndarray]:
        """Tokens of answers, each with the token that ends it."""
        made = self.tokenizer(list(answers), add_special_tokens=False)["input_ids"]
        return [np.asarray([*ids, self.tokenizer.eos_token_id], dtype=np.int64) for ids in made]

    def _templated(self, chat: Chat) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            )
        except TemplateError as error:  # such as: no system messages
            roles = ", ".join(message["role"] for message in chat)
            raise ConfigError(
                "prompt_template",
                f"the tokenizer's chat template refuses messages of the roles {roles}: {error}",
                "give a prompt_template, or other messages",
            ) from error

    def _text(self, chat: Chat, templated: bool) -> str:
        if templated:
            return self._templated(chat)
        plain = "\n".join(message["content"] for message in chat)
        return (self.template or _PLAIN).replace("{prompt}", plain)


def encode_answers(pool: Pool, form: PromptForm, max_length: int) -> EncodedRows:
    """Tokenize prompts and answers; a position's label is the token that it has to predict.

    Args:
        pool: rows with prompts and answers.
        form: how prompts go into the model.
        max_length: in tokens, of prompt and answer together, or of each for an encoder-decoder
            model; what is longer loses the end of its answer.

    Raises:
        ConfigError: if prompts leave no room for an answer.
    """
    references = pool.texts_of(str(pool.answer))
    answers = form.answer_ids(references)
    if form.decoder_start is None:
        prompts = form.prompt_ids(_chats(pool))
        _check_prompts(prompts)
        _check_room(prompts, max_length)
        columns = _continued(prompts, answers, max_length)
    else:
        prompts = form.prompt_ids(_chats(pool), max_length)
        _check_prompts(prompts)
        columns = _answered(prompts, answers, max_length, form.decoder_start)
    labels = np.zeros(len(prompts), dtype=np.int64)
    return EncodedRows(columns, labels, padding(columns, form.tokenizer), prompts, references)


def pad_prompts(rows: Sequence[np.ndarray], pad: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Prompts side by side.

    Args:
        rows: tokens of each prompt.
        pad: what fills the shorter ones.
        left: fill before the prompt, so that answers that go on with it begin in the same place.

    Returns:
        Tokens and attention mask. Each [row, token]
    """
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for place, row in enumerate(rows):
        where = slice(longest - len(row), longest) if left else slice(len(row))
        ids[place, where] = row
        mask[place, where] = 1
    return ids, mask


def _chats(pool: Pool) -> list[Chat]:
    values = pool.rows[pool.texts[0]]
    if pool.texts[0] == MESSAGES:
        return [list(chat[:-1]) for chat in values]
    return [[{"role": "user", "content": str(prompt)}] for prompt in values]


def _check_prompts(prompts: list[np.ndarray]) -> None:
    empty = [row for row, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty:
        raise ConfigError(
            "text_column",
            f"the prompts of {len(empty)} rows are empty, first of row {empty[0]}",
            "leave those rows out, or set a prompt_template",
        )


def _check_room(prompts: list[np.ndarray], max_length: int) -> None:
    full = [row for row, prompt in enumerate(prompts) if len(prompt) >= max_length]
    if full:
        raise ConfigError(
            "max_length",
            f"the prompts of {len(full)} rows (first: row {full[0]}, {len(prompts[full[0]])} "
            f"tokens) leave no room for an answer in {max_length} tokens",
            "set a larger max_length, or leave those rows out",
        )


def _continued(
    prompts: list[np.ndarray], answers: list[np.ndarray], max_length: int
) -> dict[str, list[np.ndarray]]:
    """Prompt and answer in one sequence; position t predicts token t + 1."""
    ids = [np.concatenate(pair)[:max_length] for pair in zip(prompts, answers, strict=True)]
    labels = []
    for row, prompt in zip(ids, prompts, strict=True):
        following = np.append(row[1:], IGNORED)
        following[: len(prompt) - 1] = IGNORED
        labels.append(following)
    masks = [np.ones_like(row) for row in ids]
    return {"input_ids": ids, "attention_mask": masks, "labels": labels}


def _answered(
    prompts: list[np.ndarray], answers: list[np.ndarray], max_length: int, start: int
) -> dict[str, list[np.ndarray]]:
    """The prompt for the encoder; the answer, moved by one, for the decoder."""
    labels = [row[:max_length] for row in answers]
    return {
        "input_ids": prompts,
        "attention_mask": [np.ones_like(row) for row in prompts],
        "decoder_input_ids": [np.concatenate([[start], row[:-1]]) for row in labels],
        "labels": labels,
    }
