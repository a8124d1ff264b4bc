"""The store: exact, made once, within its budgets, in tiers, and never a reason for an edit to fail."""

from __future__ import annotations

import errno
import os
import random
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from retouch.cache.disk import ABANDONED, HEADER, Disk
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


def blob(key: str, size: int = 20) -> Blob:
    return Blob(key.encode() * (size // len(key)))


def check(store: Store[Blob]) -> None:
    """What the counters say is what the tiers hold, within their budgets, and nothing is on its way for ever."""
    assert not store._moves
    for index, tier in enumerate(store.tiers):
        assert store.counters.bytes[tier.name] <= tier.budget
        if isinstance(tier, Memory):
            held = {key: value.bytes for key, value in tier._values.items()}
        else:
            assert isinstance(tier, Disk)
            held = {str(path): path.stat().st_size for path in tier.folder.glob("*.cache")}
            assert not list(tier.folder.glob("*.part"))
        assert sum(held.values()) == store.counters.bytes[tier.name]
        assert len(held) == sum(entry.tier == index for entry in store._entries.values())


def test_what_was_brought_is_found_until_it_is_dropped(tmp_path: Path) -> None:
    store = Store(memory(40), disk(tmp_path))
    assert store.find("a") is None
    store.put("a", blob("a"), 2.0)
    store.put("a", blob("b"), 2.0)
    assert store.find("a") == blob("a"), "one that is there already stays"
    assert (store.counters.misses, store.counters.hits["device"], store.counters.saved_seconds) == (1, 1, 2.0)
    for key in "bcd":
        store.put(key, blob(key), 3.0)
    assert [store.find(key) for key in "abcd"] == [blob(key) for key in "abcd"]
    check(store)
    assert [store.drop(key) for key in "aba"] == [True, True, False]
    assert store.find("a") is None
    assert len(store) == 2
    check(store)


def test_what_moves_between_tiers_is_found_all_the_time(tmp_path: Path) -> None:
    """Askers of one key promote it while others push it out: nobody may miss it on its way."""
    store, keys = Store(memory(40), memory(60, "host"), disk(tmp_path)), [f"{i:02}" for i in range(12)]
    for key in keys:
        store.put(key, blob(key), 1.0)

    def ask(seed: int) -> int:
        rng = random.Random(seed)
        return sum(store.find(key) != blob(key) for key in rng.choices(keys, k=300))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(8))) == 0
    assert store.counters.misses == store.counters.lost == 0
    check(store)


def test_what_sinks_is_found_while_the_disk_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier, writing, go_on = disk(tmp_path), threading.Event(), threading.Event()
    store, put = Store(memory(20), tier), tier.put

    def slow(key: str, value: Blob, seconds: float) -> int | None:
        writing.set()
        assert go_on.wait(20)
        return put(key, value, seconds)

    monkeypatch.setattr(tier, "put", slow)
    store.put("a", blob("a"), 1.0)
    pusher = threading.Thread(target=store.put, args=("b", blob("b"), 2.0))
    pusher.start()
    assert writing.wait(20)
    assert store.find("a") == blob("a")
    assert store.get("a", lambda: pytest.fail("made again")) == (blob("a"), True)
    assert store.drop("a")
    assert store.find("a") is None
    go_on.set()
    pusher.join(20)
    assert store.find("a") is None, "it was dropped while it sank"
    check(store)


def test_what_is_dropped_while_it_is_read_stays_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier, reading, go_on = disk(tmp_path), threading.Event(), threading.Event()
    store, get = Store(memory(100), tier), tier.get
    store.put("a", blob("a"), 1.0)
    store.sink()

    def slow(key: str) -> Blob | None:
        value = get(key)
        reading.set()
        assert go_on.wait(20)
        return value

    monkeypatch.setattr(tier, "get", slow)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(store.find, "a")
        assert reading.wait(20)
        assert store.drop("a")
        go_on.set()
        assert found.result(20) == blob("a")
    assert store.find("a") is None
    check(store)


def test_many_bring_one_value_at_once(tmp_path: Path) -> None:
    store = Store(disk(tmp_path))
    for turn in range(20):
        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(store.put, f"{turn}", blob("ab", 2000), 1.0) for _ in range(8)]:
                done.result()
        assert store.find(f"{turn}") == blob("ab", 2000)
    assert len(store) == 20
    check(store)


@pytest.mark.parametrize("seed", range(3))
def test_the_bytes_add_up_whatever_happens_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Askers, bringers and droppers in eight threads, three tiers with little room, a disk that now and then fails."""
    tier, flaky = disk(tmp_path, budget=900), random.Random(seed)
    store, replace = Store(memory(60), memory(80, "host"), tier), os.replace

    def fail(source: Path, target: Path) -> None:
        if flaky.random() < 0.1:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("retouch.cache.disk.os.replace", fail)

    def work(number: int) -> None:
        rng = random.Random(f"{seed}/{number}")
        for _ in range(300):
            key = f"{rng.randrange(25):02}"
            size = 2 * (1 + int(key) % 12)
            match rng.randrange(5):
                case 0:
                    store.put(key, blob(key, size), rng.random())
                case 1:
                    store.drop(key)
                case 2:
                    made(store, key, size)
                case _:
                    assert store.find(key) in (None, blob(key, size))

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, number) for number in range(8)]:
            done.result()
    check(store)
    monkeypatch.undo()
    store.sink()
    check(store)
    later = Store(memory(60), disk(tmp_path, budget=900))
    assert later._entries.keys() == {key for key, entry in store._entries.items() if entry.tier == 2}
    check(later)
    store.clear()
    check(store)


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


def test_a_tier_without_room_for_a_move_loses_the_value_only(caplog: pytest.LogCaptureFixture) -> None:
    def fail(value: Blob) -> Blob:
        raise MemoryError("no pinned memory")

    store = Store(memory(20), Memory("host", 100, fail))
    for seconds, key in enumerate("abc", 1):
        store.put(key, blob(key), float(seconds))
    assert [store.find(key) for key in "abc"] == [None, None, blob("c")]
    assert "no pinned memory" in caplog.text
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
