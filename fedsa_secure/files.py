"""Files that are either there in full or not at all."""

import contextlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

from fedsa_secure.errors import CheckpointError

_TEMPORARY = ".tmp"


def write_atomic(path: Path, content: bytes | memoryview, mode: int = 0o666) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part.

    Args:
        path: the file.
        content: all of it.
        mode: who may read and write it, less what the process's umask takes away.

    Raises:
        CheckpointError: if it cannot be written; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}{_TEMPORARY}")
    with writing(path):
        temporary.unlink(missing_ok=True)  # its mode would stay
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)


def append_line(path: Path, line: str) -> int:
    """Append one line, on disk when this returns.

    Returns:
        The length of the file in bytes.

    Raises:
        CheckpointError: if it cannot be written.
    """
    with writing(path), open(path, "ab") as file:
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


class FileLock:
    """A file that one holder at a time has locked, until it lets go or its process ends.

    Args:
        path: the file, made with mode 0600 if it does not exist; its content is left alone.

    Raises:
        BlockingIOError: if another holder has it, in this process or another one.
    """

    def __init__(self, path: Path) -> None:
        import fcntl  # not on every system, and needed for this class alone

        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._release = weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._release()
            raise

    def release(self) -> None:
        """Let go; again is harmless."""
        self._release()


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_leftover(path: Path) -> bool:
    """Whether this is the rest of a write that a crash cut off."""
    return path.name.startswith(".") and path.name.endswith(_TEMPORARY)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says about a failed write into an error that says what to do.

    Raises:
        CheckpointError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}; what was complete before is intact: free "
            "space or mend the folder, then go on with a run by 'fedsa-secure resume'"
        ) from error
