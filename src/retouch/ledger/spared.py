"""What the edits of the books were spared, by cause, reckoned from what other edits of the same model and device took.

Nobody served them without the savings, so what that would have taken is an estimate. A document that was found is worth what
those cost that were not, by its cells; a prompt, and a finished result, what the others cost on average; and the cells that
the mask left alone what a line through the edits' own times says of a cell more. Steps shared by several edits, and compiled
ones, leave no trace in an edit's row: what they are worth is measured by `retouch bench`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Double, Integer, cast, func, literal, literal_column, select

from retouch.ledger.store import Ledger
from retouch.ledger.tables import edits
from retouch.prices import spent

CAUSES = ("mask", "documents", "prompts", "results")
PAIRS = ("kk", "kx", "xx", "ky", "xy")


Seen = Mapping[str, float]
"""Sums over edits, by the names that `_terms` and `_split` give them, 0 for others; times in microseconds."""


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
    like: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for (model, device, _, _), seen in rows.items():
        _add(like[model, device], seen)
    found = Spared(0, 0, 0.0, 0.0, dict.fromkeys(CAUSES, 0.0), dict.fromkeys(CAUSES, 0.0), ())
    unknown = set()
    for (model, device, tenant, price), seen in rows.items():
        named = {"tenant": tenant, "model": model}
        if any(named[name] != value for name, value in (only or {}).items()):
            continue
        found.edits += round(seen["edits"])
        found.unpriced += 0 if price is not None else round(seen["edits"])
        found.seconds += seen["busy"] / 1e6
        found.dollars += spent(seen["busy"] / 1e6, price or 0.0)
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
    step, finish = _slope(like, "step"), _slope(like, "finish")
    return {
        "mask": step * seen["step left"] + finish * seen["finish left"],
        "documents": _times(seen["found cells"], like["document time"], like["made cells"]),
        "prompts": _times(seen["found prompts"], like["prompt time"], like["made prompts"]),
        "results": _times(seen["edits"] - seen["computed"], like["computed time"], like["computed"]),
    }


def _times(count: float, time: float, of: float) -> float | None:
    if not count:
        return 0.0
    return count * time / of if of else None


def _slope(like: Seen, line: str) -> float:
    """b of the least squares y = a k + b x, with neither below 0; without a where k and x go together."""
    kk, kx, xx, ky, xy = (like[f"{line} {pair}"] for pair in PAIRS)
    determinant = kk * xx - kx * kx
    if determinant > 1e-9 * kk * xx:
        a, b = (xx * ky - kx * xy) / determinant, (kk * xy - kx * ky) / determinant
        if a >= 0:
            return max(0.0, b)
    return max(0.0, xy / xx) if xx else 0.0


def _terms() -> dict[str, ColumnElement[float]]:
    """What is summed. A line's are `PAIRS` of k, x and y, and how much of x was left out: of an edit's step time over its steps
    and image tokens, and of its finishing time over 1 and its cells.
    """

    def real(column: ColumnElement[int]) -> ColumnElement[float]:
        return cast(column, Double)

    table, one = edits.c, literal(1.0)
    steps, tokens, whole = real(table.steps), real(table.tokens_computed), real(table.tokens_whole)
    cells, all_cells = tokens / func.nullif(steps, 0), whole / func.nullif(steps, 0)
    terms: dict[str, ColumnElement[float]] = {
        "edits": one, "busy": real(table.busy_us), "cells": all_cells, "document": real(table.document_us),
        "prompt": real(table.prompt_us), "step left": whole - tokens, "finish left": all_cells - cells,
    }  # fmt: skip
    lines = {"step": (steps, tokens, real(table.step_us)), "finish": (one, cells, real(table.finish_us))}
    for line, (k, x, y) in lines.items():
        named = {"k": k, "x": x, "y": y}
        terms |= {f"{line} {pair}": named[pair[0]] * named[pair[1]] for pair in PAIRS}
    return terms


def _split(of: Seen, result: bool, document: bool, prompt: bool, encoded: bool, read: bool) -> Seen:
    """Sums over edits that are alike in what they found, a finished result, their document, their prompt, and in whether they
    took time for the last two: with what they say of making and finding such.
    """
    if result:
        return {"edits": of["edits"], "busy": of["busy"]}
    told = {**of, "computed": of["edits"], "computed time": of["busy"]}
    told |= {"found cells": of["cells"]} if document else {}
    told |= {"made cells": of["cells"], "document time": of["document"]} if encoded and not document else {}
    told |= {"found prompts": of["edits"]} if prompt else {}
    told |= {"made prompts": of["edits"], "prompt time": of["prompt"]} if read and not prompt else {}
    return told


def _seen(ledger: Ledger, since: float, until: float) -> dict[tuple[str, str, str, float | None], Seen]:
    """Of the edits of one model, device, tenant and price each. What they found is told apart by grouping: a condition in each
    of so many sums takes a database longer.
    """
    table, terms, none = edits.c, _terms(), literal_column("0", Integer)
    keys = (table.model, table.device, table.tenant, table.price)
    kinds = (table.result_hit, table.document_hit, table.prompt_hit, table.document_us > none, table.prompt_us > none)
    query = select(*keys, *kinds, *(func.coalesce(func.sum(term), 0.0) for term in terms.values())).where(
        table.status == "succeeded", table.time >= int(since * 1000), table.time < int(until * 1000)
    )
    found: dict[tuple[str, str, str, float | None], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    with ledger.begin() as connection:
        for row in connection.execute(query.group_by(*keys, *kinds)):
            of = dict(zip(terms, map(float, row[len(keys) + len(kinds) :]), strict=True))
            _add(found[row[0], row[1], row[2], row[3]], _split(of, *map(bool, row[len(keys) : len(keys) + len(kinds)])))
    return dict(found)


def _add(to: dict[str, float], seen: Seen) -> None:
    for name, value in seen.items():
        to[name] += value
