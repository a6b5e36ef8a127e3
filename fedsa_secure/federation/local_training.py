"""``train``: the local steps of some clients, all in one stack.

Gradients do not mix: every client has its own segment of rows, its own tensors, its own moments,
and the loss is a sum over clients of each client's own mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from fedsa_kernels import row_keys
from fedsa_secure.adapters import AdaptedModel
from fedsa_secure.config import TrainConfig
from fedsa_secure.data import Batch, FederatedData, collate, draw_rows
from fedsa_secure.federation.losses import client_losses, learnt_positions, row_losses
from fedsa_secure.federation.optimizers import (
    OptimizerSettings,
    OptimizerState,
    optimizer_step,
)
from fedsa_secure.federation.schedule import rate_factor
from fedsa_secure.methods import Method, find_method
from fedsa_secure.streams import derive
from fedsa_secure.types import NamedTensors, Role


@dataclass(frozen=True)
class ClientState:
    """What stays at a client between its turns.

    Args:
        personal: its own values of the personal roles; empty before the first turn, when they are
            at the public start.
        moments: optimizer moments of everything it trains, by ``name#moment``.
        steps: optimizer steps taken so far.
        twin: with differential privacy per record, the values beside A of the part that is trained
            with noise; the personal ones come after the last round, and nothing private reads them.
    """

    personal: NamedTensors = field(default_factory=dict)
    moments: NamedTensors = field(default_factory=dict)
    steps: int = 0
    twin: NamedTensors = field(default_factory=dict)

    def tensors(self, shared: NamedTensors) -> NamedTensors:
        """All trained tensors of the client's model: shared, and its own as far as it has them."""
        return {**shared, **self.twin, **self.personal}


@dataclass(frozen=True)
class ClientResult:
    """What a client's turn ends with. Only ``shared`` goes on to be encoded.

    Args:
        client: its number.
        shared: its trained values of the shared roles.
        state: what it keeps.
        loss: mean training loss over its steps; None where it may not be known.
    """

    client: int
    shared: NamedTensors
    state: ClientState
    loss: float | None


def method_of(config: TrainConfig, generates: bool) -> Method:
    """The method of a run; a model that generates has no head to train or to share.

    Raises:
        ConfigError: if there is no such method, or nothing would be left of it.
    """
    method = find_method(config.method, config.head)
    return method.without_head() if generates else method


def train_clients(
    model: AdaptedModel,
    method: Method,
    config: TrainConfig,
    data: FederatedData,
    shared: NamedTensors,
    turns: Sequence[tuple[int, ClientState]],
    round_number: int,
) -> list[ClientResult]:
    """Let these clients take their local steps of one round, in one stack.

    Args:
        model: the frozen base; whatever clients it held before are replaced.
        method: which roles are trained and shared.
        config: steps, optimizer, schedule and seed.
        data: everybody's rows.
        shared: the public values of the shared tensors at the start of the round.
        turns: the clients and what each has kept since its last turn.
        round_number: counted from 1.

    Returns:
        One result per client, in the order given.
    """
    clients = [client for client, _ in turns]
    model.load([{**shared, **state.personal} for _, state in turns], method.trained)
    settings = optimizer_settings(config)
    optimizer = stack_state(model, method, settings, [state for _, state in turns])
    draws = [
        draw_rows(
            data.shards[client].train,
            config.local_steps,
            config.batch_size,
            config.seed,
            client,
            round_number,
        )
        for client in clients
    ]
    losses = []
    for step in range(config.local_steps):
        batch = collate(data.rows, [draw[step] for draw in draws], model.device)
        keys = dropout_keys(batch, clients, config, round_number, step)
        rates = learning_rates(model, method, config, round_number, step)
        losses.append(plain_step(model, method, config, batch, keys, optimizer, rates))
    return _unstack(model, method, clients, optimizer, torch.stack(losses).mean(0).tolist())


def dropout_keys(
    batch: Batch, clients: Sequence[int], config: TrainConfig, round_number: int, step: int
) -> Int32[Tensor, "client row"] | None:
    """Dropout keys of a batch's rows, by (client, step, row)."""
    if config.dropout == 0.0:
        return None
    words = dropout_words(clients, config, round_number, step)
    return row_keys(words.to(batch.labels.device), batch.real.shape[1])


def dropout_words(
    clients: Sequence[int], config: TrainConfig, round_number: int, step: int
) -> Int32[Tensor, " client"]:
    """What the dropout keys of each client's rows are made from at one step."""
    words = [
        derive(config.seed, "dropout", client, round_number, step) & 0x7FFFFFFF
        for client in clients
    ]
    return torch.tensor(words, dtype=torch.int32)


def optimizer_settings(config: TrainConfig) -> OptimizerSettings:
    """The optimizer that a run asks for."""
    return OptimizerSettings(
        kind=config.optimizer,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )


def learning_rates(
    model: AdaptedModel, method: Method, config: TrainConfig, round_number: int, step: int
) -> dict[str, float]:
    """Learning rate of every trained parameter at one step."""
    done = (round_number - 1) * config.local_steps + step
    total = config.rounds * config.local_steps
    factor = rate_factor(config.schedule, done, total, config.warmup_steps)
    head_rate = config.head_learning_rate or config.learning_rate
    head = set(model.names([Role.HEAD]))
    return {
        name: factor * (head_rate if name in head else config.learning_rate)
        for name in model.names(method.trained)
    }


def plain_step(
    model: AdaptedModel,
    method: Method,
    config: TrainConfig,
    batch: Batch,
    keys: Int32[Tensor, "client row"] | None,
    optimizer: OptimizerState,
    rates: dict[str, float],
) -> Float[Tensor, " client"]:
    """One step of every client in the stack on its own mean loss, which is returned. [client]"""
    parameters = model.parameters(method.trained)
    losses = _accumulate(model, batch, keys, list(parameters.values()), config)
    optimizer_step(parameters, rates, optimizer, optimizer_settings(config))
    return losses


def _accumulate(
    model: AdaptedModel,
    batch: Batch,
    keys: Int32[Tensor, "client row"] | None,
    parameters: Sequence[nn.Parameter],
    config: TrainConfig,
) -> Float[Tensor, " client"]:
    """Gradients of the clients' losses, in ``grad``; the batch may be worked off in parts."""
    parts = batch.parts(config.gradient_accumulation)
    part_keys = [None] * len(parts) if keys is None else keys.chunk(len(parts), dim=1)
    counts = batch.real.sum(1)
    total = torch.zeros(len(counts), device=counts.device)
    for parameter in parameters:
        parameter.grad = None
    for part, own in zip(parts, part_keys, strict=True):
        positions = learnt_positions(part)
        labels = part.labels if positions is None else part.labels[:, positions]
        logits = model(part.inputs, None if own is None else own.flatten(), positions)
        losses = client_losses(row_losses(logits, labels), part, counts)
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(losses.sum(), parameters), strict=True
        ):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        total = total + losses.detach()
    return total


def stack_state(
    model: AdaptedModel,
    method: Method,
    settings: OptimizerSettings,
    states: Sequence[ClientState],
) -> OptimizerState:
    """The clients' moments side by side; zeros for a client's first turn."""
    parameters = model.parameters(method.trained)
    moments = NamedTensors()
    for name, parameter in parameters.items():
        zero = torch.zeros(parameter.shape[1:], dtype=parameter.dtype)
        for moment in settings.moments:
            key = f"{name}#{moment}"
            stacked = torch.stack([state.moments.get(key, zero) for state in states])
            moments[key] = stacked.to(parameter.device)
    steps = torch.tensor([state.steps for state in states], dtype=torch.float64)
    return OptimizerState(moments, steps.to(model.device))


def _unstack(
    model: AdaptedModel,
    method: Method,
    clients: Sequence[int],
    optimizer: OptimizerState,
    losses: Sequence[float],
) -> list[ClientResult]:
    shared, personal = model.unload(method.shared), model.unload(method.personal)
    kept = optimizer.unstack()
    return [
        ClientResult(
            client=client,
            shared=shared[c],
            state=ClientState(personal=personal[c], moments=kept[c][0], steps=kept[c][1]),
            loss=float(losses[c]),
        )
        for c, client in enumerate(clients)
    ]
