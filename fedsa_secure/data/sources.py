"""Open a data set: hub id, local folder or file, ``datasets`` object, or the embedded lexicon."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from fedsa_secure.data.lexicon import NAME, load_lexicon
from fedsa_secure.errors import ConfigError

# pandas reads the words NA, null and None as missing values; here only an empty field is one.
_CSV = {"keep_default_na": False, "na_values": [""]}
_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json"}


def open_dataset(source: str | Dataset | DatasetDict, subset: str | None) -> DatasetDict:
    """All splits of a data set.

    Args:
        source: hub id, local path, data set object, or ``"lexicon"``.
        subset: the configuration, for hub ids and folders that have several.

    Raises:
        ConfigError: if there is nothing to read there.
    """
    if isinstance(source, Dataset):
        source = DatasetDict(train=source)
    if isinstance(source, DatasetDict):
        if all(isinstance(rows, Dataset) for rows in source.values()):
            return source
        raise ConfigError("dataset", "streamed splits have no length", "give plain Datasets")
    if source == NAME:
        return DatasetDict(train=load_lexicon())
    try:
        with quiet():
            found = _open_path(Path(source), subset) if _is_path(source) else None
            if found is None:
                found = load_dataset(source, subset)
    except (OSError, ValueError, DatasetGenerationError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            "dataset",
            f"cannot read {source!r}: {reason}",
            "give a hub id (with subset= where it has several), a folder or file of parquet, csv "
            "or jsonl, a save_to_disk folder, or 'lexicon'",
        ) from error
    return found if isinstance(found, DatasetDict) else DatasetDict(train=found)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars and warnings of data libraries off the user's screen.

    Both write to standard error whatever the caller does; what goes wrong is raised, not printed.
    """
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _is_path(source: str) -> bool:
    path = Path(source)
    return path.exists() or path.is_absolute() or source.startswith(".") or path.suffix in _BUILDERS


def _open_path(path: Path, subset: str | None) -> Dataset | DatasetDict:
    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise ValueError(f"unknown kind of file {path.suffix!r}")
        builder = _BUILDERS[path.suffix]
        options = _CSV if builder == "csv" else {}
        if path.suffix == ".tsv":
            options = {**options, "delimiter": "\t"}
        return load_dataset(builder, data_files=str(path), **options)
    if not path.is_dir():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return load_from_disk(str(path))
    return load_dataset(str(path), subset, **(_CSV if any(path.rglob("*.csv")) else {}))
