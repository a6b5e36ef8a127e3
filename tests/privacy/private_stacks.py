"""Tiny models with stacked clients, and what a loop over single records makes of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from fedsa_kernels import clipped_sum
from fedsa_secure.adapters import AdaptedModel, AdapterSettings, attach
from fedsa_secure.federation.losses import row_losses
from fedsa_secure.privacy import ClipGroup, PartialBatch, PrivateStep, TurnSecret
from fedsa_secure.types import NamedTensors, Role

WORDS, PAD, BROKEN = 60, 0, 59
"""Ids from 2 on are words; the embedding of the last one is not finite where that is asked for."""
TRAINED = (Role.A, Role.B, Role.HEAD)
_ENCODER = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
    "initializer_range": 0.2,
    "num_labels": 3,
}
_DECODER = {
    "vocab_size": WORDS,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
_MODELS: dict[str, tuple[type, type, dict]] = {
    "bert": (BertForSequenceClassification, BertConfig, _ENCODER),
    "roberta": (
        RobertaForSequenceClassification,
        RobertaConfig,
        {**_ENCODER, "num_hidden_layers": 1},
    ),
    "albert": (AlbertForSequenceClassification, AlbertConfig, {**_ENCODER, "embedding_size": 16}),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        {**_DECODER, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 40},
    ),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            **_DECODER,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 40,
        },
    ),
    "t5": (
        T5ForConditionalGeneration,
        T5Config,
        {
            "vocab_size": WORDS,
            "d_model": 32,
            "d_kv": 12,
            "num_heads": 2,
            "d_ff": 48,
            "num_layers": 1,
            "pad_token_id": PAD,
            "eos_token_id": 1,
            "decoder_start_token_id": PAD,
        },
    ),
}


def base_model(name: str) -> nn.Module:
    """The same random model in float64, every time."""
    kind, config, sizes = _MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config(**sizes)).double()
        for parameter, values in model.named_parameters():
            if parameter.endswith("bias"):  # transformers starts them at zero: hides mistakes
                nn.init.normal_(values, std=0.1)
    return model.eval()


@dataclass
class Rows:
    """Client-major rows with their labels.

    Args:
        ids: padded on the right. [client·row, token]
        labels: classes, or the token that each position predicts or −100.
        decoder: input of the decoder, if there is one.
    """

    ids: Tensor
    labels: Tensor
    decoder: Tensor | None = None

    def __getitem__(self, chosen: object) -> "Rows":
        decoder = None if self.decoder is None else self.decoder[chosen]
        return Rows(self.ids[chosen], self.labels[chosen], decoder)

    def clone(self) -> "Rows":
        decoder = None if self.decoder is None else self.decoder.clone()
        return Rows(self.ids.clone(), self.labels.clone(), decoder)

    @property
    def inputs(self) -> dict[str, Tensor]:
        found = {"input_ids": self.ids, "attention_mask": (self.ids != PAD).long()}
        return found if self.decoder is None else {**found, "decoder_input_ids": self.decoder}


def make_rows(name: str, rows: int, tokens: int, seed: int = 5) -> Rows:
    """Rows of unequal length, from the first, which is the longest, to the last, which is short."""
    stream = torch.Generator().manual_seed(seed)
    lengths = torch.randint(max(2, tokens // 2), tokens + 1, (rows, 1), generator=stream)
    lengths[0], lengths[-1] = tokens, max(2, tokens // 2)
    ids = torch.randint(2, BROKEN, (rows, tokens), generator=stream)
    ids[torch.arange(tokens) >= lengths] = PAD
    if name == "t5":
        answers = torch.randint(2, BROKEN, (rows, 5), generator=stream)
        answers[:, 3:] = torch.where(lengths % 2 == 0, answers[:, 3:], -100)
        decoder = torch.cat([torch.zeros(rows, 1, dtype=torch.long), answers[:, :-1]], 1)
        return Rows(ids, answers, decoder.clamp(min=PAD))
    if name in ("gpt2", "llama"):
        return Rows(ids, next_tokens(ids))
    return Rows(ids, torch.randint(0, 3, (rows,), generator=stream))


def next_tokens(ids: Tensor) -> Tensor:
    """What each position of a decoder predicts, from the second token on."""
    labels = torch.full_like(ids, -100)
    labels[:, 1:-1] = ids[:, 2:]
    return torch.where(labels == PAD, -100, labels)


@dataclass
class Stack:
    """C clients on one model.

    Args:
        name: of the model.
        settings: of the adapters.
        clients: C.
        rows: of all clients.
        trained: roles with gradients.
        broken: whether the last word makes a row's gradient NaN.
    """

    name: str
    settings: AdapterSettings
    clients: int
    rows: Rows
    trained: Sequence[Role] = TRAINED
    broken: bool = False
    values: list[NamedTensors] = field(init=False)
    model: AdaptedModel = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.attach()
        stream = torch.Generator().manual_seed(7)
        self.values = [
            {
                name: start + 0.1 * torch.randn(start.shape, generator=stream, dtype=start.dtype)
                for name, start in self.model.initial.items()
            }
            for _ in range(self.clients)
        ]
        self.model.load(self.values, self.trained)

    @classmethod
    def around(cls, model: AdaptedModel, rows: Rows) -> "Stack":
        """One client on a model from elsewhere; without a loop over its records."""
        stack = cls.__new__(cls)
        stack.model, stack.rows, stack.clients, stack.trained = model, rows, 1, TRAINED
        return stack

    def attach(self) -> AdaptedModel:
        base = base_model(self.name)
        if self.broken:
            base.get_input_embeddings().weight.data[BROKEN] = torch.nan
        return attach(base, self.settings, 0)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return self.model.parameters(self.trained)

    def client_of(self, row: int) -> int:
        return row // (len(self.rows.ids) // self.clients)

    def losses(self, rows: Rows | None = None) -> Tensor:
        rows = self.rows if rows is None else rows
        return row_losses(self.model(rows.inputs), rows.labels)

    def alone(self) -> dict[str, Tensor]:
        """Every record's gradient by autograd, each in a batch of its own. [client·row, …]"""
        single, found = self.attach(), []
        for row in range(len(self.rows.ids)):
            single.load([self.values[self.client_of(row)]], self.trained)
            own = self.rows[row : row + 1]
            loss = row_losses(single(own.inputs), own.labels).sum()
            parameters = single.parameters(self.trained)
            found.append([g[0] for g in torch.autograd.grad(loss, list(parameters.values()))])
        return dict(zip(parameters, map(torch.stack, zip(*found, strict=True)), strict=True))

    def groups(self, thresholds: Sequence[float]) -> list[ClipGroup]:
        """One group for all roles, or one for each role."""
        roles = [self.trained] if len(thresholds) == 1 else [[role] for role in self.trained]
        parts = [tuple(self.model.parameters(each).values()) for each in roles]
        return [ClipGroup(p, t) for p, t in zip(parts, thresholds, strict=True)]

    def step(
        self,
        thresholds: Sequence[float] = (0.1,),
        sigma: float = 0.0,
        optimizer: torch.optim.Optimizer | None = None,
        expected: Sequence[float] | None = None,
    ) -> PrivateStep:
        expected = [1.0 + c for c in range(self.clients)] if expected is None else expected
        return PrivateStep(
            self.model.model,
            self.groups(thresholds),
            optimizer or torch.optim.SGD(self.parameters.values(), lr=1.0),
            noise_multiplier=sigma,
            expected_batches=torch.tensor(expected),
            secrets=secrets(self.clients),
        )

    def caught(self, rows: Rows | None = None) -> dict[str, Tensor]:
        """Every record's gradient by the hooks of a private step, all records in one batch."""
        with self.step().open():
            self.losses(rows).sum().backward()
            return {name: whole(p) for name, p in self.parameters.items()}


def whole(parameter: nn.Parameter) -> Tensor:
    """What a parameter's hooks caught, also where it is kept as factors. [row, *shape]"""
    caught = parameter.grad_sample.clone()
    each = torch.ones(len(caught), 1, dtype=caught.dtype)
    return clipped_sum(caught, each, parameter.shape[1:])


def secrets(clients: int) -> list[TurnSecret]:
    return [TurnSecret.for_tests(3, client, 1) for client in range(clients)]


def one_part(stack: Stack, real: Tensor) -> list[PartialBatch]:
    return [PartialBatch(stack.losses(), real)]


def expected_sums(
    stack: Stack,
    alone: dict[str, Tensor],
    groups: Sequence[Sequence[str]],
    *,
    real: Tensor,
    thresholds: Sequence[float],
) -> dict[str, Tensor]:
    """Clip every record by itself and add it to its client's sum. Each [client, …]"""
    sums = {name: torch.zeros_like(p) for name, p in stack.parameters.items()}
    for row in real.flatten().nonzero().flatten().tolist():
        for names, threshold in zip(groups, thresholds, strict=True):
            norm = sum(alone[name][row].square().sum() for name in names).sqrt()
            if norm.isfinite():
                for name in names:
                    sums[name][stack.client_of(row)] += alone[name][row] / max(1, norm / threshold)
    return sums


def noised(stack: Stack, sums: dict[str, Tensor], deviation: float) -> dict[str, Tensor]:
    """Add the noise of the first step, coordinate by coordinate in the model's order."""
    values = sum(p[0].numel() for p in stack.parameters.values())
    found = {name: each.clone() for name, each in sums.items()}
    for client, secret in enumerate(secrets(stack.clients)):
        draws = torch.from_numpy(secret.gaussian("step 0", values)) * deviation
        for each in found.values():
            block, draws = draws[: each[0].numel()], draws[each[0].numel() :]
            each[client] += block.view_as(each[client])
    return found


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor], part: float = 1e-9) -> None:
    """Every value, to this part of the largest of its tensor."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert (found[name] - value).abs().max() <= part * value.abs().max().clamp(min=1e-12), name
