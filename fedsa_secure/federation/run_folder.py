"""The layout of a run folder.

config.toml         the resolved configuration
split.key           secret that splits train from test; of a private run, its owner's alone (0600)
history.jsonl       one record per round
timings.jsonl       seconds per round and phase
ledger.jsonl        private runs: what every client has spent
uploads/            private runs: finished updates of a round that is not complete
checkpoint/         the last complete round (see ``checkpoint``)
tensorboard/        event files, where tensorboard is installed
result.json         metrics of every client; there when the run is finished
adapters/           one PEFT adapter folder per client
"""

import hashlib
import itertools
import json
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from fedsa_secure.config import TrainConfig, read_options
from fedsa_secure.errors import CheckpointError, ConfigError
from fedsa_secure.federation.evaluation import ClientMetrics
from fedsa_secure.federation.privacy_report import PrivacyReport
from fedsa_secure.files import is_leftover, write_atomic

_CONFIG, _RESULT, _SPLIT_KEY = "config.toml", "result.json", "split.key"
_KEY_BYTES = 32
OBJECT = "object:"
"""Marks a model, data set or partitioner that was given as an object and not by name."""


class RunSummary(BaseModel):
    """What ``result.json`` holds."""

    model_config = ConfigDict(frozen=True)

    label_names: tuple[str, ...]
    clients: tuple[ClientMetrics, ...]
    privacy: PrivacyReport | None = None


class RunFolder:
    """Paths and small files of one run.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoint(self) -> Path:
        """Folder of the checkpoint."""
        return self.path / "checkpoint"

    @property
    def tensorboard(self) -> Path:
        """Folder of the event files."""
        return self.path / "tensorboard"

    def adapter(self, client: int) -> Path:
        """PEFT folder of one client."""
        return self.path / "adapters" / f"client-{client:05d}"

    @classmethod
    def create(cls, config: TrainConfig) -> "RunFolder":
        """Make the folder of a new run and write its configuration.

        Raises:
            ConfigError: if the place is taken or cannot be written to; nothing is left behind.
        """
        folder = cls(Path(config.output_dir) if config.output_dir else _new_name(config))
        try:
            folder._require_free()
            folder.path.mkdir(parents=True, exist_ok=True)
            write_atomic(folder.path / _CONFIG, config.to_toml().encode())
        except ConfigError:
            raise
        except (OSError, ValueError, CheckpointError) as error:
            reason = getattr(error.__cause__ or error, "strerror", None) or str(error)
            raise ConfigError(
                "output_dir",
                f"cannot write to {folder.path}: {reason}",
                "give a folder that you may write to",
            ) from error
        return folder

    @classmethod
    def open(cls, path: Path) -> tuple["RunFolder", TrainConfig]:
        """Open the folder of a run that was begun.

        Raises:
            CheckpointError: if it is not a run folder.
        """
        if not (path / _CONFIG).is_file():
            raise CheckpointError(
                f"{path} is not a run folder: it has no {_CONFIG}; start a run with train"
            )
        try:
            return cls(path), TrainConfig.build(**read_options(path / _CONFIG))
        except ConfigError as error:
            raise CheckpointError(f"{path / _CONFIG} is damaged: {error}") from error

    def write_summary(self, summary: RunSummary) -> None:
        """Write the result; a run that has one is finished."""
        write_atomic(self.path / _RESULT, summary.model_dump_json(indent=1).encode())

    def read_summary(self) -> RunSummary | None:
        """The result, or None while the run is not finished.

        Raises:
            CheckpointError: if it is damaged.
        """
        path = self.path / _RESULT
        try:
            return RunSummary.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise CheckpointError(
                f"{path} is damaged: {error}; remove it and resume the run to make it again"
            ) from error

    def write_split_key(self, key: bytes) -> None:
        """Keep the secret that splits train from test, readable by its owner alone."""
        write_atomic(self.path / _SPLIT_KEY, key, mode=0o600)

    def read_split_key(self) -> bytes | None:
        """The secret that splits train from test, or None if the folder has none.

        Raises:
            CheckpointError: if it is damaged.
        """
        path = self.path / _SPLIT_KEY
        try:
            key = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        if len(key) != _KEY_BYTES:
            raise CheckpointError(f"{path} is damaged: it has {len(key)} bytes, not {_KEY_BYTES}")
        return key

    def _require_free(self) -> None:
        path = self.path
        if not path.exists():
            return
        if not path.is_dir():
            raise ConfigError("output_dir", f"{path} is a file", "give the path of a folder")
        if (path / _CONFIG).exists():
            raise ConfigError(
                "output_dir",
                f"{path} holds a run already",
                f"go on with it by 'fedsa-secure resume {path}', or give another folder",
            )
        if any(not is_leftover(entry) for entry in path.iterdir()):
            raise ConfigError("output_dir", f"{path} is not empty", "give an empty or new folder")


def config_digest(config: TrainConfig, exclude: frozenset[str] = frozenset()) -> str:
    """Changes with every option except the place of the run folder.

    Options at their default do not count, so that a later version with more options still opens
    the run.

    Args:
        config: the options.
        exclude: further options that are not to count.
    """
    left_out = exclude | {"output_dir"}
    given = config.model_dump(mode="json", exclude_defaults=True, exclude=set(left_out))
    content = json.dumps(given, sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _new_name(config: TrainConfig) -> Path:
    """A place below runs/ that no other run has taken, be it in the same second."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{stamp}-{config.method}-{config.adapter}"
    names = (f"{name}-{count}" if count > 1 else name for count in itertools.count(1))
    return next(path for each in names if not (path := Path("runs") / each).exists())
