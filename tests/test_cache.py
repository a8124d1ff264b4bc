"""The store: exact, made once, within its budgets, in tiers, and never a reason for an edit to fail."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from retouch.cache.disk import HEADER, Disk
from retouch.cache.store import Memory, Store


@dataclass(frozen=True)
class Blob:
    data: bytes

    @property
    def bytes(self) -> int:
        return len(self.data)


def disk(folder: Path, budget: int = 10**6) -> Disk[Blob]:
    return Disk(folder, budget, lambda value: value.data, Blob)


def memory(budget: int, name: str = "device") -> Memory[Blob]:
    return Memory(name, budget)


def made(store: Store[Blob], key: str, size: int = 10, seconds: float = 0.0, clock: list[float] | None = None) -> bool:
    """Ask for `key`; returns whether it was a hit. `seconds` pass on `clock` while it is made."""

    def make() -> Blob:
        if clock is not None:
            clock[0] += seconds
        return Blob(key.encode() * (size // len(key)))

    value, hit = store.get(key, make)
    assert value.data == key.encode() * (size // len(key))
    return hit


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("retouch.cache.store.time.perf_counter", lambda: now[0])
    return now


def test_a_hit_is_the_very_value(clock: list[float]) -> None:
    store = Store(memory(100))
    first, hit = store.get("a", lambda: Blob(b"x"))
    assert not hit
    again, hit = store.get("a", lambda: pytest.fail("made twice"))
    assert hit
    assert again is first
    made(store, "b", seconds=3.0, clock=clock)
    made(store, "b")
    assert (store.counters.misses, store.counters.hits["device"], store.counters.saved_seconds) == (2, 2, 3.0)


def test_a_hundred_askers_make_it_once() -> None:
    store, started, calls = Store(memory(100)), threading.Event(), []

    def make() -> Blob:
        calls.append(1)
        started.wait(5)
        return Blob(b"x")

    with ThreadPoolExecutor(100) as pool:
        answers = [pool.submit(store.get, "a", make) for _ in range(100)]
        while store.counters.joined < 99:
            threading.Event().wait(0.001)
        started.set()
        values = [answer.result() for answer in answers]
    assert len(calls) == 1
    assert len({id(value) for value, _ in values}) == 1
    assert sum(hit for _, hit in values) == 99


def test_a_failed_making_reaches_its_waiters_and_is_not_kept() -> None:
    store, started = Store(memory(100)), threading.Event()

    def fail() -> Blob:
        started.wait(5)
        raise OSError("no device")

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(store.get, "a", fail) for _ in range(8)]
        while store.counters.joined < 7:
            threading.Event().wait(0.001)
        started.set()
        for answer in answers:
            with pytest.raises(OSError, match="no device"):
                answer.result()
    assert store.get("a", lambda: Blob(b"x")) == (Blob(b"x"), False)


def test_what_is_cheap_to_make_again_leaves_first(clock: list[float]) -> None:
    store = Store(memory(40))
    made(store, "dear", 20, seconds=5.0, clock=clock)
    made(store, "cheap", 20, seconds=0.1, clock=clock)
    made(store, "next", 20, seconds=1.0, clock=clock)
    assert "dear" in store
    assert "next" in store
    assert "cheap" not in store
    assert store.counters.bytes["device"] == 40


def test_what_is_asked_for_often_stays(clock: list[float]) -> None:
    store = Store(memory(40))
    made(store, "much", 20, seconds=1.0, clock=clock)
    for _ in range(5):
        made(store, "much", 20)
    made(store, "once", 20, seconds=2.0, clock=clock)
    made(store, "next", 20, seconds=3.0, clock=clock)
    assert "much" in store
    assert "once" not in store


def test_old_fame_fades(clock: list[float]) -> None:
    store = Store(memory(40))
    made(store, "famous", 20, seconds=1.0, clock=clock)
    for _ in range(9):
        made(store, "famous", 20)
    for turn in range(40):
        made(store, f"new-{turn:02}", 18, seconds=1.0, clock=clock)
    assert "famous" not in store


def test_a_value_larger_than_the_budget_is_answered_and_not_kept() -> None:
    store = Store(memory(10))
    assert not made(store, "small", 10)
    assert not made(store, "large", 20)
    assert "large" not in store
    assert "small" in store


def test_what_leaves_memory_comes_back_from_the_next_tiers(tmp_path: Path, clock: list[float]) -> None:
    store = Store(memory(20), memory(20, "host"), disk(tmp_path))
    for key in ("aa", "bb", "cc"):
        made(store, key, 20, seconds=1.0, clock=clock)
    assert store.counters.evicted == {"device": 2, "host": 1, "disk": 0}
    assert all(made(store, key, 20) for key in ("aa", "bb", "cc", "aa"))
    assert store.counters.misses == 3
    assert store.counters.hits["disk"] >= 1
    assert max(store.counters.bytes["device"], store.counters.bytes["host"]) <= 20


def test_values_move_in_the_form_of_their_tier() -> None:
    host: Memory[Blob] = Memory("host", 100, lambda v: Blob(v.data[::-1]), lambda v: Blob(v.data[::-1]))
    store = Store(memory(4), host)
    store.get("a", lambda: Blob(b"abcd"))
    store.get("b", lambda: Blob(b"efgh"))
    assert store.get("a", lambda: pytest.fail("lost"))[0] == Blob(b"abcd")


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


def test_clear_forgets_everything(tmp_path: Path) -> None:
    store = Store(memory(10), disk(tmp_path))
    made(store, "a")
    made(store, "b")
    store.clear()
    assert len(store) == 0
    assert not list(tmp_path.glob("*.cache"))
    assert set(store.counters.bytes.values()) == {0}


def test_many_threads_and_little_room(tmp_path: Path) -> None:
    store = Store(memory(60), memory(80, "host"), disk(tmp_path, budget=700))

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            key = f"{rng.randrange(30):02}"
            made(store, key, 2 * (1 + int(key) % 10))

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, seed) for seed in range(8)]:
            done.result()
    assert all(store.counters.bytes[tier.name] <= tier.budget for tier in store.tiers)
    files = sum(file.stat().st_size for file in tmp_path.glob("*.cache"))
    assert files == store.counters.bytes["disk"]
    asked = sum(store.counters.hits.values()) + store.counters.misses + store.counters.joined
    assert asked == 8 * 300
