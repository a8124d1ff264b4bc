"""The store: exact, made once, within its budgets, in tiers, whatever happens at once."""

from __future__ import annotations

import errno
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blobs import Blob, blob, check, disk, made, memory
from retouch.cache.memory import Memory
from retouch.cache.store import Store


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


def test_what_is_used_at_hand_stays_longer(clock: list[float]) -> None:
    store = Store(memory(20))
    for key in "ab":
        made(store, key, seconds=1.0, clock=clock)
    assert store.used("a")
    assert not store.used("c")
    made(store, "c", seconds=1.0, clock=clock)
    assert "a" in store
    assert "b" not in store


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


def test_what_was_just_brought_stays_whatever_it_is_worth(tmp_path: Path) -> None:
    for store in (Store(memory(40)), Store(disk(tmp_path, budget=150)), Store(memory(40), memory(40, "host"))):
        for key in ("aa", "bb"):
            store.put(key, blob(key, 10), 100.0)
        store.put("cheap", blob("cheap", 40), 0.001)
        assert store.used("cheap")
        assert store.find("cheap") == blob("cheap", 40)
        check(store)


def test_what_comes_back_to_a_tier_stays_there_and_what_sinks_has_to_be_worth_it() -> None:
    store = Store(memory(20), memory(20, "host"))
    store.put("low", blob("l"), 0.001)
    store.put("dear", blob("d"), 100.0)  # low sinks
    assert store.find("low") == blob("l")  # and comes back, though dear is worth more
    assert [store._entries[key].tier for key in ("low", "dear")] == [0, 1]
    store.put("next", blob("n"), 1.0)  # low sinks again, to where dear is
    assert store.find("dear") == blob("d")
    assert store.find("low") is None
    check(store)


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


def test_a_tier_without_room_for_a_move_loses_the_value_only(caplog: pytest.LogCaptureFixture) -> None:
    def fail(value: Blob) -> Blob:
        raise MemoryError("no pinned memory")

    store = Store(memory(20), Memory("host", 100, fail))
    for seconds, key in enumerate("abc", 1):
        store.put(key, blob(key), float(seconds))
    assert [store.find(key) for key in "abc"] == [None, None, blob("c")]
    assert "no pinned memory" in caplog.text
    check(store)
