"""A client's state on its disk, so that a crash repeats nothing under used masks.

docs/protocol.md §11. The folder belongs to one client of one run.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from fedsa_secure.errors import ProtocolError, SecretsLost
from fedsa_secure.files import FileLock, sync_folder, write_atomic, writing
from fedsa_secure.secagg.client_session import Answer, ClientSession, SessionState
from fedsa_secure.secagg.states import Party

_STATE = "state.bin"
_PRIVATE = 0o600
_CHECKSUM_BYTES = 32


class FileJournal:
    """Keeps a client's state and its last answers in files of mode 0600.

    An answer is on disk before the state that speaks of it, and both before the answer leaves.

    A folder is open in one journal at a time, until that is closed or its process ends.

    Args:
        folder: made if it does not exist.

    Raises:
        SecretsLost: if another journal has the folder open.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync_folder(folder.parent)
        try:
            self._lock = FileLock(folder / "lock")
        except BlockingIOError:
            raise SecretsLost(
                f"{folder} is in use by another process of this client; two would mask twice with "
                "the same keys"
            ) from None

    def close(self) -> None:
        """Give the folder free for another process of this client."""
        self._lock.release()

    def save(self, state: SessionState, round_number: int, answer: Answer | None) -> None:
        """Have the state, and an answer of a round, on disk before this returns.

        Raises:
            CheckpointError: if they cannot be written.
        """
        if answer is not None:
            write_atomic(_answer_file(self._folder, state, round_number), answer, _PRIVATE)
        content = msgspec.msgpack.encode(state)
        write_atomic(self._folder / _STATE, _checksum(content) + content, _PRIVATE)
        needed = {_answer_file(self._folder, state, number) for number in state.requests}
        with writing(self._folder):
            for path in self._folder.glob("*answer-*.bin*"):  # with what killed writes have left
                if path not in needed:
                    path.unlink()


def stored_session(folder: Path) -> tuple[SessionState | None, dict[int, Answer]]:
    """What a client's folder holds, the answers by round; nothing if nothing was saved.

    Raises:
        SecretsLost: if the file is damaged. The client cannot know what it has revealed, so it may
            not go on under these terms.
    """
    path = folder / _STATE
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        return None, {}
    checksum, content = stored[:_CHECKSUM_BYTES], stored[_CHECKSUM_BYTES:]
    try:
        if checksum != _checksum(content):
            raise msgspec.DecodeError("its checksum is another one")
        state = msgspec.msgpack.decode(content, type=SessionState)
    except msgspec.DecodeError as error:
        raise SecretsLost(
            f"{path} is damaged ({error}), so this client cannot know what it has revealed; it has "
            "to leave the run"
        ) from None
    found = {number: _answer_file(folder, state, number) for number in state.requests}
    return state, {number: path.read_bytes() for number, path in found.items() if path.exists()}


def _answer_file(folder: Path, state: SessionState, round_number: int) -> Path:
    """Named after what it answers, so that a crash cannot pair it with an older message."""
    request = state.requests[round_number].hex()[:16]
    return folder / f"answer-{round_number}-{request}.bin"


def _checksum(content: bytes) -> bytes:
    """One turned bit in what is closed would let a client reveal twice."""
    return hashlib.sha256(content).digest()


def open_session(
    party: Party, cohort_of: Callable[[int], Sequence[int]], folder: Path
) -> ClientSession:
    """A client's session as it stands on its disk, or a new one.

    A client that was stopped while it masked finds the mark and not the secrets: that attempt is
    over for it.
    """
    journal = FileJournal(folder)
    try:
        state, answers = stored_session(folder)
        return ClientSession(party, cohort_of, journal, state, answers)
    except ProtocolError:
        journal.close()
        raise
