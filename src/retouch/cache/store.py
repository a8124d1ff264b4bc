"""What is encoded once: a store of keyed values under a budget of bytes, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""


V = TypeVar("V", bound=Sized)


class Store(Generic[V]):
    """Exact: a hit is the very value that was put, so it never changes a result."""

    def __init__(self, budget: int) -> None:
        self.budget, self.bytes = budget, 0
        self._values: OrderedDict[str, V] = OrderedDict()

    def get(self, key: str, make: Callable[[], V]) -> tuple[V, bool]:
        """The value of `key`, made where there is none, and whether it was there."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key], True
        value = make()
        self._values[key] = value
        self.bytes += value.bytes
        while self.bytes > self.budget and len(self._values) > 1:
            self.bytes -= self._values.popitem(last=False)[1].bytes
        return value, False

    def __len__(self) -> int:
        return len(self._values)
