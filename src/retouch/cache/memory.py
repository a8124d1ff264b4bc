"""The tiers of one process' memory: of the device, where values are used, and of the host, which has more room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from retouch.cache.tier import Sized

V = TypeVar("V", bound=Sized)


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
