"""Whole rounds against a loop of PEFT and torch that knows nothing of stacks.

One PeftModel is handed from client to client; torch's own AdamW, clipping and loss do the work.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from fedsa_secure.adapters import peft_config, peft_state
from fedsa_secure.data import Batch, collate, draw_rows
from fedsa_secure.federation.losses import client_losses, row_losses
from fedsa_secure.federation.server import select_clients
from fedsa_secure.types import NamedTensors, Role

MakeFederation = Callable[..., Any]
OPTIONS = {
    "dropout": 0.0,
    "rounds": 4,
    "participation": 0.75,
    "schedule": "cosine",
    "learning_rate": 4e-3,
    "head_learning_rate": 1e-2,
    "weight_decay": 0.05,
    "max_grad_norm": 0.3,
}
OURS = {
    ".lora_A.default.weight": ".A",
    ".lora_B.default.weight": ".B",
    ".vera_lambda_d.default": ".d",
    ".vera_lambda_b.default": ".b",
}


class Loop:
    """FedSA by hand: B, head and optimizer of every client are put aside after its turn."""

    def __init__(self, federation, base: nn.Module) -> None:
        adapted, self.federation = federation.model, federation
        config = peft_config(adapted, "tiny")
        config.inference_mode, config.base_model_name_or_path = False, None
        self.model = get_peft_model(base, config).eval()
        set_peft_model_state_dict(self.model, peft_state(adapted, {}))
        self.names = {self._ours(n): p for n, p in self.model.named_parameters()}
        self.names = {n: self.names[n] for n in adapted.names(set(Role))}
        for parameter in self.names.values():
            parameter.requires_grad_(True)
        self.a = set(adapted.names({Role.A}))
        self.head = set(adapted.names({Role.HEAD}))
        self.shared = {n: adapted.initial[n].clone() for n in self.a}
        start = {n: adapted.initial[n].clone() for n in self.names}
        self.clients: list[NamedTensors] = [dict(start) for _ in federation.data.shards]
        self.optimizers: list[dict | None] = [None for _ in federation.data.shards]

    @staticmethod
    def _ours(name: str) -> str:
        name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        for theirs, ours in OURS.items():
            name = name.replace(theirs, ours)
        return name

    def round(self, number: int) -> None:
        config = self.federation.config
        chosen = select_clients(len(self.clients), config.participation, config.seed, number)
        ends = [self.turn(client, number) for client in chosen]
        self.shared = {n: torch.stack([end[n] for end in ends]).mean(0) for n in self.shared}

    def turn(self, client: int, number: int) -> NamedTensors:
        config, data = self.federation.config, self.federation.data
        with torch.no_grad():
            for name, value in {**self.clients[client], **self.shared}.items():
                self.names[name].copy_(value)
        groups = [
            {"params": [p for n, p in self.names.items() if (n in self.head) == of_head]}
            for of_head in (False, True)
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        if self.optimizers[client] is not None:
            optimizer.load_state_dict(self.optimizers[client])
        shard, steps = data.shards[client].train, config.local_steps
        rows = draw_rows(shard, steps, config.batch_size, config.seed, client, number)
        for step, some in enumerate(rows):
            done = ((number - 1) * steps + step) / (config.rounds * steps)
            factor = (1 + torch.cos(torch.tensor(torch.pi * done, dtype=torch.float64))) / 2
            optimizer.param_groups[0]["lr"] = float(config.learning_rate * factor)
            optimizer.param_groups[1]["lr"] = float(config.head_learning_rate * factor)
            batch = collate(data.rows, [some], torch.device("cpu"))
            loss = self.model(**batch.inputs, labels=batch.labels).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(list(self.names.values()), config.max_grad_norm)
            optimizer.step()
        self.clients[client] = {n: p.detach().clone() for n, p in self.names.items()}
        self.optimizers[client] = optimizer.state_dict()
        return self.clients[client]


@pytest.mark.parametrize(
    ("adapter", "per_pass"), [("lora", 1), ("lora", 3), ("rslora", 3), ("vera", 3)]
)
def test_rounds_equal_those_of_peft_and_torch(
    federation: MakeFederation, tiny_bert: Any, adapter: str, per_pass: int
) -> None:
    options = {**OPTIONS, "adapter": adapter, "clients_per_pass": per_pass}
    made = federation(dtype=torch.float64, **options)
    run = made.simulate("run")
    loop = Loop(made, tiny_bert().double())
    for number in range(1, 5):
        loop.round(number)
    for name, expected in loop.shared.items():
        torch.testing.assert_close(run.shared[name], expected, rtol=1e-9, atol=1e-9)
        assert (expected - made.model.initial[name]).abs().max() > 1e-3
    for client, expected_tensors in enumerate(loop.clients):
        found = run.client_tensors(client)
        for name in set(loop.names) - loop.a:
            torch.testing.assert_close(found[name], expected_tensors[name], rtol=1e-9, atol=1e-9)


def test_filling_rows_are_not_even_looked_at() -> None:
    """Not a number in a filling row moves neither the loss nor a gradient."""
    real = torch.tensor([[True, True, False], [True, True, True]])
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    logits = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = logits.clone().requires_grad_(True)
    picked = nn.functional.cross_entropy(expected, labels, reduction="none")
    by_hand = torch.stack([picked[:2].mean(), picked[3:].mean()])

    spoilt = logits.clone()
    spoilt[2] = float("nan")
    spoilt.requires_grad_(True)
    losses = client_losses(row_losses(spoilt, labels), Batch({}, labels, real))
    torch.testing.assert_close(losses, by_hand)
    losses.sum().backward()
    by_hand.sum().backward()

    def others(gradient: Tensor) -> Tensor:
        return gradient[[0, 1, 3, 4, 5]]

    torch.testing.assert_close(others(spoilt.grad), others(expected.grad))
