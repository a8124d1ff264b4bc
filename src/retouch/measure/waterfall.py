"""What each cause saves: the difference between two rungs, and whether the differences add up to what was measured again.

A sum of differences is the difference of its ends whatever was measured in between, so it proves nothing by itself. It is held
against a second measurement of the last rung, made by a fresh process at the end of the run: what the machine drifted
meanwhile, and what the measurement scatters, is in the residual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from retouch.measure.subjects import AGAIN, LADDER, RUNG, again_of
from retouch.measure.tally import COST, SUITE, UNIT
from retouch.record import Record, Scalar

WITHIN = 0.05


@dataclass(frozen=True, slots=True)
class Fall:
    """Dollars per million edits. `savings` are by cause, below 0 where a rung costs more than the one before it; causes of
    rungs without a figure stand with the next one's. `again` is the last rung's second measurement; None: there is none.
    """

    plain: float
    savings: Mapping[str, float]
    last: float
    again: float | None

    @property
    def residual(self) -> float | None:
        """Dollars that the causes' sum has more than the saving measured again."""
        return None if self.again is None else sum(self.savings.values()) - (self.plain - self.again)

    @property
    def share(self) -> float | None:
        """Of the measured saving."""
        return None if self.residual is None or self.again == self.plain else abs(self.residual / (self.plain - self.again))  # type: ignore[operator]

    @property
    def drift(self) -> float | None:
        """By how much the second measurement of the last rung differs from the first, as a share of it."""
        return None if self.again is None else self.again / self.last - 1

    @property
    def adds_up(self) -> bool | None:
        """None: it was not measured again."""
        return None if self.share is None else self.share <= WITHIN


def of(rows: Sequence[Record]) -> Fall | None:
    """From one run's rows; None without the plain rung and another."""
    cost = {
        (row.extra.get("role"), row.extra.get("subject")): row.value
        for row in rows
        if row.suite == SUITE and row.name == COST and row.value is not None
    }
    places = [place for place, rung in enumerate(LADDER) if (RUNG, rung.name) in cost]
    if len(places) < 2 or places[0]:
        return None
    values = {place: cost[RUNG, LADDER[place].name] for place in places}
    savings = {
        " + ".join(rung.cause for rung in LADDER[before + 1 : place + 1]): values[before] - values[place]
        for before, place in pairwise(places)
    }
    last = places[-1]
    return Fall(values[0], savings, values[last], cost.get((AGAIN, again_of(LADDER[last].name))))


def records(fall: Fall, where: Mapping[str, Any], extra: Mapping[str, Scalar]) -> list[Record]:
    """A row a cause, and the residual with whether it is within 5 % of the saving."""

    def row(name: str, value: float, **said: Scalar) -> Record:
        return Record(SUITE, name, value, UNIT, **where, extra={**extra, **said})

    made = [row("saving", value, cause=cause) for cause, value in fall.savings.items()]
    if fall.residual is not None and fall.again is not None:
        said = {"share": fall.share, "drift": fall.drift, "adds_up": fall.adds_up, "measured": fall.plain - fall.again}
        made.append(row("residual of the savings", fall.residual, **said))
    return made
