"""What a client limits by itself: rounds, openings, live attempts, processes on its folder."""

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from secagg_attackers import MODEL, Federation

from fedsa_secure.csprng import Keystream
from fedsa_secure.errors import MalformedMessage, ReplayedRound, SecretsLost
from fedsa_secure.secagg import (
    ClientSession,
    FixedPoint,
    Party,
    Terms,
    Thresholds,
    Update,
    open_session,
    rounding_key,
)
from fedsa_secure.secagg.derivation import digest
from fedsa_secure.secagg.server import CollectingShares
from fedsa_secure.secagg.states import Aborted, HasMasked, Peer
from fedsa_secure.secagg.wire import Delivery, Invite, decode_client, encode_server


def invite(federation: Federation, round_number: int, attempt: int = 1) -> bytes:
    return encode_server(Invite(federation.server.sid, round_number, attempt))


def test_a_server_cannot_look_for_a_round_with_a_cohort_that_suits_it() -> None:
    """The numbers of rounds are part of the terms, so it can only take one that will come."""
    federation = Federation(4)
    terms = Terms(federation.terms.roster, federation.terms.thresholds, 6, bytes(32), rounds=7)
    assert terms.hash != federation.terms.hash
    federation.terms = terms
    federation.clients = {k: federation.client(k) for k in federation.cohort}
    federation.opened()
    for number in (8, 2**32 - 1):
        with pytest.raises(ReplayedRound, match="the run has no round"):
            federation.tell(0, invite(federation, number))
    assert federation.tell(0, invite(federation, 7))


def test_the_bound_of_a_sparse_graph_is_over_all_rounds() -> None:
    few, many = (Thresholds.of(1000, rounds=rounds) for rounds in (1, 10_000))
    assert few.neighbours < many.neighbours < 999
    assert few.shares < many.shares


def test_openings_are_counted_over_sessions_and_rounds() -> None:
    federation = Federation(4).opened()
    federation.run(1)
    federation.opened()
    federation.run(2)
    assert federation.clients[0].state.openings == 2


def test_one_process_has_a_folder(tmp_path: Path) -> None:
    """Two would mask twice with the same keys: the difference of their messages is in the clear."""
    federation = Federation(3)
    party = Party(federation.terms, 0, federation.identities[0])
    first = open_session(party, lambda _: federation.cohort, tmp_path)
    with pytest.raises(SecretsLost, match="in use by another process"):
        open_session(party, lambda _: federation.cohort, tmp_path)
    elsewhere = (
        "import sys, pathlib; from fedsa_secure.secagg import FileJournal; "
        "FileJournal(pathlib.Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", elsewhere, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "SecretsLost" in done.stderr
    first.close()
    open_session(party, lambda _: federation.cohort, tmp_path).close()
    assert subprocess.run(command, check=False).returncode == 0


def test_answers_that_need_not_be_sent_again_are_not_kept() -> None:
    """A simulation would hold a vector for every client."""
    federation = Federation(4)
    party = Party(federation.terms, 0, federation.identities[0])
    federation.clients[0] = ClientSession(party, lambda _: federation.cohort, resend=False)
    federation.opened()
    delivery = federation.until(Delivery)[0]
    assert federation.tell(0, delivery)
    assert federation.clients[0]._answers == {}
    assert isinstance(federation.clients[0].state.attempts[1], HasMasked)
    with pytest.raises(Exception, match="Delivery came"):
        federation.tell(0, delivery)
    assert isinstance(federation.clients[0].state.attempts[1], Aborted)


def test_the_hash_of_a_model_has_its_length() -> None:
    with pytest.raises(ValueError, match="32 bytes, not 31"):
        Update(MODEL[1:], lambda values: None)


def test_buffers_are_not_hashed_as_lists_of_numbers() -> None:
    for wrong in (bytearray(3), memoryview(bytes(3))):
        with pytest.raises(TypeError, match="not a buffer"):
            digest("label", wrong)


def test_a_phase_takes_its_own_kind_only() -> None:
    """The session sorts messages before; the phase does not rely on it."""
    federation = Federation(3).opened()
    raw = federation.tell(0, federation.begin()[0])
    phase = CollectingShares(federation.server._phase.attempt, {})
    with pytest.raises(MalformedMessage, match="an? Advertise where a Shares belongs"):
        phase.receive(decode_client(raw, federation.terms))


def test_a_peer_does_not_show_the_secret() -> None:
    peer = Peer(b"secret" * 5, b"public" * 5)
    assert repr(peer) == "Peer(…)"
    assert peer.__rich_repr__() == []
    assert msgspec.structs.asdict(peer)["secret"] == b"secret" * 5


def test_coins_differ_by_seed_client_and_round() -> None:
    keys = {rounding_key(*place) for place in [(0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2)]}
    assert len(keys) == 4
    assert all(len(key) == 32 for key in keys)


def test_zero_is_zero_on_a_grid_of_any_range_that_can_be_configured() -> None:
    for bound in (1e-30, 1.0, 1e30):
        grid, out = FixedPoint(5, bound), np.empty(3, np.uint32)
        assert grid.encode(np.zeros(3), Keystream(bytes(32)), out) == 0
        assert (grid.decode(out, 1) == 0).all()
