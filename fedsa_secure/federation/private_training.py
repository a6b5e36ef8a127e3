"""``train``, with noise: the private steps of some clients, all in one stack. docs/privacy.md.

The release path reads the public shared tensors, the twin that a client keeps, and its rows. It is
given ``ClientState.twin`` and has no way to ``ClientState.personal``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int32
from torch import Tensor

from fedsa_kernels import row_keys
from fedsa_secure.adapters import AdaptedModel
from fedsa_secure.config import TrainConfig
from fedsa_secure.data import Batch, FederatedData, collate
from fedsa_secure.federation.local_training import (
    ClientResult,
    ClientState,
    dropout_words,
    learning_rates,
    optimizer_settings,
    stack_state,
)
from fedsa_secure.federation.losses import learnt_positions, row_losses
from fedsa_secure.federation.mechanism import Mechanism
from fedsa_secure.federation.optimizers import StackedOptimizer
from fedsa_secure.methods import Method
from fedsa_secure.privacy import (
    ClipGroup,
    PartialBatch,
    PrivateStep,
    SecretPoissonSampler,
    TurnSecret,
)
from fedsa_secure.types import NamedTensors, Role


@dataclass(frozen=True)
class PrivateTurn:
    """What a client's private turn is made of.

    Args:
        client: its number.
        twin: what it kept of the release path; empty before its first turn.
        moments: of the release path's optimizer, by ``name#moment``.
        steps: of that optimizer so far.
        secret: coins and noise of this turn.
    """

    client: int
    twin: NamedTensors
    moments: NamedTensors
    steps: int
    secret: TurnSecret

    @classmethod
    def of(cls, client: int, state: ClientState, secret: TurnSecret) -> "PrivateTurn":
        """The turn of a client in this state, without what is personal in it."""
        return cls(client, state.twin, state.moments, state.steps, secret)


def released_method(method: Method, config: TrainConfig) -> Method:
    """What the release path trains: everything that A depends on, or B at its public start."""
    return method.without(Role.B) if config.dp_release == "frozen-b" else method


def train_privately(  # noqa: PLR0913 - the last is for the auditor alone
    model: AdaptedModel,
    method: Method,
    config: TrainConfig,
    mechanism: Mechanism,
    data: FederatedData,
    shared: NamedTensors,
    turns: Sequence[PrivateTurn],
    round_number: int,
    make_step: Callable[..., PrivateStep] = PrivateStep,
) -> list[ClientResult]:
    """Let these clients take their private steps of one round, in one stack.

    Args:
        model: the frozen base; whatever clients it held before are replaced.
        method: what is trained with noise, see ``released_method``.
        config: steps, optimizer, schedule and seed.
        mechanism: the public constants.
        data: everybody's rows.
        shared: the public values of the shared tensors at the start of the round.
        turns: of the clients.
        round_number: counted from 1.
        make_step: what makes the step; an audit puts its canaries into it.

    Returns:
        One result per client, in the order given; its state holds the new twin only.

    Guarantee: each step of each client is a Poisson-sampled Gaussian mechanism with the sampling
        rate and noise multiplier of ``mechanism``, adaptively composed over the (fictitious)
        release of all that is trained here. Only the shared part of it leaves.
    """
    model.load([{**shared, **turn.twin} for turn in turns], method.trained)
    states = [ClientState(moments=turn.moments, steps=turn.steps) for turn in turns]
    # What is clipped record by record and noised needs no bound on its sum.
    settings = optimizer_settings(config.replace(max_grad_norm=None))
    moments = stack_state(model, method, settings, states)
    parameters = model.parameters(method.trained)
    optimizer = StackedOptimizer(parameters, moments, settings)
    rows = [data.shards[turn.client].train for turn in turns]
    step = make_step(
        model.model,
        clip_groups(model, method, mechanism),
        optimizer,
        noise_multiplier=mechanism.noise_multiplier,
        expected_batches=torch.tensor([mechanism.sampling_rate * len(own) for own in rows]),
        secrets=[turn.secret for turn in turns],
    )
    samplers = _samplers(turns, rows, mechanism, config.local_steps)
    clients = [turn.client for turn in turns]
    lengths = [data.rows.lengths()[own] for own in rows]
    with step.open():
        for number, drawn in enumerate(zip(*samplers, strict=True)):
            optimizer.rates = learning_rates(model, method, config, round_number, number)
            words = dropout_words(clients, config, round_number, number)
            # A control without data: every step is as with an empty batch.
            seen = drawn if config.dp_control is None else [[] for _ in drawn]
            places = [_short_first(*each) for each in zip(lengths, seen, strict=True)]
            step(_parts(model, data, config, rows, places, words))
    return _results(model, method, clients, moments.unstack())


def _samplers(
    turns: Sequence[PrivateTurn], rows: Sequence[np.ndarray], mechanism: Mechanism, steps: int
) -> list[SecretPoissonSampler]:
    """Which records of each client are in each step, by its own secret coins."""
    return [
        SecretPoissonSampler(turn.secret, len(own), mechanism.sampling_rate, steps)
        for turn, own in zip(turns, rows, strict=True)
    ]


def clip_groups(model: AdaptedModel, method: Method, mechanism: Mechanism) -> list[ClipGroup]:
    """The trained parameters by clip group, with thresholds whose squares add up to C²."""
    groups = []
    for roles, threshold in mechanism.thresholds(method.trained):
        parameters = model.parameters(roles)
        groups.append(ClipGroup(tuple(parameters.values()), threshold))
    return groups


def _parts(
    model: AdaptedModel,
    data: FederatedData,
    config: TrainConfig,
    rows: Sequence[np.ndarray],
    drawn: Sequence[np.ndarray],
    words: Int32[Tensor, " client"],
) -> Iterator[PartialBatch]:
    """The records of a step in parts; nobody's is cut off.

    Args:
        model: makes the losses.
        data: everybody's rows.
        config: dropout, and the rows of a pass: ``batch_size`` for each of ``clients_per_pass``.
        rows: train rows of each client.
        drawn: places in them that are in this step, of each client.
        words: for the dropout keys, which follow from a record's place and not from who else is in
            the step.
    """
    device = model.device
    size = config.batch_size * max(1, int(config.clients_per_pass) // len(rows))
    fill = [int(own[0]) for own in rows]
    keys = row_keys(words, max(len(own) for own in rows)) if config.dropout else None
    for part in range(max(1, *(-(-len(places) // size) for places in drawn))):
        chosen = [places[part * size : (part + 1) * size] for places in drawn]
        segments = [own[places] for own, places in zip(rows, chosen, strict=True)]
        batch = collate(data.rows, segments, device, fill)
        own_keys = None if keys is None else _keys_of(keys, chosen, batch).to(device)
        yield PartialBatch(_losses(model, batch, own_keys), batch.real)


def _short_first(lengths: np.ndarray, places: Sequence[int]) -> np.ndarray:
    """Places by the length of their rows, so that a part is not padded for one long row. [row]"""
    found = np.asarray(places, dtype=np.int64)
    return found[np.argsort(lengths[found], kind="stable")]


def _keys_of(
    keys: Int32[Tensor, "client place"], chosen: Sequence[np.ndarray], batch: Batch
) -> Int32[Tensor, " rows"]:
    """Dropout keys of the batch's rows, by their place among their client's rows."""
    places = np.zeros(tuple(batch.real.shape), dtype=np.int64)
    for c, own in enumerate(chosen):
        places[c, : len(own)] = own
    return keys.gather(1, torch.from_numpy(places)).flatten()


def _losses(model: AdaptedModel, batch: Batch, keys: Int32[Tensor, " rows"] | None) -> Tensor:
    positions = learnt_positions(batch)
    labels = batch.labels if positions is None else batch.labels[:, positions]
    return row_losses(model(batch.inputs, keys, positions), labels)


def _results(
    model: AdaptedModel,
    method: Method,
    clients: Sequence[int],
    kept: list[tuple[NamedTensors, int]],
) -> list[ClientResult]:
    shared, twins = model.unload(method.shared), model.unload(method.personal)
    return [
        ClientResult(
            client=client,
            shared=shared[c],
            state=ClientState(twin=twins[c], moments=kept[c][0], steps=kept[c][1]),
            loss=None,
        )
        for c, client in enumerate(clients)
    ]
