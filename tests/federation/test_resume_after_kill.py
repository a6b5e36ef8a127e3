"""A run that is killed at any instant and resumed ends with the bytes of one that was not."""

import random
import signal
from pathlib import Path
from typing import Any

import pytest

from fedsa_secure.federation.history import HISTORY, TIMINGS

# These say how long things took, where the run folder is, or are for viewing only.
NOT_COMPARED = (TIMINGS, "tensorboard", "config.toml")


@pytest.fixture
def options(
    tiny_bert: Any, tiny_tokenizer: Any, small_dataset: Any, tmp_path: Path
) -> dict[str, Any]:
    """A run that lasts about two seconds: a model folder, a csv file, and what to do with them."""
    model = tmp_path / "model"
    tiny_bert().save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    small_dataset(rows=150).to_csv(tmp_path / "rows.csv", index=False)
    return {
        "model": str(model),
        "dataset": str(tmp_path / "rows.csv"),
        "clients": 5,
        "partition": "dirichlet:1",
        "participation": 0.6,
        "rounds": 30,
        "local_steps": 2,
        "batch_size": 4,
        "max_length": 16,
        "clients_per_pass": 2,
        "evaluate_every": 7,
        "checkpoint_every": 2,
        "common_rows": 30,
    }


def content(folder: Path) -> dict[str, bytes]:
    """All files of a run by relative path, but for those that may differ."""
    files = (path for path in folder.rglob("*") if path.is_file())
    named = {str(path.relative_to(folder)): path for path in files}
    return {
        name: path.read_bytes() for name, path in named.items() if not name.startswith(NOT_COMPARED)
    }


def check_kills(zygote: Any, options: dict, folder: Path, kills: int) -> None:
    status, seconds = zygote.call("train", output_dir=str(folder / "whole"), **options)
    assert status == 0
    expected = content(folder / "whole")
    assert HISTORY in expected
    assert sum(name.endswith("adapter_model.safetensors") for name in expected) == 5
    stream = random.Random()
    interrupted = 0
    for trial in range(kills):
        place = folder / f"trial{trial}"
        states = {**options, "client_state": "disk" if trial % 2 else "memory"}
        whole = expected
        if trial % 2:  # its checkpoint says so in the digest of the configuration
            if trial == 1:
                zygote.call("train", output_dir=str(folder / "disk"), **states)
            whole = content(folder / "disk")
        delay = stream.uniform(0.0, 1.0) * seconds
        status, _ = zygote.call("train", delay, output_dir=str(place), **states)
        interrupted += status == -signal.SIGKILL
        if (place / "config.toml").exists():
            status, _ = zygote.call("resume", path=str(place))
        else:  # killed before the run folder was made: there is nothing to resume
            status, _ = zygote.call("train", output_dir=str(place), **states)
        assert status == 0
        found = content(place)
        assert found.keys() == whole.keys(), f"killed after {delay:.3f} s of {seconds:.3f} s"
        for name, value in whole.items():
            assert found[name] == value, f"{name}, killed after {delay:.3f} s of {seconds:.3f} s"
    assert interrupted > 0


def test_three_kills(zygote: Any, options: dict, tmp_path: Path) -> None:
    check_kills(zygote, options, tmp_path, kills=3)


@pytest.mark.slow
def test_twenty_kills(zygote: Any, options: dict, tmp_path: Path) -> None:
    check_kills(zygote, options, tmp_path, kills=20)


def test_states_in_memory_and_on_disk_give_the_same_run(
    zygote: Any, options: dict, tmp_path: Path
) -> None:
    for kind in ("memory", "disk"):
        status, _ = zygote.call(
            "train", output_dir=str(tmp_path / kind), client_state=kind, **options
        )
        assert status == 0
    memory, disk = content(tmp_path / "memory"), content(tmp_path / "disk")
    tensors = {name for name in memory if name.endswith(".safetensors")}
    # A checkpoint names a file after the round it was written in, so only the others are compared.
    for name in {n for n in tensors if "client-" not in n or "adapters" in n} | {HISTORY}:
        assert memory[name] == disk[name], name
