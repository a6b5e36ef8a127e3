"""Rounds with an honest server, in a network that loses, delays, repeats and breaks messages, and
with clients that die at any point: a sum is exact, or the round ended in a named error.

``Network`` checks the laws of every round: the sum is that of the survivors' vectors, bit for bit,
or the round was given up with a ``ProtocolError``; after one round without faults everyone is back,
and a round takes three exchanges; one message has one answer, however often its client dies.
"""

import tempfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
from faulty_network import (
    KINDS,
    MODEL,
    QUIET,
    BrokenLawError,
    Fault,
    Listed,
    Network,
    Place,
    Plan,
    Seeded,
    Tally,
    replay,
    run_seed,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from fedsa_secure.errors import OutOfOrder, TooFewClients
from fedsa_secure.secagg import ClientSession, server
from fedsa_secure.secagg.server import CollectingVectors
from fedsa_secure.secagg.shamir import new_secret
from fedsa_secure.secagg.states import AttemptState, HasKeys, IsMasking
from fedsa_secure.secagg.wire import Invite, Signed, decode_server


@pytest.mark.parametrize("clients", [3, 4, 5, 12])
def test_without_faults_every_round_takes_three_exchanges(tmp_path: Path, clients: int) -> None:
    """Five where nothing was set up with the round before."""
    network = Network(clients, tmp_path)
    network.open()
    for exchanges in (5, 3, 3):
        outcome = network.run_round()
        assert outcome.survivors == network.cohort
        assert (outcome.exchanges, outcome.begun) == (exchanges, 1)


def test_a_sum_is_exact_or_the_round_is_given_up(tmp_path: Path) -> None:
    tally = Tally()
    for seed in range(9):
        tally.add(run_seed(seed, tmp_path / str(seed), most=6).tally)
    assert tally.rounds >= 64
    assert tally.partial > 5
    assert set(tally.faults) == set(KINDS)


@pytest.mark.slow
def test_thousands_of_rounds_are_exact_or_given_up(tmp_path: Path) -> None:
    tally, seed = Tally(), 1000
    while tally.rounds < 2000:
        tally.add(run_seed(seed, tmp_path / str(seed)).tally)
        seed += 1
    print(f"\n{tally}")
    assert tally.complete > tally.rounds / 2
    assert tally.partial > tally.rounds / 20
    assert set(tally.faults) == set(KINDS)


def test_the_faults_of_a_seed_can_be_run_again() -> None:
    first, second = (replay(7, rounds=3, most=5) for _ in range(2))
    assert first.tally.faults
    assert [line for line in first.log if "Fault" in line] == [
        line for line in second.log if "Fault" in line
    ]


PLACES = st.tuples(
    st.integers(0, 1),  # begun before
    st.integers(1, 5),  # exchange
    st.integers(0, 4),  # client
    st.booleans(),  # to the server
    st.integers(0, 1),  # first or second message
)
FAULTS = st.builds(Fault, st.sampled_from(KINDS), st.integers(0, 120))


class Rounds(RuleBasedStateMachine):
    """Rounds whose faults Hypothesis chooses, restarts, and servers that start anew."""

    @initialize(clients=st.integers(3, 5))
    def begin(self, clients: int) -> None:
        self._temporary = tempfile.TemporaryDirectory()
        self.network = Network(clients, Path(self._temporary.name))
        self.network.open()

    @rule(faults=st.dictionaries(PLACES, FAULTS, min_size=1, max_size=5), reverse=st.booleans())
    def round_with_faults(
        self, faults: dict[tuple[int, int, int, bool, int], Fault], reverse: bool
    ) -> None:
        number = self.network.round + 1
        places = {Place(number, *place): fault for place, fault in faults.items()}
        self.network.run_round(Listed(places, reverse))

    @rule()
    def round_without(self) -> None:
        self.network.run_round(QUIET)

    @rule(client=st.integers(0, 2))
    def restart(self, client: int) -> None:
        """Between rounds nothing is lost by it."""
        self.network.restart(client)

    @rule(seed=st.integers(0, 9))
    def server_starts_anew(self, seed: int) -> None:
        self.network.open(Seeded(seed, 0.05))

    def teardown(self) -> None:
        if hasattr(self, "_temporary"):
            self._temporary.cleanup()


TestRounds = Rounds.TestCase
TestRounds.settings = settings(max_examples=8, stateful_step_count=5)


@pytest.mark.parametrize("aborts", [1, 2, 3])
def test_every_attempt_of_a_round_has_a_number_of_its_own(tmp_path: Path, aborts: int) -> None:
    """Also where keys of the next round were under way: clients refuse a number they have seen."""
    network = Network(3, tmp_path)
    network.open()
    network.run_round()
    server, numbers = network.server, []
    for _ in range(aborts):
        exchange = server.begin(2, network.cohort, MODEL, network.cohort)
        while not server.members:
            network._carry(exchange, (2, 0, 0))
            exchange = server.close()
        numbers.append(decode_server(exchange[0][0], network.terms).attempt)
        with pytest.raises(TooFewClients):
            server.close()
    assert numbers == list(range(aborts))
    network.round = 1
    assert network.run_round(Listed()).begun == 1


def test_what_a_crash_takes_is_one_round(tmp_path: Path) -> None:
    """Killed while it masks, a client is missing in this round and back in the next."""
    network = Network(4, tmp_path)
    network.open()
    network.run_round()
    for number in (2, 4):
        kill = {Place(number, 0, 1, 3, False, 0): Fault("kill in fill", 2 + 20 * (number // 4))}
        assert network.run_round(Listed(kill)).survivors == (0, 1, 2)
        assert network.run_round(Listed()).survivors == network.cohort[: 4 - number // 4]


# The laws are no good if they hold for everything: each of these mistakes has to break one.


def check_caught(folder: Path, faults: Plan, law: str, rounds: int = 1) -> None:
    """Round 2, where the faults are, or some rounds after it break a law."""
    network = Network(5, folder)
    network.open()
    network.run_round()

    def run() -> None:
        for _ in range(rounds):
            network.run_round(faults if network.round < 2 else QUIET)

    with pytest.raises(BrokenLawError, match=law):
        run()


def at_vector(fault: Fault, to_server: bool = True) -> Listed:
    """A fault of the message of client 1 that has its vector, in a round of three exchanges."""
    return Listed({Place(2, 0, 1, 1, to_server, 0): fault})


def test_a_vector_that_is_summed_twice_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = CollectingVectors.receive

    def twice(phase: CollectingVectors, signed: Signed) -> CollectingVectors:
        after = honest(phase, signed)
        if len(after.arrived) == 1 and phase.attempt.round == 2:
            np.add(phase.total, signed.payload, out=phase.total)
        return after

    monkeypatch.setattr(CollectingVectors, "receive", twice)
    check_caught(tmp_path, Listed(), "not the sum")


def test_a_client_that_masks_again_with_fresh_secrets_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = ClientSession._put

    def fresh(session: ClientSession, after: AttemptState) -> None:
        if isinstance(after, IsMasking):
            before = session.state.attempts[after.round]
            after = msgspec.structs.replace(before, seed=new_secret())
        honest(session, after)

    monkeypatch.setattr(ClientSession, "_put", fresh)
    check_caught(tmp_path, at_vector(Fault("kill in fill", 3), to_server=False), "not the sum")


def test_a_vector_that_is_taken_a_second_time_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_check_sender", lambda client, allowed, seen: None)
    check_caught(tmp_path, at_vector(Fault("duplicate")), "not the sum")


def test_a_broken_vector_whose_signature_nobody_checks_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Signed, "check", lambda signed, public_key: None)
    check_caught(tmp_path, at_vector(Fault("corrupt", 12)), "not the sum")


def test_masks_of_the_dropped_that_stay_in_the_sum_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        server.CollectingReveals, "_pairwise_masks", lambda phase, client, shares: []
    )
    check_caught(tmp_path, at_vector(Fault("drop")), "not the sum")


def test_a_client_that_never_comes_back_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = ClientSession._begin

    def offended(session: ClientSession, message: Invite) -> tuple[HasKeys, bytes]:
        if message.round > 2 and 2 not in session.state.sent and session.state.closed < 2:
            raise OutOfOrder("it stays away")
        return honest(session, message)

    monkeypatch.setattr(ClientSession, "_begin", offended)
    kill = at_vector(Fault("kill in fill", 20), to_server=False)
    check_caught(tmp_path, kill, "rounds after the last fault", rounds=4)


def test_a_client_that_answers_one_message_in_two_ways_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a restarted client had not found what it sent, and advertised other keys."""
    honest = ClientSession._attempt

    def forgetful(session: ClientSession, message: object, *rest: object) -> object:
        if isinstance(message, Invite) and message.round in session.state.attempts:
            state = session.state
            empty = {k: v for k, v in state.begun.items() if k != message.round}
            session.state = msgspec.structs.replace(state, begun=empty, requests={})
        return honest(session, message, *rest)

    monkeypatch.setattr(ClientSession, "_attempt", forgetful)
    again = {Place(2, 0, 1, 1, False, 1): Fault("duplicate")}
    check_caught(tmp_path, Listed(again), "in two ways")
