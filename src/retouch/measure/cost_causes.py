"""`retouch cost --by cause`: what the served edits would have taken without what they were spared, cause by cause."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping
from typing import Any

from retouch.ledger import Ledger, spared
from retouch.ledger.spared import Spared
from retouch.measure.cost_said import iso, said, shown

CAUSE = "cause"
MILLION = 1e6
SPENT, WITHOUT = "spent", "without any of it"
NAMES = {
    "mask": "cells outside the mask", "documents": "documents found", "prompts": "prompts found", "results": "results found",
}  # fmt: skip
"""Of the causes, as the table has them."""

HEADINGS = {"device_seconds": "device s", "dollars": "$", "dollars_per_million": "$/M", "share": "of all"}


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
        print(json.dumps(told, ensure_ascii=False, indent=2))
    elif form == "csv":
        writer = csv.DictWriter(sys.stdout, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines[:-1])
    else:
        _show(found, lines, only, f"from {said(since)} to {said(until)} in {where}")


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


def _show(found: Spared, lines: list[dict[str, Any]], only: Mapping[str, str], when: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)
    if not found.edits:
        which = "".join(f" of {name} {value!r}" for name, value in only.items())
        console.print(f"no edits{which} {when}", soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, show_footer=True)
    table.add_column(CAUSE, lines[-1][CAUSE])
    for name, heading in HEADINGS.items():
        table.add_column(heading, shown(name, lines[-1][name]), justify="right")
    for line in lines[:-1]:
        table.add_row(NAMES.get(line[CAUSE], line[CAUSE]), *(shown(name, line[name]) for name in HEADINGS))
    console.print(table)
    notes = [
        f"{found.edits:,} edits {when}. What was saved is an estimate from what these took.",
        "Shared and compiled steps are not in it: `retouch bench` measures them.",
    ]
    if found.unknown:
        names = ", ".join(NAMES[cause] for cause in found.unknown)
        notes.append(f"More was saved than the table says: nothing in this time shows what some of it is worth ({names}).")
    if found.unpriced:
        notes.append(f"{found.unpriced:,} edits have no price and are not in the dollars: serve with --prices.")
    for note in notes:
        console.print(note, soft_wrap=True)
