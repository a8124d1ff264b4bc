"""What a store asks of a tier, and of the values that lie in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Sized(Protocol):
    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""


V = TypeVar("V", bound=Sized)


class Unread(Exception):
    """A value that lies in a tier could not be read this time."""


class Tier(Protocol[V]):
    """One place where values lie. Calls come from many threads, but never two at once for one key."""

    name: str
    budget: int

    def put(self, key: str, value: V, seconds: float) -> int | None:
        """Keep `value`, which took `seconds` to make; returns the bytes it takes here, or None where it could not be kept."""

    def get(self, key: str) -> V | None:
        """The value in the form that the fastest tier holds, or None where it is lost or damaged. Raises Unread."""

    def drop(self, key: str) -> None:
        """Forget `key`; nothing happens where it is not here."""

    def found(self) -> Sequence[tuple[str, int, float]]:
        """(key, bytes, recompute seconds) of what lies here from an earlier process."""
