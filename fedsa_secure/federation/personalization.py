"""The personal part of a private run: B and head without noise, on top of the released A."""

from collections.abc import Sequence
from dataclasses import replace

from fedsa_secure.adapters import AdaptedModel
from fedsa_secure.config import TrainConfig
from fedsa_secure.data import FederatedData, collate, draw_rows
from fedsa_secure.federation.local_training import (
    ClientState,
    dropout_keys,
    optimizer_settings,
    plain_step,
    stack_state,
)
from fedsa_secure.federation.schedule import rate_factor
from fedsa_secure.methods import Method
from fedsa_secure.types import NamedTensors, Role


def personalize(
    model: AdaptedModel,
    method: Method,
    config: TrainConfig,
    data: FederatedData,
    shared: NamedTensors,
    turns: Sequence[tuple[int, ClientState]],
) -> list[ClientState]:
    """Train the personal tensors of some clients, in one stack, with the shared ones frozen.

    They start from the client's twin, which is as private as the release and costs nothing more.

    Args:
        model: the frozen base; whatever clients it held before are replaced.
        method: what is personal.
        config: ``personal_steps``, learning rates and batch size.
        data: everybody's rows.
        shared: the released tensors after the last round.
        turns: the clients and their states.

    Returns:
        The states with what is personal in them, in the order given. The twins stay as they are.

    Guarantee: none for what it returns, which stays at the client. Nothing that was released
        depends on it, since it runs after the last release.
    """
    if not method.personal or config.personal_steps == 0:
        return [state for _, state in turns]
    clients = [client for client, _ in turns]
    own = method.only(method.personal)
    model.load([{**shared, **state.twin} for _, state in turns], own.trained)
    settings = optimizer_settings(config)
    optimizer = stack_state(model, own, settings, [ClientState() for _ in turns])
    last = config.rounds + 1
    draws = [
        draw_rows(
            data.shards[client].train,
            config.personal_steps,
            config.batch_size,
            config.seed,
            client,
            last,
        )
        for client in clients
    ]
    for step in range(config.personal_steps):
        batch = collate(data.rows, [draw[step] for draw in draws], model.device)
        keys = dropout_keys(batch, clients, config, last, step)
        plain_step(model, own, config, batch, keys, optimizer, _rates(model, own, config, step))
    personal = model.unload(own.trained)
    return [replace(state, personal=personal[c]) for c, (_, state) in enumerate(turns)]


def _rates(model: AdaptedModel, method: Method, config: TrainConfig, step: int) -> dict[str, float]:
    factor = rate_factor(config.schedule, step, config.personal_steps)
    head = set(model.names([Role.HEAD]))
    head_rate = config.head_learning_rate or config.learning_rate
    return {
        name: factor * (head_rate if name in head else config.learning_rate)
        for name in model.names(method.trained)
    }
