"""The benchmark rows of the books: brought in from a file, and listed (`retouch cost --take`, `--records`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retouch import record
from retouch.ledger import Ledger
from retouch.ledger.tables import moment_of
from retouch.measure import cost_said
from retouch.record import Record

COLUMNS = ("suite", "name", "of", "value", "unit", "error", "device", "commit", "date")
"""`of`: the subject, path or target that was measured."""

WHOSE = ("subject", "path", "target")


def take(address: str, path: Path) -> None:
    """Bring in the Records of a file, but for those that are in the books already. Raises RetouchError where it is none."""
    rows = record.read(path)
    with Ledger(address, write=True) as ledger:
        new = ledger.absent(rows)
        ledger.add(new)
        print(f"retouch: {len(new):,} of {len(rows):,} records of {path} were new to {ledger}.", file=sys.stderr)


def tell(address: str, suite: str, since: float, until: float, form: str) -> None:
    """Those of a suite, "": of all, in the order in which they were written; those without a date are of any time. `form` is
    "json", "csv" or "" for a table. Raises InvalidLedger, LedgerAway.
    """
    with Ledger(address) as ledger:
        rows = [_flat(row) for row in ledger.records() if suite in ("", row.suite) and _within(row, since, until)]
        where = str(ledger)
    if form == "json":
        cost_said.put_json({"suite": suite or None, "rows": rows})
    elif form == "csv":
        cost_said.put_csv(COLUMNS, rows)
    else:
        _show(rows, suite, where)


def _within(row: Record, since: float, until: float) -> bool:
    made = moment_of(row.date)
    return made is None or since <= made < until


def _flat(row: Record) -> dict[str, Any]:
    of = next((row.extra[name] for name in WHOSE if name in row.extra), "")
    return {name: of if name == "of" else getattr(row, name) for name in COLUMNS}


def _show(rows: Sequence[dict[str, Any]], suite: str, where: str) -> None:
    from rich.table import Table

    shown = [name for name in COLUMNS if name not in ("unit", "error")]
    table = Table(*shown, box=None, pad_edge=False)
    for row in rows:
        value = f"ERROR {row['error']}" if row["value"] is None else f"{row['value']:.6g} {row['unit']}".strip()
        cells = {**row, "value": value, "commit": row["commit"][:10]}
        table.add_row(*(str(cells[name]) for name in shown))
    of = f" of the suite {suite!r}" if suite else ""
    cost_said.console().print(table if rows else f"no benchmark records{of} in {where}")
