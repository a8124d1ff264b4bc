"""Who stands where: a line a subject, the claims that follow, and whether they hold. All from the rows of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from retouch.measure import waterfall
from retouch.measure.gate import GATED, LOSS, PASS
from retouch.measure.subjects import AGAIN, KINDS, LADDER, RUNG, again_of
from retouch.measure.tally import COST, SUITE, WORST, counting, rates, slowed
from retouch.record import Record, Scalar

TARGETS = {"personal": (10.0, 3.0), "template": (15.0, 4.0)}
"""By mix: how many times fewer dollars than the best full-picture peer, and than the best peer of all."""


@dataclass(slots=True)
class Line:
    """A subject's figures by the names of its rows; `quality` by kind of edit ("": all) and "zone metric", `losses` against the
    plain rung by "zone metric". `cost` None: `error` says why. `again` is what a rung cost when it was measured a second time.
    """

    name: str
    role: str
    order: int
    clients: int
    cost: float | None = None
    again: float | None = None
    error: str = ""
    log: str = ""
    figures: dict[str, Record] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    curve: list[Record] = field(default_factory=list)
    quality: dict[tuple[str, str], Record] = field(default_factory=dict)
    losses: dict[str, Record] = field(default_factory=dict)
    gate: Record | None = None
    worst: list[Record] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"Retouch {self.name}" if self.role in (RUNG, AGAIN) else self.name

    @property
    def settled(self) -> float | None:
        """What it counts with: its cost, or the mean of both where it was measured twice; else luck would choose the better."""
        return self.cost if self.cost is None or self.again is None else (self.cost + self.again) / 2

    def value(self, name: str) -> float | None:
        found = self.figures.get(name)
        return None if found is None else found.value

    @property
    def rates(self) -> tuple[float, float] | None:
        """FLOP/s of the machine's matrix products, before and after."""
        return rates(next(iter(self.figures.values()))) if self.figures else None


@dataclass(frozen=True, slots=True)
class Claim:
    """`ours` costs so many `times` less than `theirs`; `target` is what it was to be, where there is one."""

    what: str
    times: float
    ours: str
    theirs: str
    target: float | None

    @property
    def holds(self) -> bool | None:
        return None if self.target is None else self.times >= self.target


@dataclass(frozen=True, slots=True)
class Standing:
    """Of one run on one mix. `first` is any row of it, for what they have in common. `slowed`: as `tally.slowed`."""

    mix: str
    lines: tuple[Line, ...]
    fall: waterfall.Fall | None
    first: Record
    slowed: Mapping[str, float] = field(default_factory=dict)

    @property
    def extra(self) -> Mapping[str, Scalar]:
        return self.first.extra

    def line(self, name: str) -> Line | None:
        return next((line for line in self.lines if line.name == name), None)

    @property
    def ours(self) -> Line | None:
        """The rung that costs least of those that the quality gate lets pass. Where quality was asked for, only the plain rung
        needs no gate: all else is held against it.
        """
        rungs = [line for line in self.lines if line.role == RUNG and line.cost is not None and self.passed(line)]
        return min(rungs, key=lambda line: line.settled or 0.0, default=None)

    def passed(self, line: Line) -> bool:
        if line.gate is None:
            return not self.extra.get("quality") or line.name == LADDER[0].name
        return line.gate.extra.get("verdict") == PASS

    def best(self, *roles: str) -> Line | None:
        """The peer of these roles that costs least."""
        found = [line for line in self.lines if line.role in roles and line.cost is not None]
        return min(found, key=lambda line: line.settled or 0.0, default=None)

    def claims(self) -> list[Claim]:
        ours = self.ours
        if ours is None or not ours.settled:
            return []
        full, every = TARGETS.get(self.mix, (None, None))
        asked: list[tuple[str, Line | None, float | None]] = [
            ("the full picture in the best peer", self.best("full"), full),
            ("the best peer of all", self.best(*KINDS), every),
            ("our own pipeline without savings", self.line("plain") if ours.name != "plain" else None, None),
        ]
        return [
            Claim(what, line.settled / ours.settled, ours.label, line.label, target)
            for what, line, target in asked
            if line is not None and line.settled is not None
        ]


def standings(rows: Mapping[str, Sequence[Record]]) -> list[Standing]:
    """Of `tally.latest`."""
    return [of(mix, found) for mix, found in rows.items()]


def of(mix: str, rows: Sequence[Record]) -> Standing:
    lines: dict[str, Line] = {}
    rows = counting(rows)
    for row in rows:
        name = row.extra.get("subject")
        if isinstance(name, str):
            role, clients = str(row.extra.get("role")), int(row.extra.get("clients") or 0)
            _take(lines.setdefault(name, Line(name, role, len(lines), clients)), row)
    for line in lines.values():
        second = lines.get(again_of(line.name))
        if line.role == RUNG and second is not None and second.role == AGAIN:
            line.again = second.cost
    return Standing(mix, tuple(sorted(lines.values(), key=_place)), waterfall.of(rows), rows[0], slowed(rows))


def _place(line: Line) -> tuple[int, float, int]:
    """Peers first, what costs most on top; then the ladder upwards."""
    if line.role in (RUNG, AGAIN):
        steps = [row.extra.get("step") for row in line.figures.values()]
        return 1, float(steps[0] or 0) if steps else 0.0, line.order
    return 0, float("-inf") if line.cost is None else -line.cost, line.order


def _take(line: Line, row: Record) -> None:
    """A later row takes the place of an earlier one of its name: a run may go on."""
    if row.suite != SUITE:
        _take_quality(line, row)
    elif row.name == COST:
        line.cost, line.error, line.log = row.value, row.error, str(row.extra.get("log") or "")
        line.figures[row.name] = row
    elif row.name == "dollars by stage":
        line.stages[str(row.extra["stage"])] = row.value or 0.0
    elif row.name == "latency at load":
        line.curve = [*(one for one in line.curve if one.extra["load"] != row.extra["load"]), row]
    elif row.name == WORST:
        line.worst.append(row)
    else:
        line.figures[row.name] = row


def _take_quality(line: Line, row: Record) -> None:
    if row.name == GATED:
        line.gate = row
    elif row.name.startswith(LOSS):
        line.losses[row.name.removeprefix(LOSS)] = row
    elif "kind" in row.extra:
        line.quality[str(row.extra["kind"]), row.name] = row
