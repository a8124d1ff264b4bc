"""How much the server holds at once of what it is sent: bytes of bodies, pixels of pictures. What comes on top is refused."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

from retouch.edit import ImageTooLarge, QueueFull


@dataclass(slots=True, eq=False)
class Budget:
    """`limit` of `what`, of which `used` are held. From any thread."""

    limit: int
    what: str
    used: int = 0
    _holders: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def claim(self) -> Claim:
        return Claim(self)

    def check(self, amount: int) -> None:
        """Raises QueueFull where there is not so much left now."""
        if self.used + amount > self.limit:
            raise QueueFull(f"the server holds as many {self.what} as it may; try again later.", retry_after=2.0)


@dataclass(slots=True, eq=False)
class Claim:
    """What one request holds of a budget. Requests that `share` something hold it together, once."""

    budget: Budget
    held: int = 0
    _shared: dict[str, int] = field(default_factory=dict)

    def take(self, amount: int) -> None:
        """Raises QueueFull where there is not so much left now, ImageTooLarge where there never will be."""
        with self.budget._lock:
            self._take(amount)
            self.held += amount

    def share(self, name: str, amount: int) -> None:
        """Raises as `take`."""
        if name in self._shared:
            return
        with self.budget._lock:
            if not self.budget._holders[name]:
                self._take(amount)
            self.budget._holders[name] += 1
            self._shared[name] = amount

    def part(self, amount: int) -> Claim:
        """So much of what is held, as a claim of its own, which may be held for longer."""
        with self.budget._lock:
            amount = min(amount, self.held)
            self.held -= amount
        return Claim(self.budget, amount)

    def give_back(self, amount: int) -> None:
        with self.budget._lock:
            amount = min(amount, self.held)
            self.budget.used -= amount
            self.held -= amount

    def release(self) -> None:
        """All of it; nothing happens where nothing is held any more."""
        self.give_back(self.held)
        with self.budget._lock:
            for name, amount in self._shared.items():
                self.budget._holders[name] -= 1
                if not self.budget._holders[name]:
                    del self.budget._holders[name]
                    self.budget.used -= amount
            self._shared.clear()

    def _take(self, amount: int) -> None:
        budget = self.budget
        if amount + self.held + sum(self._shared.values()) > budget.limit:
            most = f"{budget.limit / 1e6:,.0f} million {budget.what}"
            raise ImageTooLarge(
                f"the request has more than the {most} that this server holds; send smaller pictures, or fewer."
            )
        budget.check(amount)
        budget.used += amount
