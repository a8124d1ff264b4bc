"""What the ledger's edits come to in a time, by tenant, model, day or stage; and what held devices cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sqlalchemy import ColumnElement, Integer, case, func, literal, literal_column, select

from retouch.ledger.store import Ledger
from retouch.ledger.tables import HITS, STAGES, edits, leases
from retouch.prices import spent

DAY = 86_400_000
KEYS: dict[str, Callable[[], ColumnElement[Any]]] = {
    "tenant": lambda: edits.c.tenant,
    "model": lambda: edits.c.model,
    "day": lambda: edits.c.time // literal_column(str(DAY), Integer),
}
ALL_STAGES = (*STAGES, "other")

Groups = dict[str | None, dict[str, "Sum"]]
"""Group -> lease -> sum; in the group None are those that were not asked for."""


@dataclass(slots=True)
class Sum:
    """Of edits. `edits` are those that succeeded, `failed` and `cancelled` the others; of these no device time is known.

    `unpriced` are among the edits, but not in `nanodollars`. `held` is their share, in dollars, of what held devices cost, None
    where that is not known.
    """

    edits: int = 0
    failed: int = 0
    cancelled: int = 0
    unpriced: int = 0
    busy_us: int = 0
    priced_us: int = 0
    nanodollars: int = 0
    tokens_computed: int = 0
    tokens_whole: int = 0
    document_hits: int = 0
    prompt_hits: int = 0
    result_hits: int = 0
    stages: dict[str, int] = field(default_factory=dict)
    stage_dollars: dict[str, float] = field(default_factory=dict)
    held: float | None = None

    def add(self, other: Sum) -> None:
        """Everything but `held`, which is shared out when all is known."""
        for name in COUNTED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in ((self.stages, other.stages), (self.stage_dollars, other.stage_dollars)):
            for stage, value in theirs.items():
                mine[stage] = mine.get(stage, 0) + value  # type: ignore[assignment]


COUNTED = tuple(f.name for f in fields(Sum) if f.name not in ("stages", "stage_dollars", "held"))


@dataclass(frozen=True, slots=True)
class Held:
    """A lease's part in a time: seconds, and dollars an hour where a price is known."""

    lease: str
    device: str
    seconds: float
    price: float | None
    source: str


def by(ledger: Ledger, key: str, since: float, until: float, only: Mapping[str, str] | None = None) -> Groups:
    """Sums of the edits that ended from `since` to before `until`; times in seconds since 1970.

    `only`: a column (tenant, model) -> what it has to be. The other edits are in the group None, for `share_out`.
    """
    table = edits.c
    done = table.status == "succeeded"
    counted = [
        _count(done), _count(table.status == "failed"), _count(table.status == "cancelled"),
        _count(done & table.nanodollars.is_(None)), _total(table.busy_us),
        _total(case((table.nanodollars.is_not(None), table.busy_us), else_=0)), _total(table.nanodollars),
        _total(table.tokens_computed), _total(table.tokens_whole), *(_total(table[f"{hit}_hit"]) for hit in HITS),
    ]  # fmt: skip
    assert len(counted) == len(COUNTED)  # which names them, in this order
    stages = [_total(table[f"{stage}_us"]) for stage in ALL_STAGES]
    dollars = [func.coalesce(func.sum(table[f"{stage}_us"] * table.price), 0.0) for stage in ALL_STAGES]
    wanted = dict(only or {})
    told = [table[name] for name in wanted]
    group = KEYS[key]() if key in KEYS else literal("")
    query = select(group, table.lease, *told, *counted, *stages, *dollars).where(
        table.time >= int(since * 1000), table.time < int(until * 1000)
    )
    query = query.group_by(*([group] if key in KEYS else []), table.lease, *told)
    found: dict[str | None, dict[str, Sum]] = defaultdict(lambda: defaultdict(Sum))
    with ledger.begin() as connection:
        for name, lease, *values in connection.execute(query):
            asked_for = values[: len(told)] == list(wanted.values())
            del values[: len(told)]
            whole = [int(value) for value in values[: len(counted) + len(stages)]]
            costs = [spent(float(value) / 1e6, 1.0) for value in values[len(whole) :]]
            one = Sum()
            for counter, value in zip(COUNTED, whole, strict=False):
                setattr(one, counter, value)
            one.stages = dict(zip(ALL_STAGES, whole[len(counted) :], strict=True))
            one.stage_dollars = dict(zip(ALL_STAGES, costs, strict=True))
            found[str(name) if asked_for else None][lease].add(one)
    return {name: dict(leases) for name, leases in found.items()}


def held(ledger: Ledger, since: float, until: float) -> list[Held]:
    """What of the leases lies in that time."""
    low, high, table = int(since * 1000), int(until * 1000), leases.c
    query = select(table.lease, table.device, table.started, table.seen, table.price, table.source)
    with ledger.begin() as connection:
        rows = connection.execute(query.where(table.seen > low, table.started < high).order_by(table.started)).all()
    return [Held(row[0], row[1], (min(row[3], high) - max(row[2], low)) / 1e3, row[4], row[5]) for row in rows]


def share_out(groups: Groups, devices: Iterable[Held]) -> float | None:
    """Charge each device's cost to the edits it served, by their device time, and that of idle ones to all alike.

    Returns the dollars of all, None where no price is known.
    """
    costs = {one.lease: spent(one.seconds, one.price) for one in devices if one.price is not None}
    if not costs:
        return None
    served: dict[str, list[Sum]] = defaultdict(list)
    for of_group in groups.values():
        for lease, one in of_group.items():
            one.held = 0.0
            served[lease].append(one)
    for lease, cost in costs.items():
        charge(served.get(lease) or [one for some in served.values() for one in some], cost)
    return sum(costs.values())


def charge(sums: list[Sum], cost: float) -> None:
    """Share dollars out by device time; where nothing was computed, by the number of edits."""
    weights = [one.busy_us for one in sums]
    if not any(weights):
        weights = [one.edits + one.failed + one.cancelled for one in sums]
    for one, weight in zip(sums, weights, strict=True):
        one.held = (one.held or 0.0) + cost * weight / sum(weights)


def joined(sums: Iterable[Sum]) -> Sum:
    """All in one."""
    whole, parts = Sum(), list(sums)
    for one in parts:
        whole.add(one)
    known = [one.held for one in parts if one.held is not None]
    whole.held = sum(known) if known else None
    return whole


def _count(condition: ColumnElement[bool]) -> ColumnElement[Any]:
    return _total(case((condition, 1), else_=0))


def _total(column: ColumnElement[Any]) -> ColumnElement[Any]:
    return func.coalesce(func.sum(column), 0)
