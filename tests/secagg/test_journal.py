"""A client's disk: who may read it, what is on it when, and what a crash or damage leaves of it."""

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_network import MODEL, Fault, Killed, Listed, Network, Place, dying

from fedsa_secure.errors import CheckpointError, ProtocolError, SecretsLost, WrongTerms
from fedsa_secure.secagg import Party, Terms, Thresholds, Update, journal, open_session
from fedsa_secure.secagg.client_session import ClientSession
from fedsa_secure.secagg.journal import stored_session
from fedsa_secure.secagg.states import (
    Aborted,
    HasAgreed,
    HasKeys,
    HasMasked,
    HasRevealed,
    HasShared,
    IsMasking,
)
from fedsa_secure.secagg.wire import decode_server

After = Callable[[ClientSession, bytes], None]
STEPS = [HasKeys, HasShared, HasMasked, HasAgreed, HasRevealed]


class Watched(Network):
    """Tells what client 0 has done, and may stop it from doing anything else."""

    def __init__(self, folder: Path, clients: int = 4, before: After = lambda *_: None) -> None:
        super().__init__(clients, folder)
        self.after: After = lambda *_: None
        self.before = before
        self.open()

    def _receive(self, client: int, data: bytes, kill: Fault | None) -> bytes | None:
        if client == 0:
            self.before(self.clients[0], data)
        answer = super()._receive(client, data, kill)
        if client == 0:
            self.after(self.clients[0], data)
        return answer


def contents(folder: Path) -> bytes:
    """All files of a folder, hidden ones too, one after the other."""
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def secrets_of(session: ClientSession, round_number: int) -> list[bytes]:
    """Everything in a state that nobody else may know."""
    state = session.state.attempts.get(round_number)
    if isinstance(state, HasKeys):
        return [state.sealing_key, state.mask_key, state.seed]
    if isinstance(state, HasShared):
        own = [state.mask_key, state.seed, *(peer.secret for peer in state.peers.values())]
        return [*own, state.own_share[:32], state.own_share[32:]]
    if isinstance(state, HasMasked | HasAgreed):
        return [part for both in state.held.values() for part in (both[:32], both[32:])]
    return []


@pytest.mark.parametrize("umask", [0, 0o002, 0o022, 0o027, 0o077])
def test_files_are_for_the_owner_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        network = Watched(tmp_path)
        network.run_round()
    finally:
        os.umask(before)
    for client in network.cohort:
        folder = network.folder(client)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
        assert modes == {0o600}


def test_files_are_for_the_owner_alone_while_they_are_written(tmp_path: Path) -> None:
    """Killed in the middle of a write, a client leaves a part of a file: also 0600."""
    before = os.umask(0)
    try:
        network = Watched(tmp_path)
        network.run_round(Listed({Place(1, 0, 5, 0, False, 0): Fault("kill", 1 + 20)}))
    finally:
        os.umask(before)
    leftovers = list(network.folder(0).glob(".*.tmp"))
    assert leftovers, "no write was cut off"
    assert {stat.S_IMODE(path.stat().st_mode) for path in leftovers} == {0o600}


def damaged(content: bytes) -> list[bytes]:
    """Cut off, grown, and with one bit turned, anywhere."""
    cut = [content[:end] for end in range(0, len(content), 7)]
    grown = [content + b"\0", content + content]
    turned = []
    for place in range(len(content)):
        other = bytearray(content)
        other[place] ^= 1 << place % 8
        turned.append(bytes(other))
    return [*cut, *grown, *turned]


def test_a_damaged_state_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    network = Watched(tmp_path)
    network.run_round()
    path = network.folder(0) / "state.bin"
    party = Party(network.terms, 0, network.identities[0])
    network.clients[0].close()
    for content in damaged(path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(SecretsLost, match="leave the run"):
            open_session(party, lambda _: network.cohort, network.folder(0))
        assert path.read_bytes() == content


def test_a_state_of_other_terms_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    network = Watched(tmp_path)
    network.run_round()
    network.clients[0].close()
    files = {path: path.read_bytes() for path in network.folder(0).iterdir()}
    terms = Terms(network.terms.roster, Thresholds.of(4), network.terms.size, b"\1" * 32)
    with pytest.raises(WrongTerms):
        open_session(
            Party(terms, 0, network.identities[0]), lambda _: network.cohort, network.folder(0)
        )
    assert {path: path.read_bytes() for path in network.folder(0).iterdir()} == files


def test_secrets_leave_the_disk_when_their_step_is_over(tmp_path: Path) -> None:
    """Keys and seed once the vector is masked, shares of others once they are revealed."""
    network = Watched(tmp_path)
    keys: dict[int, list[bytes]] = {}
    shares: dict[int, list[bytes]] = {}

    def look(session: ClientSession, _: bytes) -> None:
        disk = contents(network.folder(0))
        for number, state in session.state.attempts.items():
            secrets = secrets_of(session, number)
            assert all(secret in disk for secret in secrets)  # else what follows finds nothing
            if isinstance(state, HasKeys | HasShared):
                keys[number] = secrets[:3]
                continue
            assert not any(secret in disk for secret in keys[number])
            if isinstance(state, HasMasked | HasAgreed):
                shares[number] = secrets

    network.after = look
    for number in range(1, 4):
        assert network.run_round().survivors == network.cohort
        assert len(keys[number]) == 3
        assert len(shares[number]) == 8
        disk = contents(network.folder(0))  # the answer that reveals stays for one round more
        assert not any(share in disk for share in shares.get(number - 1, []))


@pytest.mark.parametrize("step", STEPS[:-1], ids=lambda step: step.__name__)
def test_secrets_leave_the_disk_with_an_abort(tmp_path: Path, step: type) -> None:
    network = Watched(tmp_path)
    found: list[bytes] = []

    def refuse(session: ClientSession, _: bytes) -> None:
        if isinstance(session.state.attempts.get(1), step) and not found:
            found.extend(secrets_of(session, 1))
            assert all(secret in contents(network.folder(0)) for secret in found)
            with pytest.raises(ProtocolError):
                session.receive(b"no message")
            assert isinstance(session.state.attempts[1], Aborted)
            assert not any(secret in contents(network.folder(0)) for secret in found)

    network.after = refuse
    network.run_round(Listed())
    assert found


def test_secrets_leave_the_disk_before_the_vector_is_filled_in(tmp_path: Path) -> None:
    network = Watched(tmp_path)
    secrets: list[bytes] = []
    network.before = lambda session, _: secrets.extend(secrets_of(session, 1))
    kill = Listed({Place(1, 0, 3, 0, False, 0): Fault("kill in fill", 2 + 20)})
    network.run_round(kill)
    assert len(secrets) >= 3
    assert isinstance(network.clients[0].state.attempts[1], IsMasking)
    assert not any(secret in contents(network.folder(0)) for secret in secrets)


@pytest.mark.parametrize("point", [1, 2, 7, 8])
def test_what_a_killed_write_leaves_is_gone_after_the_next(tmp_path: Path, point: int) -> None:
    """A part of an answer may hold shares: of a reveal that never left."""
    network = Watched(tmp_path)
    plan = Listed({Place(1, 0, 5, 0, False, 0): Fault("kill", point + 20)})
    shares: list[bytes] = []
    network.before = lambda session, _: shares.extend(secrets_of(session, 1))
    network.run_round(plan)
    with pytest.raises(ProtocolError):
        network.clients[0].receive(b"no message")
    network.run_round()
    network.run_round()
    assert shares
    assert not any(share in contents(network.folder(0)) for share in shares)
    assert not list(network.folder(0).glob(".*"))


def test_stale_answers_are_removed(tmp_path: Path) -> None:
    """At most those of the last closed round, of this one and of the next are there."""
    network = Watched(tmp_path)
    for _ in range(4):
        network.run_round()
        state = network.clients[0].state
        names = {path.name for path in network.folder(0).glob("answer-*")}
        expected = {f"answer-{n}-{request.hex()[:16]}.bin" for n, request in state.requests.items()}
        assert names == expected
        assert set(state.requests) <= {network.round, network.round + 1}


def check_pairs(network: Network, exchange: int, point: int) -> None:
    """What is restored as the answer to a message was made for it, after a crash at a point."""
    network.run_round(Listed({Place(1, 0, exchange, 0, False, 0): Fault("kill", point + 20)}))
    state, answers = stored_session(network.folder(0))
    assert state is not None
    assert answers
    made = {
        hashlib.sha256(request).digest(): answer
        for (client, request), answer in network.answers.items()
        if client == 0
    }
    for number, answer in answers.items():
        # What was stored and not sent is not known here; it cannot be the answer to an earlier one.
        request = state.requests[number]
        right = answer == made[request] if request in made else answer not in made.values()
        assert right, f"round {number} has another message's answer"


@pytest.mark.parametrize("exchange", range(2, 6))
@pytest.mark.parametrize("point", [6, 9, 15])
def test_an_answer_is_paired_with_its_own_request_after_a_crash(
    tmp_path: Path, exchange: int, point: int
) -> None:
    """The points are between the two files, and around the second one's being renamed."""
    check_pairs(Watched(tmp_path), exchange, point)


def test_an_answer_named_after_its_round_alone_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""
    monkeypatch.setattr(
        journal, "_answer_file", lambda folder, state, number: folder / f"answer-{number}-.bin"
    )
    with pytest.raises(AssertionError, match="another message's answer"):
        check_pairs(Watched(tmp_path), exchange=5, point=6)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_a_restarted_client_sends_the_stored_answer_again(tmp_path: Path, step: type) -> None:
    """Killed between storing an answer and sending it; the update is not asked for again."""
    network = Watched(tmp_path)
    seen: list[bytes] = []

    def again(session: ClientSession, request: bytes) -> None:
        if isinstance(session.state.attempts.get(1), step) and not seen:
            seen.append(bytes(session.receive(request) or b""))
            network.restart(0)
            assert bytes(network.clients[0].receive(request) or b"") == seen[0]

    network.after = again
    network.run_round()
    assert seen[0]


@pytest.mark.parametrize("step", STEPS[:-1], ids=lambda step: step.__name__)
def test_nothing_of_an_aborted_attempt_is_answered_after_a_restart(
    tmp_path: Path, step: type
) -> None:
    """As without one."""
    network = Watched(tmp_path)
    requests: list[bytes] = []

    def abort(session: ClientSession, request: bytes) -> None:
        if isinstance(session.state.attempts.get(1), step) and not requests:
            requests.append(request)
            with pytest.raises(ProtocolError):
                session.receive(b"no message")
            for _ in range(2):
                with pytest.raises(ProtocolError):
                    network.clients[0].receive(request, Update(MODEL, lambda values: None))
                network.restart(0)

    network.after = abort
    network.run_round(Listed())
    assert requests


@pytest.mark.parametrize("step", STEPS[1:], ids=lambda step: step.__name__)
def test_no_answer_leaves_that_the_disk_could_not_take(
    tmp_path: Path, step: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, and the message comes again: what is not stored is not sent, then neither."""
    network = Watched(tmp_path)
    answered: list[bytes] = []

    def full(path: Path, content: bytes, mode: int) -> None:
        raise CheckpointError(f"no space for {path}")

    def fail(session: ClientSession, request: bytes) -> None:
        before = session.state.attempts.get(1)
        if not isinstance(before, STEPS[STEPS.index(step) - 1]) or answered:
            return
        if decode_server(request, network.terms).round != 1:
            return
        answered.append(request)
        with monkeypatch.context() as patch:
            patch.setattr(journal, "write_atomic", full)
            for _ in range(3):
                check_unsaved(session, request)

    def check_unsaved(session: ClientSession, request: bytes) -> None:
        with pytest.raises(CheckpointError):
            session.receive(request, Update(MODEL, lambda values: None))

    network.before = fail
    outcome = network.run_round()
    assert answered
    assert outcome.survivors == network.cohort  # once there is space the round goes on


def test_a_client_dies_where_the_harness_says(tmp_path: Path) -> None:
    """The write points are met: none of the above passes because nothing was killed."""
    path = tmp_path / "file"
    for point in range(6):
        with pytest.raises(Killed), dying(point):
            journal.write_atomic(path, b"content", 0o600)
    with dying(6):
        journal.write_atomic(path, b"content", 0o600)
