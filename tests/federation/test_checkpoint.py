"""Checkpoints: what goes in comes out, and what is damaged is refused by name."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsa_secure import CheckpointError
from fedsa_secure.federation.checkpoint import Origin, StateStore
from fedsa_secure.federation.history import History, RoundRecord
from fedsa_secure.federation.local_training import ClientState
from fedsa_secure.files import is_leftover, write_atomic

SHARED = {"x.A": torch.arange(6.0).view(2, 3)}
ORIGIN = Origin("config", "data", "model")


def state(value: float) -> ClientState:
    return ClientState({"x.B": torch.full((3, 2), value)}, {"x.B#m": torch.ones(3, 2)}, steps=4)


def committed(folder: Path, in_memory: bool) -> StateStore:
    store = StateStore(folder, in_memory)
    store.put(0, state(1.0), 1)
    store.put(7, state(2.0), 1)
    store.commit(1, SHARED, ORIGIN, 10)
    store.put(7, state(3.0), 2)
    store.commit(2, SHARED, ORIGIN, 20)
    return store


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_last_checkpoint_comes_back(tmp_path: Path, in_memory: bool) -> None:
    committed(tmp_path / "c", in_memory)
    fresh = StateStore(tmp_path / "c", in_memory)
    checkpoint, shared = fresh.restore()
    assert (checkpoint.round, checkpoint.history_bytes) == (2, 20)
    assert torch.equal(shared["x.A"], SHARED["x.A"])
    assert torch.equal(fresh.get(0).personal["x.B"], state(1.0).personal["x.B"])
    assert torch.equal(fresh.get(7).personal["x.B"], state(3.0).personal["x.B"])
    assert fresh.get(7).moments.keys() == {"x.B#m"}
    assert fresh.get(7).steps == 4
    assert fresh.get(3) == ClientState()
    # superseded files are gone: two clients, the shared tensors and the state
    assert len(list((tmp_path / "c").iterdir())) == 4


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_was_not_committed_is_forgotten(tmp_path: Path, in_memory: bool) -> None:
    committed(tmp_path / "c", in_memory).put(0, state(9.0), 3)
    fresh = StateStore(tmp_path / "c", in_memory)
    fresh.restore()
    assert torch.equal(fresh.get(0).personal["x.B"], state(1.0).personal["x.B"])


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def damage_flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def damage_remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_remove])
@pytest.mark.parametrize("name", ["client-00007-r2.safetensors", "shared-r2.safetensors"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, damage: Any) -> None:
    committed(tmp_path / "c", in_memory=True)
    damage(tmp_path / "c" / name)
    with pytest.raises(CheckpointError, match=name):
        StateStore(tmp_path / "c", in_memory=True).restore()


def test_leftovers_of_a_crash_are_tidied_away(tmp_path: Path) -> None:
    """Killed after the state was replaced and before the old files were removed."""
    committed(tmp_path / "c", in_memory=True)
    (tmp_path / "c" / "client-00007-r1.safetensors").write_bytes(b"superseded")
    fresh = StateStore(tmp_path / "c", in_memory=True)
    checkpoint, _ = fresh.restore()
    fresh.tidy(checkpoint)
    assert len(list((tmp_path / "c").iterdir())) == 4


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    committed(tmp_path / "c", in_memory=True)
    state = tmp_path / "c" / "state.json"
    state.write_text(state.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(CheckpointError, match="version"):
        StateStore(tmp_path / "c", in_memory=True).restore()


@pytest.mark.parametrize("content", [b"", b"{", b'{"round": 1}', b"\xff\xfe"])
def test_a_damaged_state_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    committed(tmp_path / "c", in_memory=True)
    (tmp_path / "c" / "state.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        StateStore(tmp_path / "c", in_memory=True).restore()


def test_no_checkpoint_is_not_an_error(tmp_path: Path) -> None:
    assert StateStore(tmp_path / "c", in_memory=True).restore() is None


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = committed(tmp_path / "c", in_memory=True)
    store.put(0, state(9.0), 3)
    for failing in range(3):  # the client's file, the shared tensors, the state
        calls = iter(range(10))

        def full(handle: int, calls=calls, failing=failing) -> None:
            if next(calls) == 2 * failing:  # every write syncs its file and then its folder
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            with pytest.raises(CheckpointError, match="No space left on device.*resume"):
                store.commit(3, SHARED, ORIGIN, 30)
        store.put(0, state(9.0), 3)
        fresh = StateStore(tmp_path / "c", in_memory=True)
        checkpoint, _ = fresh.restore()
        assert checkpoint.round == 2
        assert torch.equal(fresh.get(0).personal["x.B"], state(1.0).personal["x.B"])


def test_an_atomic_write_leaves_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert all(is_leftover(other) for other in tmp_path.iterdir() if other != path)


def record(number: int) -> RoundRecord:
    return RoundRecord(
        round=number,
        clients=(0, 2),
        learning_rate=0.1,
        loss=1 / 3,
        uplink_bytes=8,
        downlink_bytes=8,
    )


def test_history_comes_back_and_is_cut_to_a_checkpoint(tmp_path: Path) -> None:
    history = History(tmp_path)
    lengths = [history.append(record(number)) for number in (1, 2, 3)]
    assert history.records() == [record(1), record(2), record(3)]
    history.cut(lengths[1])
    assert history.records() == [record(1), record(2)]
    with pytest.raises(CheckpointError, match="history"):
        history.cut(lengths[2])


def test_a_damaged_history_is_refused_by_name(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.append(record(1))
    with open(tmp_path / "history.jsonl", "a") as file:
        file.write('{"round": 2, "cl')
    with pytest.raises(CheckpointError, match=r"history\.jsonl is damaged"):
        history.records()
