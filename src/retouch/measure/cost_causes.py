"""`retouch cost --by cause`: what the served edits would have taken without what they were spared, cause by cause."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retouch.ledger import Ledger, spared
from retouch.ledger.spared import Spared
from retouch.measure import cost_said
from retouch.measure.cost_said import COLUMNS, MILLION, iso, said, shown

CAUSE = "cause"
SPENT, WITHOUT = "spent", "without any of it"
NAMES = {
    "mask": "cells outside the mask", "documents": "documents found", "prompts": "prompts found", "results": "results found",
}  # fmt: skip
"""Of the causes, as the table has them."""


def tell(address: str, since: float, until: float, only: Mapping[str, str], form: str) -> None:
    """`form` is "json", "csv" or "" for a table. Raises InvalidLedger, LedgerAway."""
    with Ledger(address) as ledger:
        found, where = spared.by_cause(ledger, since, until, only), str(ledger)
    lines = rows(found)
    if form == "json":
        told = {
            "since": iso(since), "until": iso(until), "by": CAUSE, "only": dict(only), "edits": found.edits,
            "unpriced": found.unpriced, "rows": lines[:-1], "total": {**lines[-1], CAUSE: None}, "unknown": found.unknown,
        }  # fmt: skip
        cost_said.put_json(told)
    elif form == "csv":
        cost_said.put_csv(lines[0], lines[:-1])
    elif not found.edits:
        cost_said.console().print(cost_said.nothing(only, since, until, where), soft_wrap=True)
    else:
        _show(found, lines, f"from {said(since)} to {said(until)} in {where}")


def rows(found: Spared) -> list[dict[str, Any]]:
    """What was spent, what each cause saved, and last their sum. Dollars are None where no edit has a price."""
    priced = found.edits - found.unpriced
    parts = {SPENT: (found.seconds, found.dollars)}
    parts |= {cause: (seconds, found.saved_dollars[cause]) for cause, seconds in found.saved.items()}
    seconds, dollars = (sum(part[place] for part in parts.values()) for place in (0, 1))
    return [
        {
            CAUSE: cause, "device_seconds": took, "dollars": cost if priced else None,
            "dollars_per_million": cost * MILLION / priced if priced else None, "share": took / seconds if seconds else None,
        }
        for cause, (took, cost) in [*parts.items(), (WITHOUT, (seconds, dollars))]
    ]  # fmt: skip


def _show(found: Spared, lines: list[dict[str, Any]], when: str) -> None:
    from rich.table import Table

    console, total = cost_said.console(), lines[-1]
    names = [name for name in COLUMNS if name in total]
    table = Table(box=None, pad_edge=False, show_footer=True)
    table.add_column(CAUSE, total[CAUSE])
    for name in names:
        table.add_column(COLUMNS[name], shown(name, total[name]), justify="right")
    for line in lines[:-1]:
        table.add_row(NAMES.get(line[CAUSE], line[CAUSE]), *(shown(name, line[name]) for name in names))
    console.print(table)
    notes = [
        f"{found.edits:,} edits {when}. What was saved is an estimate from what these took.",
        "Shared and compiled steps are not in it: `retouch bench` measures them.",
    ]
    if found.unknown:
        causes = ", ".join(NAMES[cause] for cause in found.unknown)
        notes.append(f"More was saved than the table says: nothing in this time shows what some of it is worth ({causes}).")
    if found.unpriced:
        notes.append(cost_said.unpriced(found.unpriced, found.edits))
    for note in notes:
        console.print(note, soft_wrap=True)
