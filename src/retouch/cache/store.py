"""What is computed once: keyed values under budgets of bytes, in tiers from the fastest to the roomiest.

Exact: a hit is the value that was made for that key. Of many simultaneous askers one makes it and the others wait for it.
What leaves is what is cheapest to do without: recompute seconds times uses over bytes, aged so that old fame fades
(GreedyDual-Size-Frequency, Cherkasova 1998, HPL-98-69R1). What was just brought or asked for is kept: others make room.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

from retouch.cache.tier import Sized, Tier, Unread

log = logging.getLogger(__name__)

V = TypeVar("V", bound=Sized)


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
    """The order in which a tier lets go: a heap of (worth, turn, key), in which outdated lines are skipped.

    `entering` is held while a value is written here, until it counts as being here.
    """

    heap: list[tuple[float, int, str]] = field(default_factory=list)
    age: float = 0.0
    entering: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True, eq=False)
class _Move(Generic[V]):
    """A value on its way into the first tier from `first` on that may hold it. Until it is there, it is found here."""

    key: str
    value: V
    seconds: float
    uses: int = 1
    first: int = 0


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
        self._moves: dict[str, _Move[V]] = {}
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

    def used(self, key: str) -> bool:
        """Whether there is a value of `key`, which counts as a use of it: for who has it at hand already."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                entry.uses += 1
                self._rank(key, entry)
            return entry is not None or key in self._moves

    def put(self, key: str, value: V, seconds: float) -> None:
        """Keep a value that took `seconds` to make; one that is there already stays."""
        with self._lock:
            if key in self._entries or key in self._moves:
                return
            move = self._depart(_Move(key, value, seconds))
        self._keep(move)

    def drop(self, key: str) -> bool:
        """Forget `key`; whether it was there."""
        with self._lock:
            known = key in self._entries or self._moves.pop(key, None) is not None
            self._leave(key)
        return known

    def _held(self, key: str) -> V | None:
        """What is slow (disk) holds no lock; a value that is moved meanwhile is looked for again."""
        while True:
            with self._lock:
                move, entry = self._moves.get(key), self._entries.get(key)
                if move is not None:
                    self._count_hit(max(0, move.first - 1), move.seconds)
                    return move.value
            if entry is None:
                return None
            try:
                value = self.tiers[entry.tier].get(key)
            except Unread:
                return None
            with self._lock:
                still = self._entries.get(key) is entry
                if value is None and not still:
                    continue
                if value is None:
                    self.counters.lost += 1
                    self._leave(key)
                    return None
                self._count_hit(entry.tier, entry.seconds)
                if not still:
                    return value
                entry.uses += 1
                if entry.tier == 0:
                    self._rank(key, entry)
                    return value
                self._leave(key)
                move = self._depart(_Move(key, value, entry.seconds, entry.uses))
            self._keep(move)
            return value

    def _count_hit(self, index: int, seconds: float) -> None:
        self.counters.hits[self.tiers[index].name] += 1
        self.counters.saved_seconds += seconds

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
        self.put(key, value, seconds)
        return value, False

    def _land(self, key: str) -> None:
        with self._lock:
            del self._flights[key]

    def _depart(self, move: _Move[V]) -> _Move[V]:
        self._moves[move.key] = move
        return move

    def _keep(self, move: _Move[V]) -> None:
        """To its tier; what must go for it sinks further down."""
        moving = [move]
        while moving:
            move = moving.pop()
            for index in range(move.first, len(self.tiers)):
                sunk = self._settle(move, index)
                if sunk is not None:
                    moving += sunk
                    break
            with self._lock:
                if self._moves.get(move.key) is move:  # no tier took it
                    del self._moves[move.key]

    def _settle(self, move: _Move[V], index: int) -> list[_Move[V]] | None:
        """Into one tier: returns what sinks from it, or None where the value could not be kept here."""
        tier, key = self.tiers[index], move.key
        if move.value.bytes > tier.budget:
            return None
        with self._levels[index].entering:
            if self._moves.get(key) is not move:  # dropped on its way
                return []
            try:
                size = tier.put(key, move.value, move.seconds)
            except Exception as error:
                log.warning("a value could not be kept in the tier %s: %s", tier.name, error)
                size = None
            with self._lock:
                if size is None:
                    return None
                if self._moves.get(key) is not move or size > tier.budget:
                    tier.drop(key)
                    return None if size > tier.budget else []
                del self._moves[key]
                # What sinks has to be worth its place; for what was just brought or asked for, others make room.
                sunk = self._overflow(index, 0 if move.first else size)
                self._enter(key, index, size, move.seconds, move.uses)
                return sunk + self._overflow(index)

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

    def _overflow(self, index: int, room: int = 0) -> list[_Move[V]]:
        """Takes out of a tier what is worth least, until `room` is left of its budget; returns what the next one may keep."""
        tier, level, out = self.tiers[index], self._levels[index], []
        while self.counters.bytes[tier.name] + room > tier.budget and level.heap:
            worth, _, key = heapq.heappop(level.heap)
            entry = self._entries.get(key)
            if entry is None or entry.tier != index or entry.worth != worth:
                continue
            level.age = worth
            self.counters.evicted[tier.name] += 1
            value = None
            if index + 1 < len(self.tiers):
                with suppress(Exception):  # a device without room for the value on its way
                    value = tier.get(key)
            self._leave(key)
            if value is not None:
                out.append(self._depart(_Move(key, value, entry.seconds, entry.uses, index + 1)))
        return out

    def sink(self) -> None:
        """Bring all that lies in faster tiers to the last one, so that the next process finds it."""
        last = len(self.tiers) - 1
        with self._lock:
            higher = [(key, entry) for key, entry in self._entries.items() if entry.tier < last]
        for key, entry in higher:
            value = self.tiers[entry.tier].get(key)
            with self._lock:
                if self._entries.get(key) is not entry or value is None:
                    continue
                self._leave(key)
                move = self._depart(_Move(key, value, entry.seconds, entry.uses, last))
            self._keep(move)

    def clear(self) -> None:
        """Forget everything, on disk too."""
        with self._lock:
            self._moves.clear()
            for key in list(self._entries):
                self._leave(key)

    def told(self) -> dict[str, Any]:
        """How it stands, in plain values: its counters, the tiers' budgets of bytes, and how many values there are."""
        budget = {tier.name: tier.budget for tier in self.tiers}
        return {**asdict(self.counters), "budget": budget, "entries": len(self)}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries
