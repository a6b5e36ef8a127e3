"""For every method and adapter: what leaves a client, that nothing else does, and what is frozen.

What is expected stands here by hand, from the papers, and is not asked of the table of methods.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsa_secure.federation.aggregation import ClearAggregation, Outcome
from fedsa_secure.federation.encoding import Layout
from fedsa_secure.federation.local_training import ClientResult, ClientState
from fedsa_secure.methods import METHODS
from fedsa_secure.runtimes import simulation
from fedsa_secure.runtimes.simulation import Simulation
from fedsa_secure.types import NamedTensors, Role

MakeFederation = Callable[..., Any]
Shapes = list[tuple[str, tuple[int, ...]]]

# By method: which factors leave a client, and which it trains. VeRA's d stands for A, its b for B.
LEAVES = {
    "fedsa": "A",
    "fedavg": "AB",
    "ffa": "B",
    "feddpa": "AB",
    "local": "",
    "random-a": "",
    "head-only": "",
}
TRAINS = {
    "fedsa": "AB",
    "fedavg": "AB",
    "ffa": "B",
    "feddpa": "AB",
    "local": "AB",
    "random-a": "B",
    "head-only": "",
}
ADAPTERS = ("lora", "rslora", "vera")
# Five layers, four of them 32 wide and one 48; three of them 32 high and two 48; rank 3; float32.
LORA_BYTES = {"A": 3 * (4 * 32 + 48) * 4, "B": (3 * 32 + 2 * 48) * 3 * 4}
VERA_BYTES = {"A": 5 * 3 * 4, "B": (3 * 32 + 2 * 48) * 4}
BYTES = {"lora": LORA_BYTES, "rslora": LORA_BYTES, "vera": VERA_BYTES}

RANK, CLIENTS, ROUNDS, STEPS = 3, 4, 3, 3
LAYERS = {
    "bert.encoder.layer.0.attention.self.query": (32, 32),
    "bert.encoder.layer.0.intermediate.dense": (32, 48),
    "bert.encoder.layer.1.attention.self.query": (32, 32),
    "bert.encoder.layer.1.intermediate.dense": (32, 48),
    "bert.encoder.layer.1.output.dense": (48, 32),
}
HEAD: Shapes = [("classifier.weight", (3, 32)), ("classifier.bias", (3,))]
VICTIM = 2  # the client whose kept tensors are tampered with


def factors(adapter: str, letters: str, private: bool = False) -> Shapes:
    """Names and shapes of these factors of all layers, in the model's order."""
    found: Shapes = []
    for path, (d_in, d_out) in LAYERS.items():
        for letter in letters:
            if adapter == "vera":
                name, shape = ("d", (RANK,)) if letter == "A" else ("b", (d_out,))
            else:
                name, shape = letter, ((RANK, d_in) if letter == "A" else (d_out, RANK))
            found.append((f"{path}.{'private_' * private}{name}", shape))
    return found


@dataclass
class Turn:
    """One client in one round.

    Args:
        public: what came from the server.
        result: what its training returned.
        trained: its adapters and head as the model held them after the last step.
    """

    public: NamedTensors
    result: ClientResult
    trained: NamedTensors


@dataclass
class Recorded:
    """A run, and everything that passed between its clients and its server."""

    method: str
    adapter: str
    made: Any
    start: NamedTensors
    frozen: NamedTensors
    run: Simulation | None = None
    turns: dict[tuple[int, int], Turn] = field(default_factory=dict)
    encoded: list[tuple[Shapes, Tensor]] = field(default_factory=list)
    sent: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def leaves(self) -> Shapes:
        return factors(self.adapter, LEAVES[self.method])

    @property
    def stays(self) -> Shapes:
        kept = [letter for letter in TRAINS[self.method] if letter not in LEAVES[self.method]]
        own = factors(self.adapter, "".join(kept)) + HEAD
        return own + (factors(self.adapter, "AB", private=True) if self.is_dual else [])

    @property
    def is_dual(self) -> bool:
        return self.method == "feddpa"


def copied(tensors: NamedTensors) -> NamedTensors:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def base_tensors(made) -> NamedTensors:
    """The base model's weights and all buffers, VeRA's random factors among them."""
    model = made.model.model
    slots = made.model.initial
    weights = {name: p for name, p in model.named_parameters() if name not in slots}
    return copied({**weights, **dict(model.named_buffers())})


def tampered(state: ClientState) -> ClientState:
    """Other values of everything that a client keeps."""
    stream = torch.Generator().manual_seed(7)
    personal = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=stream)
        for name, tensor in state.personal.items()
    }
    return replace(state, personal=personal, moments={n: 3 * t for n, t in state.moments.items()})


def record(made, method: str, adapter: str, name: str, tamper: bool = False, **options) -> Recorded:
    """Run with spies on all that is trained, encoded and summed.

    Args:
        tamper: change what the victim has kept, before its turn in the second round; and let every
            turn end with all its tensors held out as shared ones.
    """
    seen = Recorded(method, adapter, made, copied(made.model.initial), base_tensors(made))
    train, add, encode = simulation.train_clients, ClearAggregation.round, Layout.encode

    def spy_train(model, row, config, data, shared, turns, number) -> list[ClientResult]:
        if tamper and number == 2:
            turns = [(k, tampered(state) if k == VICTIM else state) for k, state in turns]
        public = copied(shared)
        results = train(model, row, config, data, shared, turns, number)
        stacked, offered = copied(model.parameters(set(Role))), []
        for segment, result in enumerate(results):
            own = {name: tensor[segment] for name, tensor in stacked.items()}
            seen.turns[number, result.client] = Turn(public, result, own)
            offered.append(replace(result, shared=own) if tamper else result)
        return offered

    def spy_encode(layout: Layout, tensors: NamedTensors) -> Tensor:
        vector = encode(layout, tensors)
        seen.encoded.append(([(n, tuple(s)) for n, s in layout.shapes.items()], vector))
        return vector

    def spy_add(clear, number, cohort, next_cohort, shared, contribute) -> Outcome:
        arrived = list(contribute(cohort))
        seen.sent[number] = [each.update for each in arrived]
        return add(clear, number, cohort, next_cohort, shared, lambda _: iter(arrived))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "train_clients", spy_train)
        patch.setattr(ClearAggregation, "round", spy_add)
        patch.setattr(Layout, "encode", spy_encode)
        seen.run = made.simulate(name, **options)
    return seen


def one(method: str, adapter: str) -> object:
    """rsLoRA leaves as LoRA does, of which it is another scaling: once is enough but by hand."""
    rare = adapter == "rslora" and method != "fedsa"
    marks = [pytest.mark.slow] if rare else []
    return pytest.param((method, adapter), marks=marks, id=f"{method}-{adapter}")


@pytest.fixture(scope="module", params=[one(*pair) for pair in product(METHODS, ADAPTERS)])
def recorded(federation: MakeFederation, request: pytest.FixtureRequest) -> Recorded:
    """Two passes a round; the rate is constant, so that runs of any length begin alike; and every
    step takes all rows of a client, so that the losses of two rounds can be compared.
    """
    method, adapter = request.param
    made = federation(
        (24, 9, 17, 30),
        batch_size=24,
        method=method,
        adapter=adapter,
        rank=RANK,
        rounds=ROUNDS,
        local_steps=STEPS,
        schedule="constant",
        cross_rows=0,
        secure_aggregation=False,  # so that single vectors can be seen
        clients_per_pass=2,
        checkpoint_every=ROUNDS,
    )
    return record(made, method, adapter, "run")


def flat(tensors: NamedTensors, names: Sequence[str]) -> Tensor:
    return torch.cat([torch.zeros(0), *(tensors[name].flatten() for name in names)])


def test_a_vector_is_the_update_of_what_the_method_shares(recorded: Recorded) -> None:
    """By name, shape, byte and value."""
    expected = recorded.leaves
    size = sum(BYTES[recorded.adapter][letter] for letter in LEAVES[recorded.method])
    arrived = [vector for vectors in recorded.sent.values() for vector in vectors]
    assert len(arrived) == len(recorded.encoded) == ROUNDS * CLIENTS
    for vector, (shapes, encoded), turn in zip(
        arrived, recorded.encoded, recorded.turns.values(), strict=True
    ):
        assert vector is encoded
        assert shapes == expected
        assert vector.numel() * vector.element_size() == size == 4 * sum(prod(s) for _, s in shapes)
        names = [name for name, _ in shapes]
        assert torch.equal(vector, flat(turn.trained, names) - flat(turn.public, names))
        assert bool(vector.any()) == bool(names)
    assert {r.uplink_bytes for r in recorded.run.records} == {size}
    assert {r.downlink_bytes for r in recorded.run.records} == {size}


def test_these_vectors_are_all_that_the_server_learns(recorded: Recorded) -> None:
    """The public tensors of every round follow from the start and the vectors alone."""
    names = [name for name, _ in recorded.leaves]
    public = flat(recorded.start, names)
    for number, vectors in recorded.sent.items():
        for client in range(CLIENTS):
            assert list(recorded.turns[number, client].public) == names
            assert torch.equal(flat(recorded.turns[number, client].public, names), public)
        public = (public.double() + sum(v.double() for v in vectors) / CLIENTS).float()
    assert list(recorded.run.shared) == names
    assert torch.equal(flat(recorded.run.shared, names), public)


def test_what_is_trained_and_not_shared_is_kept_by_its_client(recorded: Recorded) -> None:
    expected = dict(recorded.stays)
    for client in range(CLIENTS):
        turn = recorded.turns[ROUNDS, client]
        kept = turn.result.state.personal
        assert {name: tuple(tensor.shape) for name, tensor in kept.items()} == expected
        final = recorded.run.client_tensors(client)
        other = recorded.run.client_tensors((client + 1) % CLIENTS)
        for name in expected:
            assert torch.equal(final[name], turn.trained[name])
            assert not torch.equal(final[name], recorded.start[name])
            assert not torch.equal(final[name], other[name])


def test_what_a_client_keeps_moves_others_through_its_vector_alone(recorded: Recorded) -> None:
    """Tampering with them moves the victim alone, though it shares a pass; and turns that hold out
    all that they have send what they would have sent.
    """
    attacked = record(
        recorded.made, recorded.method, recorded.adapter, "attacked", tamper=True, rounds=2
    )
    for client in range(CLIENTS):
        assert same_turn(attacked.turns[1, client], recorded.turns[1, client])
        equal = same_turn(attacked.turns[2, client], recorded.turns[2, client])
        assert equal == (client != VICTIM)
        assert torch.equal(attacked.sent[1][client], recorded.sent[1][client])
        equal = torch.equal(attacked.sent[2][client], recorded.sent[2][client])
        assert equal == (client != VICTIM or not recorded.leaves)
    test_these_vectors_are_all_that_the_server_learns(attacked)


def same_turn(left: Turn, right: Turn) -> bool:
    """Whether everything that a turn started from and left behind has the same bits."""
    pairs = [
        (left.public, right.public),
        (left.trained, right.trained),
        (left.result.shared, right.result.shared),
        (left.result.state.personal, right.result.state.personal),
        (left.result.state.moments, right.result.state.moments),
    ]
    return left.result.loss == right.result.loss and all(
        ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
        for ours, theirs in pairs
    )


def test_what_is_frozen_keeps_the_bits_of_its_public_start(recorded: Recorded) -> None:
    """A under ffa and random-a, the base model, VeRA's random factors."""
    moving = {name for name, _ in recorded.leaves + recorded.stays}
    still = set(recorded.start) - moving
    idle = [letter for letter in "AB" if letter not in TRAINS[recorded.method]]
    assert still == {name for name, _ in factors(recorded.adapter, "".join(idle))}
    for turn in recorded.turns.values():
        for name in still:
            assert torch.equal(turn.trained[name], recorded.start[name]), name
    for client in range(CLIENTS):
        assert set(recorded.run.client_tensors(client)) == moving
    after = base_tensors(recorded.made)
    assert after.keys() == recorded.frozen.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, recorded.frozen[name]), name
    random = [name for name in after if name.endswith((".A", ".B", ".private_A", ".private_B"))]
    pairs = 0 if recorded.adapter != "vera" else 1 + recorded.is_dual
    assert len(random) == 2 * pairs * len(LAYERS)


def test_it_learns(recorded: Recorded) -> None:
    losses = [entry.loss for entry in recorded.run.records]
    assert losses[-1] < losses[0]
