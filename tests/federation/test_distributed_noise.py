"""Noise that clients make together, through the protocol: what is in the sum that the server sees.

Every statistical check raises a false alarm with probability 10⁻⁶ at most.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedsa_secure.federation.aggregation import Contribution
from fedsa_secure.federation.masked_vector import MaskedVector, Opened
from fedsa_secure.federation.secure_aggregation import SecureAggregation
from fedsa_secure.privacy import DiscreteNoise
from fedsa_secure.privacy.ledger import read_ledger
from fedsa_secure.secagg import ServerSession
from fedsa_secure.secagg.wire import Agreements, Reveal, Survivors, decode_client, decode_server

MakeFederation = Callable[..., Any]
FALSE_ALARM = 1e-6
CLIENTS, COLLUDERS, LEAST = 7, 2, 5  # the defaults for seven clients
HONEST = LEAST - COLLUDERS
SIGMA, CLIP_NORM = 0.9, 0.05


@dataclass
class Seen:
    """What clients put under their masks, and what the server opened."""

    clean: dict[bytes, np.ndarray] = field(default_factory=dict)
    written: list[tuple[int, int, bytes, bytes]] = field(default_factory=list)
    opened: list[np.ndarray] = field(default_factory=list)
    messages: list[object] = field(default_factory=list)

    def noise_of(self, client: int, round_number: int, step: float) -> np.ndarray:
        """Its share, in steps of the grid."""
        update = next(u for k, n, u, _ in self.written if (k, n) == (client, round_number))
        return np.frombuffer(update) / step - self.clean[update]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()
    privatise, write, opening = DiscreteNoise.privatise, MaskedVector.write, MaskedVector.open
    receive, pass_on = ServerSession.receive, SecureAggregation._pass_on

    def spy_privatise(self: DiscreteNoise, update: np.ndarray, *rest: Any) -> np.ndarray:
        noisy = privatise(self, update, *rest)
        found.clean[noisy.tobytes()] = self.rounded(update)
        return noisy

    def spy_write(
        self: MaskedVector, each: Contribution, number: int, bound: float, out: np.ndarray
    ) -> None:
        write(self, each, number, bound, out)
        entry = (each.client, number, each.update.numpy().tobytes(), out.tobytes())
        found.written.append(entry)

    def spy_open(self: MaskedVector, total: np.ndarray, survivors: int, bound: float) -> Opened:
        opened = opening(self, total, survivors, bound)
        found.opened.append(self._grid(bound).decode(total, survivors))
        return opened

    def spy_receive(self: ServerSession, data: bytes) -> None:
        found.messages.append(decode_client(data, self._terms).message)
        receive(self, data)

    def spy_pass_on(self: SecureAggregation, going: Any, client: int, message: bytes, *rest: Any):
        found.messages.append(decode_server(message, self._terms))
        return pass_on(self, going, client, message, *rest)

    monkeypatch.setattr(DiscreteNoise, "privatise", spy_privatise)
    monkeypatch.setattr(MaskedVector, "write", spy_write)
    monkeypatch.setattr(MaskedVector, "open", spy_open)
    monkeypatch.setattr(ServerSession, "receive", spy_receive)
    monkeypatch.setattr(SecureAggregation, "_pass_on", spy_pass_on)
    return found


@pytest.fixture(scope="module")
def seven(federation: MakeFederation) -> Any:
    """Seven clients, of whom two may fail and two collude."""
    return federation(
        sizes=(20,) * CLIENTS,
        dp_epsilon=50.0,
        dp_unit="client",
        dp_noise="distributed",
        dp_noise_multiplier=SIGMA,
        dp_clip_norm=CLIP_NORM,
        dp_test_seed=4,
        rounds=2,
        local_steps=2,  # in the first step A does not move, since B is 0
        cross_rows=0,
        rank=8,
    )


def drops(clients: int, step: str = "masked_input") -> tuple[str, ...]:
    """The first so many fail in round 1."""
    return tuple(f"1:{client}:{step}" for client in range(clients))


def check_variance(noise: np.ndarray, variance: float) -> None:
    """A chi-square test, on both sides, of independent values around zero."""
    squares = float(noise @ noise) / variance
    assert FALSE_ALARM / 2 < stats.chi2.cdf(squares, len(noise)) < 1 - FALSE_ALARM / 2


def test_the_sum_has_the_promised_noise_whoever_fails(seven: Any, seen: Seen) -> None:
    """Round 1 loses as many clients as it may, in round 2 all are there."""
    run = seven.simulate("noise", dropouts=drops(CLIENTS - LEAST))
    noise = run._mechanism.discrete
    assert (noise.honest, noise.variance) == (HONEST, noise.total_variance / HONEST)
    promised = (SIGMA * 2 * CLIP_NORM / noise.step) ** 2
    assert noise.total_variance == pytest.approx(promised)
    assert [len(record.survivors) for record in run.records] == [LEAST, CLIENTS]
    for record, total in zip(run.records, seen.opened, strict=True):
        grid = total / noise.step
        np.testing.assert_array_equal(grid, np.rint(grid))  # whole steps: nothing was rounded
        shares = [seen.noise_of(client, record.round, noise.step) for client in record.survivors]
        clean = grid - np.sum(shares, axis=0)
        for share in shares:
            assert share.any()
        # Exactly the clipped updates: no value was cut off, no sum has wrapped.
        taken = [u for k, n, u, _ in seen.written if n == record.round and k in record.survivors]
        updates = [seen.clean[update] for update in taken]
        assert all(update.any() for update in updates)
        np.testing.assert_array_equal(clean, np.sum(updates, axis=0))
        assert all(np.linalg.norm(each) * noise.step <= 1.5 * CLIP_NORM for each in updates)
        check_variance(np.sum(shares, axis=0), promised * len(shares) / HONEST)
        # What colluders know of it they can take away; that of the others is enough.
        check_variance(np.sum(shares[-HONEST:], axis=0), promised)
        check_variance(np.sum(shares[COLLUDERS:LEAST], axis=0), promised)
    assert all(record.clipped == 0 for record in run.records)


def test_shares_of_noise_are_independent(seven: Any, seen: Seen) -> None:
    """Over clients and rounds."""
    run = seven.simulate("independent")
    step = run._mechanism.discrete.step
    shares = [seen.noise_of(client, number, step) for number in (1, 2) for client in range(CLIENTS)]
    bound = stats.norm.isf(FALSE_ALARM / 2 / len(shares) ** 2) / len(shares[0]) ** 0.5
    assert np.abs(np.corrcoef(shares) - np.eye(len(shares))).max() < bound


def test_with_too_few_survivors_nothing_is_opened_and_all_that_was_sent_counts(
    seven: Any, seen: Seen
) -> None:
    options = {"dropouts": drops(CLIENTS - LEAST + 1), "max_attempts": 1, "rounds": 1}
    run = seven.simulate("too few", **options)
    [record] = run.records
    assert record.survivors == ()
    assert record.aborts[0].startswith("TooFewClients")
    assert not seen.opened
    kinds = {type(message) for message in seen.messages}
    assert not kinds & {Survivors, Agreements, Reveal}  # it ended before anything could be unmasked
    for name, value in run.shared.items():
        assert torch.equal(value, seven.model.initial[name])
    # Masked vectors were sent: their events stay.
    senders = {client for client, *_ in seen.written}
    assert senders == set(range(CLIENTS - LEAST + 1, CLIENTS))
    events = read_ledger(seven.folder / "too few" / "ledger.jsonl")
    assert {event.client for event in events} == senders
    assert len(events) == len(senders)
    assert {event.mechanism for event in events} == {"skellam"}


def test_another_attempt_sends_the_same_vectors(seven: Any, seen: Seen) -> None:
    run = seven.simulate("again", dropouts=drops(CLIENTS - LEAST + 1), rounds=1)
    [record] = run.records
    assert (record.attempts, len(record.survivors)) == (2, CLIENTS)
    by_client: dict[int, set[tuple[bytes, bytes]]] = {}
    for client, _, update, encoded in seen.written:
        by_client.setdefault(client, set()).add((update, encoded))
    assert len(seen.written) == 2 * CLIENTS - (CLIENTS - LEAST + 1)
    assert [len(each) for each in by_client.values()] == [1] * CLIENTS
    events = read_ledger(seven.folder / "again" / "ledger.jsonl")
    assert sorted(event.client for event in events) == list(range(CLIENTS))
    step = run._mechanism.discrete.step
    shares = [seen.noise_of(client, 1, step) for client in range(CLIENTS)]
    clean = seen.opened[0] / step - np.sum(shares, axis=0)
    expected = np.sum([seen.clean[u] for u in {u for _, _, u, _ in seen.written}], axis=0)
    np.testing.assert_array_equal(clean, expected)


def test_a_lost_round_is_in_epsilon_like_any_other(seven: Any, seen: Seen) -> None:
    options = {"dropouts": drops(CLIENTS - LEAST + 1), "max_attempts": 1, "dp_test_seed": None}
    run = seven.simulate("lost", **options, dp_home=str(seven.folder / "home"))
    assert [record.survivors == () for record in run.records] == [True, False]
    rounds = [run._mechanism.epsilon(count) for count in (1, 2)]
    assert [record.epsilon for record in run.records] == rounds
    report = run._release.spending.report()
    assert report.by_client[CLIENTS - 1] == rounds[1]
    assert report.by_client[0] == rounds[0]  # it was not there in the first round
    assert f"against the server with at most {report.colluders} colluding" in report.statement
    assert report.survivors - report.colluders > 0
    assert f"at least {report.survivors} survivors in every sum" in report.statement
    run.close()


def test_noise_of_a_clients_own_covers_its_whole_update(
    federation: MakeFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dp_noise='local': the length of an update is that of the noise, give or take the clip."""
    sigma, clip_norm = 1.5, 0.05
    sent: list[np.ndarray] = []
    write = MaskedVector.write

    def spy(self: MaskedVector, each: Contribution, *rest: Any) -> None:
        sent.append(each.update.numpy())
        write(self, each, *rest)

    monkeypatch.setattr(MaskedVector, "write", spy)
    made = federation(
        dp_epsilon=8.0,
        dp_unit="client",
        dp_noise_multiplier=sigma,
        dp_clip_norm=clip_norm,
        dp_test_seed=1,
        rounds=1,
        cross_rows=0,
        rank=8,
    )
    made.simulate("local")
    deviation = sigma * 2 * clip_norm
    assert len(sent) == 4
    for update in sent:
        low, high = stats.chi.isf([1 - FALSE_ALARM, FALSE_ALARM], len(update)) * deviation
        assert low - clip_norm < np.linalg.norm(update) < high + clip_norm
