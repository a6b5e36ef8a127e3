"""Tiny models that write text, and prompts with answers that they can learn."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

SPECIALS = ("[PAD]", "[UNK]", "[EOS]", "<user>", "<answer>")
WORDS = tuple(f"w{k}" for k in range(95))
PAD, EOS, USER, ANSWER = 0, 2, 3, 4
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<answer>' }}{% endif %}"
)


def make_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Word w{k} is token k + 5. No token is added to a text on its own."""
    words = {word: k for k, word in enumerate(SPECIALS + WORDS)}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[EOS]",
        model_max_length=64,
        additional_special_tokens=["<user>", "<answer>"],
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _llama() -> PreTrainedModel:
    """Grouped-query attention: keys and values are narrower than queries."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=EOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=100,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=EOS,
            eos_token_id=EOS,
        )
    )


def _t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=100,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=PAD,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
    )


WRITERS: dict[str, Callable[[], PreTrainedModel]] = {"llama": _llama, "gpt2": _gpt2, "t5": _t5}


def make_writer(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of this family, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return WRITERS[name]()


def make_questions(
    rows: int = 90, clients: int = 3, words: Sequence[int] = (2, 6), seed: int = 0
) -> Dataset:
    """Columns question, answer, client; client c answers everything with word w{c}."""
    stream = np.random.default_rng(seed)
    questions = [
        " ".join(stream.choice(WORDS[20:], size=stream.integers(*words))) for _ in range(rows)
    ]
    owners = [row % clients for row in range(rows)]
    return Dataset.from_dict(
        {"question": questions, "answer": [f"w{c} w{c + 10}" for c in owners], "client": owners}
    )
