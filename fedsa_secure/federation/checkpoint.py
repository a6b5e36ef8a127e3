"""Client and server state on disk. A crash at any instant leaves the last checkpoint whole.

A checkpoint is one small file, ``state.json``, that names the files it consists of. Files of a new
checkpoint get new names, then ``state.json`` is replaced in one step, then the files that it no
longer names are removed.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load, save

from fedsa_secure.errors import CheckpointError
from fedsa_secure.federation.local_training import ClientState
from fedsa_secure.files import write_atomic, writing
from fedsa_secure.types import NamedTensors

_STATE, _AGAIN = "state.json", "-again"
_PERSONAL, _TWIN, _MOMENTS, _STEPS = "personal/", "twin/", "moments/", "steps"


class StoredFile(BaseModel):
    """A file of a checkpoint and the digest of its bytes."""

    model_config = ConfigDict(frozen=True)

    name: str
    digest: str


@dataclass(frozen=True)
class Origin:
    """Digests of what a run was begun with; it can only go on with the same.

    Args:
        config: of the configuration.
        data: of texts, labels and their division.
        model: of the base model.
    """

    config: str
    data: str
    model: str


class Checkpoint(BaseModel):
    """The content of ``state.json``.

    Args:
        round: the last complete round.
        config: digest of the configuration that it belongs to.
        data: fingerprint of the data that it belongs to.
        model: fingerprint of the base model that it belongs to.
        history_bytes: length of the history at that round.
        shared: the public shared tensors.
        clients: the state of every client that has had a turn.
        ledger_events: events in the ledger of a private run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    round: int
    config: str
    data: str
    model: str
    history_bytes: int
    shared: StoredFile
    clients: dict[int, StoredFile]
    ledger_events: int = 0


class StateStore:
    """Where client states wait between turns, and where checkpoints are made.

    Args:
        folder: the checkpoint folder; made if it does not exist.
        in_memory: keep states in host memory and write them at checkpoints only; otherwise write
            them at once and keep nothing, so that many clients cost disk and not memory.
    """

    def __init__(self, folder: Path, in_memory: bool) -> None:
        self._folder, self._in_memory = folder, in_memory
        self._memory: dict[int, ClientState] = {}
        self._dirty: set[int] = set()
        self._files: dict[int, StoredFile] = {}
        with writing(folder):
            folder.mkdir(exist_ok=True)

    def get(self, client: int) -> ClientState:
        """What this client kept after its last turn; the empty state before the first."""
        if client in self._memory:
            return self._memory[client]
        if client not in self._files:
            return ClientState()
        state = unpack_state(self._read(self._files[client]))
        if self._in_memory:
            self._memory[client] = state
        return state

    def put(self, client: int, state: ClientState, round_number: int) -> None:
        """Keep a client's state."""
        if self._in_memory:
            self._memory[client] = state
            self._dirty.add(client)
        else:
            self._files[client] = self._write(_client_file(client, round_number), pack_state(state))

    def commit(
        self,
        round_number: int,
        shared: NamedTensors,
        origin: Origin,
        history_bytes: int,
        ledger_events: int = 0,
        again: bool = False,
    ) -> None:
        """Make this round the one that a resumed run goes on from.

        Args:
            round_number: the round that is complete.
            shared: the public shared tensors after it.
            origin: what the run was begun with.
            history_bytes: length of the history after it.
            ledger_events: events in the ledger of a private run after it.
            again: whether there is a checkpoint of this round already, whose files have to stay
                until this one is complete.

        Raises:
            CheckpointError: if a file cannot be written; the previous checkpoint stays valid.
        """
        for client in sorted(self._dirty):
            name = _client_file(client, round_number, again)
            self._files[client] = self._write(name, pack_state(self._memory[client]))
        self._dirty.clear()
        state = Checkpoint(
            round=round_number,
            config=origin.config,
            data=origin.data,
            model=origin.model,
            history_bytes=history_bytes,
            shared=self._write(f"shared-r{round_number}{_AGAIN * again}.safetensors", shared),
            clients=dict(sorted(self._files.items())),
            ledger_events=ledger_events,
        )
        write_atomic(self._folder / _STATE, state.model_dump_json(indent=1).encode())
        self.tidy(state)

    def restore(self) -> tuple[Checkpoint, NamedTensors] | None:
        """The last checkpoint and its shared tensors, or None if there is none yet.

        Raises:
            CheckpointError: if one of its files is missing or damaged.
        """
        state = read_checkpoint(self._folder)
        if state is None:
            return None
        self._memory.clear()
        self._dirty.clear()
        self._files = dict(state.clients)
        for stored in state.clients.values():
            self._read(stored)  # better now than in the middle of a round
        return state, self._read(state.shared)

    def _write(self, name: str, tensors: NamedTensors) -> StoredFile:
        content = save(tensors)
        write_atomic(self._folder / name, content)
        return StoredFile(name=name, digest=_digest(content))

    def _read(self, stored: StoredFile) -> NamedTensors:
        path = self._folder / stored.name
        try:
            content = path.read_bytes()
            if _digest(content) != stored.digest:
                raise CheckpointError(_damaged(path, "its bytes have changed since it was written"))
            tensors: NamedTensors = load(content)
            return tensors
        except OSError as error:
            raise CheckpointError(_damaged(path, str(error.strerror))) from error
        except safetensors.SafetensorError as error:
            raise CheckpointError(_damaged(path, str(error))) from error

    def tidy(self, state: Checkpoint) -> None:
        """Remove the files that a checkpoint does not consist of."""
        needed = {_STATE, state.shared.name, *(f.name for f in state.clients.values())}
        with writing(self._folder):
            for path in self._folder.iterdir():
                if path.name not in needed:
                    path.unlink(missing_ok=True)


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The content of a checkpoint folder's ``state.json``, or None if there is none.

    Raises:
        CheckpointError: if it cannot be understood.
    """
    path = folder / _STATE
    try:
        return Checkpoint.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(_damaged(path, str(error.strerror))) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(_damaged(path, f"{where}: {first['msg']}".lstrip(": "))) from error


def _damaged(path: Path, reason: str) -> str:
    return (
        f"the checkpoint file {path} is missing or damaged: {reason}; "
        "restore it from a backup, or train again into another output_dir"
    )


def _client_file(client: int, round_number: int, again: bool = False) -> str:
    return f"client-{client:05d}-r{round_number}{_AGAIN * again}.safetensors"


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def pack_state(state: ClientState) -> NamedTensors:
    """A state as tensors by name, for one file."""
    return {
        **{_PERSONAL + name: tensor for name, tensor in state.personal.items()},
        **{_TWIN + name: tensor for name, tensor in state.twin.items()},
        **{_MOMENTS + name: tensor for name, tensor in state.moments.items()},
        _STEPS: torch.tensor(state.steps),
    }


def unpack_state(tensors: NamedTensors) -> ClientState:
    """The state that ``pack_state`` packed."""

    def below(prefix: str) -> NamedTensors:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    return ClientState(below(_PERSONAL), below(_MOMENTS), int(tensors[_STEPS]), below(_TWIN))
