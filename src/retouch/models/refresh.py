"""When a step computes everything, where those between compute the masked cells alone.

A model that was not trained for masked cells alone still has to see the others. Their keys and values change slowly from
step to step, so those of the last full step stand in for them. Lossy, so it is named wherever it is on; `bench/refresh.py`
measures what it does to an edit.

Source: features of earlier steps reused, as in DeepCache (https://arxiv.org/abs/2312.00858); here by region, not by layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from retouch.edit import InvalidOption


@dataclass(frozen=True, slots=True)
class Refresh:
    """The `first` steps are full, and after them every one that is `every` steps later than the last full one."""

    first: int
    every: int

    @classmethod
    def parsed(cls, text: str) -> Refresh:
        """Of "2,4". Raises InvalidOption."""
        try:
            first, every = (int(part) for part in text.split(","))
        except ValueError:
            first = every = 0
        if first < 1 or every < 1:
            raise InvalidOption(f'refresh is {text!r}; give "F,K": the first F steps full, then every K-th, such as 2,4.')
        return cls(first, every)

    def full(self, step: int) -> bool:
        """Whether step 0, 1, ... is."""
        return step < self.first or (step - self.first + 1) % self.every == 0

    def count(self, steps: int) -> int:
        """How many of so many steps are full."""
        return sum(self.full(step) for step in range(steps))
