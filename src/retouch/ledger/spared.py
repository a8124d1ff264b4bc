"""What the edits of the books were spared, by cause, reckoned from what other edits of the same model and device took.

Nobody served them without the savings, so what that would have taken is an estimate. A document that was found is worth what
those cost that were not, by its cells; a prompt, and a finished result, what the others cost on average; and the cells that
the mask left alone what a line through the edits' own times says of a cell more. Steps shared by several edits, and compiled
ones, leave no trace in an edit's row: what they are worth is measured by `retouch bench`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields

from sqlalchemy import ColumnElement, Double, case, cast, func, literal, select

from retouch.ledger.store import Ledger
from retouch.ledger.tables import edits
from retouch.prices import spent

CAUSES = ("mask", "documents", "prompts", "results")


@dataclass(slots=True)
class Seen:
    """Sums over edits of one model, device, price and tenant; times in microseconds.

    `made` and `found`: those that encoded their document (prompt) and those that found it, documents counted in cells. Of the
    edits that computed, y = a k + b x is sought, with steps, image tokens and step time as k, x and y, and with 1, cells and
    finishing time; `step_xy` is the sum of x y over edits.
    """

    edits: float = 0.0
    busy: float = 0.0
    computed: float = 0.0
    computed_busy: float = 0.0
    made_cells: float = 0.0
    made_documents: float = 0.0
    found_cells: float = 0.0
    made_prompts: float = 0.0
    made_prompts_time: float = 0.0
    found_prompts: float = 0.0
    step_kk: float = 0.0
    step_kx: float = 0.0
    step_xx: float = 0.0
    step_ky: float = 0.0
    step_xy: float = 0.0
    tokens_left: float = 0.0
    finish_kk: float = 0.0
    finish_kx: float = 0.0
    finish_xx: float = 0.0
    finish_ky: float = 0.0
    finish_xy: float = 0.0
    cells_left: float = 0.0

    def add(self, other: Seen) -> None:
        for name in SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


SUMS = tuple(f.name for f in fields(Seen))


@dataclass(slots=True)
class Spared:
    """`seconds` and `dollars` are what was spent, `saved` and `saved_dollars` by cause. Of the causes in `unknown` a part is
    missing, as no edit of that time shows what it is worth. `unpriced` edits are in no dollars.
    """

    edits: int
    unpriced: int
    seconds: float
    dollars: float
    saved: dict[str, float]
    saved_dollars: dict[str, float]
    unknown: tuple[str, ...]


def by_cause(ledger: Ledger, since: float, until: float, only: Mapping[str, str] | None = None) -> Spared:
    """Of the edits that succeeded from `since` to before `until`, seconds since 1970. `only`: a column (tenant, model) -> what
    it has to be; what things are worth is taken from all edits of the model and device.
    """
    rows = _seen(ledger, since, until)
    like: dict[tuple[str, str], Seen] = defaultdict(Seen)
    for (model, device, _, _), seen in rows:
        like[model, device].add(seen)
    found = Spared(0, 0, 0.0, 0.0, dict.fromkeys(CAUSES, 0.0), dict.fromkeys(CAUSES, 0.0), ())
    unknown = set()
    for (model, device, tenant, price), seen in rows:
        named = {"tenant": tenant, "model": model}
        if any(named[name] != value for name, value in (only or {}).items()):
            continue
        found.edits += round(seen.edits)
        found.unpriced += 0 if price is not None else round(seen.edits)
        found.seconds += seen.busy / 1e6
        found.dollars += spent(seen.busy / 1e6, price or 0.0)
        for cause, worth in _worth(seen, like[model, device]).items():
            if worth is None:
                unknown.add(cause)
                continue
            found.saved[cause] += worth / 1e6
            found.saved_dollars[cause] += spent(worth / 1e6, price or 0.0)
    found.unknown = tuple(cause for cause in CAUSES if cause in unknown)
    return found


def _worth(seen: Seen, like: Seen) -> dict[str, float | None]:
    """Microseconds that these edits were spared; None: there is something, and nobody knows what it is worth."""
    cell = _slope(like.step_kk, like.step_kx, like.step_xx, like.step_ky, like.step_xy)
    pixels = _slope(like.finish_kk, like.finish_kx, like.finish_xx, like.finish_ky, like.finish_xy)
    return {
        "mask": cell * seen.tokens_left + pixels * seen.cells_left,
        "documents": _times(seen.found_cells, like.made_documents, like.made_cells),
        "prompts": _times(seen.found_prompts, like.made_prompts_time, like.made_prompts),
        "results": _times(seen.edits - seen.computed, like.computed_busy, like.computed),
    }


def _times(count: float, time: float, of: float) -> float | None:
    if not count:
        return 0.0
    return count * time / of if of else None


def _slope(kk: float, kx: float, xx: float, ky: float, xy: float) -> float:
    """b of the least squares y = a k + b x, with neither below 0; without a where k and x go together."""
    determinant = kk * xx - kx * kx
    if determinant > 1e-9 * kk * xx:
        a, b = (xx * ky - kx * xy) / determinant, (kk * xy - kx * ky) / determinant
        if a >= 0:
            return max(0.0, b)
    return max(0.0, xy / xx) if xx else 0.0


def _seen(ledger: Ledger, since: float, until: float) -> list[tuple[tuple[str, str, str, float | None], Seen]]:
    table, one, nothing = edits.c, literal(1.0), literal(0.0)

    def real(column: ColumnElement[int]) -> ColumnElement[float]:
        return cast(column, Double)

    def whenever(condition: ColumnElement[bool], value: ColumnElement[float]) -> ColumnElement[float]:
        return case((condition, value), else_=nothing)

    steps, tokens, whole = real(table.steps), real(table.tokens_computed), real(table.tokens_whole)
    cells, all_cells = tokens / func.nullif(steps, 0), whole / func.nullif(steps, 0)
    busy, step, finish = real(table.busy_us), real(table.step_us), real(table.finish_us)
    fresh = table.result_hit == 0
    computed = fresh & (table.steps > 0)
    encoded = computed & (table.document_hit == 0) & (table.document_us > 0)
    read = computed & (table.prompt_hit == 0) & (table.prompt_us > 0)
    terms: dict[str, ColumnElement[float]] = {
        "edits": one, "busy": busy, "computed": whenever(fresh, one), "computed_busy": whenever(fresh, busy),
        "made_cells": whenever(encoded, all_cells), "made_documents": whenever(encoded, real(table.document_us)),
        "found_cells": whenever(computed & (table.document_hit == 1), all_cells),
        "made_prompts": whenever(read, one), "made_prompts_time": whenever(read, real(table.prompt_us)),
        "found_prompts": whenever(computed & (table.prompt_hit == 1), one),
        "step_kk": whenever(computed, steps * steps), "step_kx": whenever(computed, steps * tokens),
        "step_xx": whenever(computed, tokens * tokens), "step_ky": whenever(computed, steps * step),
        "step_xy": whenever(computed, tokens * step), "tokens_left": whenever(computed, whole - tokens),
        "finish_kk": whenever(computed, one), "finish_kx": whenever(computed, cells),
        "finish_xx": whenever(computed, cells * cells), "finish_ky": whenever(computed, finish),
        "finish_xy": whenever(computed, cells * finish), "cells_left": whenever(computed, all_cells - cells),
    }  # fmt: skip
    sums = [func.coalesce(func.sum(terms[name]), nothing) for name in SUMS]
    keys = (table.model, table.device, table.tenant, table.price)
    query = select(*keys, *sums).where(
        table.status == "succeeded", table.time >= int(since * 1000), table.time < int(until * 1000)
    )
    with ledger.begin() as connection:
        rows = connection.execute(query.group_by(*keys)).all()
    return [(tuple(row[:4]), Seen(*map(float, row[4:]))) for row in rows]
