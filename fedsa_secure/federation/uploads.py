"""Finished updates on the client's disk, each with the ledger event that it costs.

An update is stored before its event is counted, and counted before it is sent. After a crash a
stored one is sent again, byte for byte; what was not stored was never sent, and is made anew with
new coins and noise.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float64
from safetensors.torch import load, save
from torch import Tensor

from fedsa_secure.errors import CheckpointError
from fedsa_secure.federation.checkpoint import pack_state, unpack_state
from fedsa_secure.federation.local_training import ClientState
from fedsa_secure.files import write_atomic, writing
from fedsa_secure.privacy import LedgerEvent

_UPDATE, _KEY, _TOLD, _STATE = "update", "rounding key", "events", "state/"


@dataclass(frozen=True)
class Upload:
    """What a client's private turn ends with.

    Args:
        update: noised; it is sent. [value]
        key: of the coins that round it to the grid; 32 bytes.
        state: what the client keeps; never sent.
        event: what it costs.
        accuracy: of the twin, noised; sent. None if it is not.
        metric_event: what that costs.
    """

    update: Float64[Tensor, " value"]
    key: bytes
    state: ClientState
    event: LedgerEvent
    accuracy: float | None = None
    metric_event: LedgerEvent | None = None

    @property
    def events(self) -> list[LedgerEvent]:
        """All that it costs."""
        return [self.event] if self.metric_event is None else [self.event, self.metric_event]

    @staticmethod
    def digest(update: Float64[Tensor, " value"], key: bytes, accuracy: float | None = None) -> str:
        """SHA-256 of all that decides about the bytes that are sent."""
        metric = b"" if accuracy is None else struct.pack("<d", accuracy)
        return hashlib.sha256(update.contiguous().numpy().tobytes() + key + metric).hexdigest()


class UploadStore:
    """The uploads of a run that is under way.

    Args:
        folder: made if it does not exist, for nobody else to read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with writing(folder):
            folder.mkdir(mode=0o700, exist_ok=True)

    def put(self, upload: Upload) -> None:
        """Store an upload; it is there in full or not at all.

        Raises:
            CheckpointError: if it cannot be written.
        """
        told = {
            "accuracy": upload.accuracy,
            "events": [event.model_dump() for event in upload.events],
        }
        tensors = {
            _UPDATE: upload.update,
            _KEY: _tensor(upload.key),
            _TOLD: _tensor(json.dumps(told).encode()),
            **{_STATE + name: tensor for name, tensor in pack_state(upload.state).items()},
        }
        write_atomic(self._path(upload.event.client, upload.event.round), save(tensors), mode=0o600)

    def get(self, client: int, round_number: int) -> Upload | None:
        """The upload of a client in a round, if it was finished.

        Raises:
            CheckpointError: if it is damaged. Making it anew would spend a second time.
        """
        path = self._path(client, round_number)
        try:
            tensors = load(path.read_bytes())
            state = {n.removeprefix(_STATE): t for n, t in tensors.items() if n.startswith(_STATE)}
            update, key = tensors[_UPDATE], bytes(tensors[_KEY].numpy())
            told = json.loads(bytes(tensors[_TOLD].numpy()))
            events = [LedgerEvent.model_validate(event) for event in told["events"]]
            if Upload.digest(update, key, told["accuracy"]) != events[0].upload:
                raise ValueError("its update is not the one that its event names")
        except FileNotFoundError:
            return None
        except Exception as error:
            raise CheckpointError(
                f"the stored upload {path} is damaged: {error}; restore it from a backup, or train "
                "anew into another output_dir"
            ) from error
        return Upload(update, key, unpack_state(state), events[0], told["accuracy"], *events[1:])

    def forget(self, last_round: int) -> None:
        """Remove the uploads of all rounds up to this one, which is in a checkpoint."""
        with writing(self._folder):
            for path in self._folder.glob("client-*-r*.safetensors"):
                if int(path.stem.rsplit("-r", 1)[1]) <= last_round:
                    path.unlink()

    def _path(self, client: int, round_number: int) -> Path:
        return self._folder / f"client-{client:05d}-r{round_number}.safetensors"


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
