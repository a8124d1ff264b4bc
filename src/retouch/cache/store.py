"""What is computed once: keyed values under budgets of bytes, in tiers from the fastest to the roomiest.

Exact: a hit is the value that was made for that key. Of many simultaneous askers one makes it and the others wait for it.
What leaves is what is cheapest to do without: recompute seconds times uses over bytes, aged so that old fame fades
(GreedyDual-Size-Frequency, Cherkasova 1998, HPL-98-69R1).
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""


V = TypeVar("V", bound=Sized)


class Tier(Protocol[V]):
    """One place where values lie. Calls come from many threads, but never two at once for one key."""

    name: str
    budget: int

    def put(self, key: str, value: V, seconds: float) -> int | None:
        """Keep `value`, which took `seconds` to make; returns the bytes it takes here, or None where it could not be kept."""

    def get(self, key: str) -> V | None:
        """The value in the form that the fastest tier holds, or None where it is lost or damaged."""

    def drop(self, key: str) -> None:
        """Forget `key`; nothing happens where it is not here."""

    def found(self) -> Sequence[tuple[str, int, float]]:
        """(key, bytes, recompute seconds) of what lies here from an earlier process."""


class Memory(Generic[V]):
    """A tier of values in memory. `move` brings one here (to host memory, say), `back` to the fastest tier's form."""

    def __init__(
        self, name: str, budget: int, move: Callable[[V], V] | None = None, back: Callable[[V], V] | None = None
    ) -> None:
        self.name, self.budget = name, budget
        self._move, self._back = move, back
        self._values: dict[str, V] = {}

    def put(self, key: str, value: V, seconds: float) -> int | None:
        self._values[key] = kept = self._move(value) if self._move else value
        return kept.bytes

    def get(self, key: str) -> V | None:
        value = self._values.get(key)
        return self._back(value) if self._back and value is not None else value

    def drop(self, key: str) -> None:
        self._values.pop(key, None)

    def found(self) -> Sequence[tuple[str, int, float]]:
        return ()


@dataclass(slots=True)
class Counters:
    """Of one store. `hits`, `bytes` and `evicted` are by tier; `joined` waited for another's making, `saved_seconds` is making
    that was spared.
    """

    hits: dict[str, int]
    bytes: dict[str, int]
    evicted: dict[str, int]
    misses: int = 0
    joined: int = 0
    lost: int = 0
    saved_seconds: float = 0.0


@dataclass(slots=True)
class _Entry:
    """Where a value lies (an index into the tiers), what it takes there, and what making it took."""

    tier: int
    bytes: int
    seconds: float
    uses: int = 1
    worth: float = 0.0


@dataclass(slots=True)
class _Level:
    """The order in which a tier lets go: a heap of (worth, turn, key), in which outdated lines are skipped."""

    heap: list[tuple[float, int, str]] = field(default_factory=list)
    age: float = 0.0


class Store(Generic[V]):
    """`tiers` from the fastest to the roomiest; what leaves one goes to the next, and comes back to the first when it is asked
    for. A value larger than a tier's whole budget passes it by.
    """

    def __init__(self, *tiers: Tier[V]) -> None:
        self.tiers = tiers
        hits, held, evicted = (dict.fromkeys([tier.name for tier in tiers], 0) for _ in range(3))
        self.counters = Counters(hits, held, evicted)
        self._entries: dict[str, _Entry] = {}
        self._levels = [_Level() for _ in tiers]
        self._flights: dict[str, Future[V]] = {}
        self._lock = threading.Lock()
        self._turn = itertools.count()
        for index, tier in enumerate(tiers):
            for key, size, seconds in tier.found():
                self._enter(key, index, size, seconds, uses=1)
            self._overflow(index)

    def get(self, key: str, make: Callable[[], V]) -> tuple[V, bool]:
        """The value of `key`, made where there is none, and whether that was spared.

        What `make` raises reaches everybody who waits for this making, and nothing is kept: the next asker tries again.
        """
        with self._lock:
            flight = self._flights.get(key)
            if flight is None:
                self._flights[key] = own = Future[V]()
            else:
                self.counters.joined += 1
        if flight is not None:
            return flight.result(), True
        try:
            value, hit = self._look_up(key, make)
        except BaseException as error:
            self._land(key)
            own.set_exception(error)
            raise
        self._land(key)
        own.set_result(value)
        return value, hit

    def find(self, key: str) -> V | None:
        """The value of `key` where there is one: for what is made elsewhere, and brought by `put`."""
        value = self._held(key)
        if value is None:
            with self._lock:
                self.counters.misses += 1
        return value

    def put(self, key: str, value: V, seconds: float) -> None:
        """Keep a value that took `seconds` to make; one that is there already stays."""
        with self._lock:
            if key in self._entries:
                return
        self._keep(key, value, seconds, uses=1)

    def drop(self, key: str) -> bool:
        """Forget `key`; whether it was there."""
        with self._lock:
            known = key in self._entries
            self._leave(key)
        return known

    def _held(self, key: str) -> V | None:
        """What is slow (disk) holds no lock."""
        with self._lock:
            entry = self._entries.get(key)
        if entry is None:
            return None
        tier = self.tiers[entry.tier]
        value = tier.get(key)
        with self._lock:
            if value is not None:
                self.counters.hits[tier.name] += 1
                self.counters.saved_seconds += entry.seconds
                entry.uses += 1
                if entry.tier == 0 and self._entries.get(key) is entry:
                    self._rank(key, entry)
            else:
                self.counters.lost += 1
            if (value is None or entry.tier) and self._entries.get(key) is entry:
                self._leave(key)
        if value is not None and entry.tier:
            self._keep(key, value, entry.seconds, entry.uses)
        return value

    def _look_up(self, key: str, make: Callable[[], V]) -> tuple[V, bool]:
        """Runs for one asker of a key at a time; making holds no lock."""
        value = self._held(key)
        if value is not None:
            return value, True
        started = time.perf_counter()
        value = make()
        seconds = time.perf_counter() - started
        with self._lock:
            self.counters.misses += 1
        self._keep(key, value, seconds, uses=1)
        return value, False

    def _land(self, key: str) -> None:
        with self._lock:
            del self._flights[key]

    def _keep(self, key: str, value: V, seconds: float, uses: int, first: int = 0) -> None:
        """Into the first tier from `first` on that may hold it; what must go for it sinks further down."""
        sinking = [(key, value, seconds, uses, first)]
        while sinking:
            key, value, seconds, uses, first = sinking.pop()
            for index in range(first, len(self.tiers)):
                tier = self.tiers[index]
                size = tier.put(key, value, seconds) if value.bytes <= tier.budget else None
                if size is None:
                    continue
                with self._lock:
                    newer = self._entries.get(key)
                    if newer is None:
                        self._enter(key, index, size, seconds, uses)
                        sinking += self._overflow(index)
                    elif newer.tier != index:  # made again while it sank
                        tier.drop(key)
                break

    def _enter(self, key: str, index: int, size: int, seconds: float, uses: int) -> None:
        self._entries[key] = entry = _Entry(index, size, seconds, uses)
        self.counters.bytes[self.tiers[index].name] += size
        self._rank(key, entry)

    def _rank(self, key: str, entry: _Entry) -> None:
        level = self._levels[entry.tier]
        entry.worth = level.age + entry.uses * entry.seconds / max(1, entry.bytes)
        heapq.heappush(level.heap, (entry.worth, next(self._turn), key))
        if len(level.heap) > 64 + 4 * len(self._entries):  # many more outdated lines than entries
            level.heap = [(e.worth, next(self._turn), k) for k, e in self._entries.items() if e.tier == entry.tier]
            heapq.heapify(level.heap)

    def _leave(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.counters.bytes[self.tiers[entry.tier].name] -= entry.bytes
            self.tiers[entry.tier].drop(key)

    def _overflow(self, index: int) -> list[tuple[str, V, float, int, int]]:
        """Takes out of a tier what is worth least, until it is within its budget; returns what the next one may keep."""
        tier, level, out = self.tiers[index], self._levels[index], []
        while self.counters.bytes[tier.name] > tier.budget and level.heap:
            worth, _, key = heapq.heappop(level.heap)
            entry = self._entries.get(key)
            if entry is None or entry.tier != index or entry.worth != worth:
                continue
            level.age = worth
            self.counters.evicted[tier.name] += 1
            value = tier.get(key) if index + 1 < len(self.tiers) else None
            self._leave(key)
            if value is not None:
                out.append((key, value, entry.seconds, entry.uses, index + 1))
        return out

    def sink(self) -> None:
        """Bring all that lies in faster tiers to the last one, so that the next process finds it."""
        last = len(self.tiers) - 1
        with self._lock:
            higher = [(key, entry) for key, entry in self._entries.items() if entry.tier < last]
        for key, entry in higher:
            value = self.tiers[entry.tier].get(key)
            with self._lock:
                self._leave(key)
            if value is not None:
                self._keep(key, value, entry.seconds, entry.uses, first=last)

    def clear(self) -> None:
        """Forget everything, on disk too."""
        with self._lock:
            for key in list(self._entries):
                self._leave(key)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries
