"""Shared pieces of the tests of the store: values of a few bytes, tiers of them, and what must hold of any store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from retouch.cache.disk import Disk
from retouch.cache.memory import Memory
from retouch.cache.store import Store


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
