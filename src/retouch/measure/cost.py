"""`retouch cost`: what the served edits took and cost, from the ledger, by tenant, model, stage or day."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from retouch import config
from retouch.edit import InvalidOption
from retouch.ledger import Ledger, sums
from retouch.ledger.sums import Held, Sum
from retouch.measure import cost_causes, cost_records, cost_said
from retouch.measure.cost_said import COLUMNS, MILLION, iso, moment, said, shown

BY = ("tenant", "model", "stage", "day", cost_causes.CAUSE)
ONLY = ("model", "tenant")
SINCE = "7d"


@dataclass(frozen=True, slots=True)
class Books:
    """A time of the ledger: rows by what was asked for, their total, and the devices that were held. `hours` are theirs.

    `only` is what the edits were asked to be, a column -> its value.
    """

    since: float
    until: float
    by: str
    rows: dict[str, Sum]
    total: Sum
    devices: list[Held]
    hours: float | None
    only: Mapping[str, str] = field(default_factory=dict)

    @property
    def busy(self) -> float:
        """Hours."""
        return self.total.busy_us / 1e6 / 3600


def main(argv: Sequence[str] | None = None) -> int:
    """Raises InvalidOption, InvalidLedger, LedgerAway."""
    args = _parser().parse_args(argv)
    now = time.time()
    since = moment("--since", args.since or SINCE, now)
    until = now + 1 if args.until is None else moment("--until", args.until, now)
    _check(args, since, until)
    before = None if args.forget_before is None else moment("--forget-before", args.forget_before, now)
    address = str(config.ledger_file()) if args.ledger is None else args.ledger
    if before is not None:
        forget(address, before)
    if args.take is not None:
        cost_records.take(address, args.take)
    form = "json" if args.json else "csv" if args.csv else ""
    if args.records is not None:
        cost_records.tell(address, args.records, -math.inf if args.since is None else since, until, form)
        return 0
    only = {name: value for name in ONLY if (value := getattr(args, name)) is not None}
    if args.by == cost_causes.CAUSE:
        cost_causes.tell(address, since, until, only, form)
        return 0
    with Ledger(address) as ledger:
        books, where = read(ledger, args.by or BY[0], since, until, args.held, only), str(ledger)
    if form == "json":
        cost_said.put_json(as_json(books))
    elif form == "csv":
        columns = row("", books.total, books.by)
        cost_said.put_csv(columns, (row(name, one, books.by) for name, one in books.rows.items()))
    else:
        show(books, where)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("retouch cost", "retouch cost [options]", __doc__, allow_abbrev=False)
    add, when = parser.add_argument, "WHEN"
    add("--since", metavar=when, help=f"7d, 12h, 30m ago, or a date such as 2026-11-01 in UTC ({SINCE}; with --records all)")
    add("--until", metavar=when, help="the same; up to now without it")
    add("--by", choices=BY, help=f"what a row is; days are those of UTC ({BY[0]})")
    add("--model", metavar="NAME", help="only the edits by this model, or filter (all)")
    add("--tenant", metavar="NAME", help="only the edits of this tenant (all)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="rows for a spreadsheet, without the total")
    form.add_argument("--json", action="store_true", help="all of it")
    add("--ledger", metavar="ADDRESS", help="a file or an SQLAlchemy URL (the file in the data folder)")
    add("--held", type=float, metavar="HOURS", help="that devices were held, where the ledger does not know (or not all)")
    add("--take", type=Path, metavar="FILE", help="first bring in the Records of a bench, as JSON lines")
    add("--records", nargs="?", const="", metavar="SUITE", help="list the benchmark rows instead, of one suite or all")
    add("--forget-before", metavar=when, help="first remove the edits that ended, and the benchmark rows from, before that")
    return parser


def _check(args: argparse.Namespace, since: float, until: float) -> None:
    """Raises InvalidOption."""
    if since >= until:
        said = "now" if args.until is None else f"--until {args.until}"
        raise InvalidOption(f"--since {args.since or SINCE} is not before {said}.")
    if args.held is not None and not (math.isfinite(args.held) and args.held > 0):
        raise InvalidOption(f"--held is {args.held}; give the hours that devices were held, above 0.")
    if args.records is not None:
        for name in ("by", *ONLY, "held"):
            if getattr(args, name) is not None:
                raise InvalidOption(f"--{name} is of edits; leave it out, or leave out --records.")
    if args.by == cost_causes.CAUSE and args.held is not None:
        raise InvalidOption("--held is of what held devices cost, and causes save device time; leave it out.")


def forget(address: str, before: float) -> None:
    """Remove what ended, or was measured, earlier, from a ledger that is there."""
    with Ledger(address):  # which refuses to begin one
        pass
    with Ledger(address, write=True) as ledger:
        edits, records = ledger.forget(before)
        gone = f"{edits:,} edits that ended before {said(before)}, and {records:,} benchmark records from before it,"
        print(f"retouch: {gone} were removed from {ledger}.", file=sys.stderr)


def read(
    ledger: Ledger, by: str, since: float, until: float, hours: float | None = None, only: Mapping[str, str] | None = None
) -> Books:
    """`hours` are those that devices were held, in place of the ledger's leases. With `only`, what held devices cost is still
    shared by all edits, and the rows have their own part of it.
    """
    groups, devices = sums.by(ledger, by, since, until, only), sums.held(ledger, since, until)
    idle = not groups
    cost = None
    if hours is None:
        cost = sums.share_out(groups, devices)
        hours = sum(one.seconds for one in devices) / 3600 if devices else None
    else:
        every = [one for group in groups.values() for one in group.values()]
        whole = sums.joined(every)
        if whole.priced_us:
            sums.charge(every, hours * 3600 * whole.nanodollars / 1e9 / (whole.priced_us / 1e6))
    asked = {name: group for name, group in groups.items() if name is not None}
    rows = {_named(by, name): sums.joined(group.values()) for name, group in sorted(asked.items(), key=_order(by))}
    total = sums.joined(rows.values())
    if idle:
        total.held = cost
    return Books(since, until, by, _by_stage(total) if by == "stage" else rows, total, devices, hours, only or {})


def _order(by: str) -> Any:
    """Days in turn, all else by device time."""
    if by == "day":
        return lambda item: int(item[0])
    return lambda item: (-sum(one.busy_us for one in item[1].values()), item[0])


def _named(by: str, name: str) -> str:
    return datetime.fromtimestamp(int(name) * 86_400, UTC).date().isoformat() if by == "day" else name


def _by_stage(total: Sum) -> dict[str, Sum]:
    """Each stage's part of all edits: what a row has per million edits adds up to the total's."""
    rows = {}
    for stage, busy in total.stages.items():
        if busy:
            held = None if total.held is None else total.held * busy / total.busy_us
            rows[stage] = Sum(
                total.edits, total.failed, total.cancelled, total.unpriced, busy,
                nanodollars=round(total.stage_dollars[stage] * 1e9), held=held,
            )  # fmt: skip
    return rows


def row(name: str, one: Sum, by: str) -> dict[str, Any]:
    """Flat, for CSV and JSON. None: not known, or nothing to divide by. Hits are shares of the edits that could have any."""
    priced, looked, dollars = one.edits - one.unpriced, one.edits - one.result_hits, one.nanodollars / 1e9
    held = None if one.held is None else _over(one.held * MILLION, one.edits)
    flat: dict[str, Any] = {
        by: name, "edits": one.edits, "unpriced": one.unpriced, "device_seconds": one.busy_us / 1e6,
        "dollars": dollars if priced or not one.edits else None,
        "dollars_per_million": _over(dollars * MILLION, priced), "held_dollars": one.held, "held_dollars_per_million": held,
    }  # fmt: skip
    if by != "stage":
        flat |= {
            "tokens_computed": one.tokens_computed, "tokens_whole": one.tokens_whole,
            "tokens_saved": _over(one.tokens_whole - one.tokens_computed, one.tokens_whole),
            "document_hits": _over(one.document_hits, looked), "prompt_hits": _over(one.prompt_hits, looked),
            "result_hits": _over(one.result_hits, one.edits), "failed": one.failed, "cancelled": one.cancelled,
        }  # fmt: skip
    return flat


def _over(a: float, b: float) -> float | None:
    return a / b if b else None


def as_json(books: Books) -> dict[str, Any]:
    total = row("", books.total, books.by)
    del total[books.by]
    return {
        "since": iso(books.since), "until": iso(books.until), "by": books.by, "only": dict(books.only),
        "rows": [row(name, one, books.by) for name, one in books.rows.items()], "total": total,
        "busy_hours": books.busy, "held_hours": books.hours,
        "prices": [{"device": device, "per_hour": price, "source": source} for device, price, source in _prices(books)],
    }  # fmt: skip


def _prices(books: Books) -> list[tuple[str, float | None, str]]:
    """Each device's, once."""
    return list(dict.fromkeys((one.device, one.price, one.source) for one in books.devices))


def show(books: Books, where: str) -> None:
    """The table, and what has to be known to read it."""
    from rich.table import Table
    from rich.text import Text

    console = cost_said.console()
    known = row("", books.total, books.by)
    names = [name for name in COLUMNS if name in known]
    table = Table(box=None, pad_edge=False, show_footer=True)
    table.add_column(books.by, "total", overflow="fold")
    for name in names:
        table.add_column(COLUMNS[name], shown(name, known[name]), justify="right")
    for label, one in books.rows.items():
        values = row(label, one, books.by)
        printed = label if label.isprintable() else repr(label)
        table.add_row(Text(printed or "(no key)"), *(shown(name, values[name]) for name in names))
    console.print(table if books.rows else cost_said.nothing(books.only, books.since, books.until, where))
    for note in notes(books):
        console.print(note, soft_wrap=True)


def notes(books: Books) -> list[str]:
    found, total = [], books.total
    if books.hours:
        busy = "busy with these edits" if books.only else "busy"
        found.append(f"held {_time(books.hours)}, {busy} {_time(books.busy)} ({books.busy / books.hours:.0%})")
    if books.hours and total.held is None:
        found.append("What held devices cost is not known: none has a price.")
    for device, price, source in _prices(books):
        known = "no price is known" if price is None else f"${price:,g} an hour, {source}"
        found.append(f"{device or 'a device without a name'}: {known}")
    if total.unpriced:
        found.append(cost_said.unpriced(total.unpriced, total.edits))
    if total.failed or total.cancelled:
        ended = f"{total.failed:,} failed and {total.cancelled:,} cancelled edits"
        found.append(f"The device time of {ended} is not known; it is in what held devices cost.")
    return found


def _time(hours: float) -> str:
    return f"{hours:,.2f} h" if hours >= 1 else f"{60 * hours:.1f} min"
