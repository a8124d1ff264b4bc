"""The disk tier: there after a restart, checked before it is believed, and never a reason for an edit to fail."""

from __future__ import annotations

import errno
import os
import resource
import time
from pathlib import Path

import pytest

from blobs import Blob, blob, check, disk, made, memory
from retouch.cache.disk import ABANDONED, HEADER, Disk
from retouch.cache.store import Store


def test_the_disk_is_there_after_a_restart(tmp_path: Path, clock: list[float]) -> None:
    store = Store(memory(100), disk(tmp_path))
    made(store, "a", seconds=2.0, clock=clock)
    made(store, "b")
    store.sink()
    later = Store(memory(100), disk(tmp_path))
    assert made(later, "a")
    assert made(later, "b")
    assert later.counters.saved_seconds == 2.0
    assert later.counters.misses == 0


def test_a_smaller_disk_after_a_restart_keeps_within_its_budget(tmp_path: Path) -> None:
    store = Store(disk(tmp_path))
    for key in "abcdef":
        made(store, key, 100)
    size = store.counters.bytes["disk"] // 6
    later = Store(disk(tmp_path, budget=3 * size))
    assert len(later) == 3
    assert len(list(tmp_path.glob("*.cache"))) == 3


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "header", "swap", "gone"])
def test_a_damaged_file_is_a_miss(tmp_path: Path, damage: str) -> None:
    store = Store(disk(tmp_path))
    made(store, "a")
    (file,) = tmp_path.glob("*.cache")
    other = Store(disk(tmp_path / "other"))
    made(other, "b")
    data = file.read_bytes()
    match damage:
        case "flip":
            file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "truncate":
            file.write_bytes(data[:-3])
        case "empty":
            file.write_bytes(b"")
        case "header":
            file.write_bytes(b"X" * HEADER.size + data[HEADER.size :])
        case "swap":
            file.write_bytes(next((tmp_path / "other").glob("*.cache")).read_bytes())
        case "gone":
            file.unlink()
    assert not made(store, "a")
    assert store.counters.lost == 1
    assert made(store, "a")
    assert made(Store(disk(tmp_path)), "a"), "the new file is good"


def test_a_loader_that_fails_is_a_miss(tmp_path: Path) -> None:
    def load(data: bytes) -> Blob:
        raise RuntimeError("of an older version")

    made(Store(disk(tmp_path)), "a")
    store = Store(Disk(tmp_path, 10**6, lambda value: value.data, load))
    assert not made(store, "a")


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.cache").write_text("mine")
    store = Store(disk(tmp_path))
    made(store, "a")
    assert (tmp_path / "notes.cache").read_text() == "mine"


def test_a_disk_that_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    store = Store(disk(tmp_path / "file"))
    assert not made(store, "a")
    assert not made(store, "b")
    assert not made(store, "a")
    assert len(caplog.records) == 1
    assert len(store) == 0


def test_a_full_disk_keeps_what_it_can_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, write = Store(memory(40), disk(tmp_path)), Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write(path, data[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for key in "abcde":
        store.put(key, blob(key), 1.0)
    assert len(store) == 2
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    check(store)
    monkeypatch.undo()
    for key in "fgh":
        store.put(key, blob(key), 1.0)
    assert len(store) == 5
    check(store)


def test_a_limit_on_the_size_of_files_is_no_reason_to_fail(tmp_path: Path) -> None:
    store, limits = Store(disk(tmp_path, 1 << 30)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        store.put("large", blob("a", 2 << 20), 1.0)
        store.put("small", blob("b", 1 << 19), 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.find("large") is None
    assert store.find("small") == blob("b", 1 << 19)
    check(store)


@pytest.mark.parametrize("where", ["/proc/retouch", "/dev/null/retouch", "{tmp}/only-read"])
def test_a_folder_that_cannot_be_written_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    folder = Path(where.format(tmp=tmp_path))
    if "{tmp}" in where:  # root may write whatever the mode says
        folder.mkdir(mode=0o500)

        def refuse(path: Path, data: bytes) -> int:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "write_bytes", refuse)
    store = Store(memory(20), disk(folder))
    for key in "abc":
        assert not made(store, key, 20)
    assert len(store) == 1, "memory goes on"
    store.sink()
    assert len(store) == 0
    assert len(caplog.records) == 1
    assert not store.drop("a")


def test_a_file_larger_than_the_disk_may_be_pushes_nothing_out(tmp_path: Path) -> None:
    store = Store(disk(tmp_path, budget=200))
    store.put("a", blob("a", 20), 1.0)
    store.put("b", blob("b", 190), 1.0)
    assert "a" in store, "190 bytes are within the budget, but not the file that holds them"
    assert "b" not in store
    check(store)


def test_a_value_that_cannot_be_written_down_is_answered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def dump(value: Blob) -> bytes:
        raise RuntimeError("the device is gone")

    store = Store(Disk(tmp_path, 1000, dump, Blob))
    assert not made(store, "a")
    assert "the device is gone" in caplog.text
    check(store)


def test_a_restart_after_a_crash_sorts_out_what_lies_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(disk(tmp_path))
    for key in "abcd":
        store.put(key, blob(key, 100), 1.0)
    files = {key: store.tiers[0]._path(key) for key in "abcd"}  # type: ignore[attr-defined]
    files["a"].write_bytes(files["a"].read_bytes()[:-30])
    files["b"].write_bytes(files["b"].read_bytes()[:10])
    files["c"].write_bytes(files["d"].read_bytes())
    old, young = tmp_path / "x.17.part", tmp_path / "y.18.part"
    for part in (old, young):
        part.write_bytes(b"half")
    past = time.time() - ABANDONED - 1
    os.utime(old, (past, past))
    later = Store(memory(1000), disk(tmp_path))
    assert not old.exists(), "nobody is going to finish it"
    assert young.exists(), "another process may be at it"
    young.unlink()
    assert sorted(later._entries) == ["a", "d"]
    assert [later.find(key) for key in "abcd"] == [None, None, None, blob("d", 100)]
    assert later.counters.lost == 1
    assert "damaged" in caplog.text
    for key in "abc":
        later.put(key, blob(key, 100), 1.0)
    later.sink()
    assert [Store(disk(tmp_path)).find(key) for key in "abcd"] == [blob(key, 100) for key in "abcd"]


@pytest.mark.parametrize("years", [-30, 30])
def test_a_jump_of_the_clock_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, years: int) -> None:
    """Neither what lies there, nor what another process is just writing when one begins whose clock is off."""
    store, replace, now = Store(disk(tmp_path)), os.replace, time.time() + years * 365 * 86_400
    store.put("a", blob("a"), 1.0)
    monkeypatch.setattr("retouch.cache.disk.time.time", lambda: now)

    def meanwhile(part: Path, path: Path) -> None:
        monkeypatch.setattr("retouch.cache.disk.os.replace", replace)
        assert Store(disk(tmp_path)).find("a") == blob("a")
        os.replace(part, path)

    monkeypatch.setattr("retouch.cache.disk.os.replace", meanwhile)
    store.put("b", blob("b"), 1.0)
    later = Store(disk(tmp_path))
    assert [later.find(key) for key in "ab"] == [blob("a"), blob("b")]
    assert not list(tmp_path.glob("*.part"))
    check(later)


def test_a_file_that_cannot_be_read_this_time_is_a_miss_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(disk(tmp_path))
    made(store, "a")
    with monkeypatch.context() as patch:

        def refuse(path: Path) -> bytes:
            raise OSError(errno.EMFILE, "Too many open files")

        patch.setattr(Path, "read_bytes", refuse)
        assert store.find("a") is None
    assert list(tmp_path.glob("*.cache"))
    assert made(store, "a")
    assert store.counters.lost == 0
