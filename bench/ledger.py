"""What the books take from the server, and how soon they answer: `python bench/ledger.py`.

  lost     a loop in Python that never rests stands for the server: so many milliseconds of work an edit (an answer takes the
           server more), with an entry of the ledger for each and without, in turns of a second; beside it runs the writer
  write    rows a second where nothing else happens
  query    the sums of `retouch cost` over all rows, by tenant, model, day and stage

In a ledger of its own, SQLite unless --ledger names another database (its rows stay there). Rows are added to
results/ledger.jsonl; targets are printed beside the figures.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from retouch import record
from retouch.ledger import Entry, Lease, Ledger, Writer, address_of, sums
from retouch.ledger.writer import EVERY
from retouch.record import Record
from timing import Spread

ROOT = Path(__file__).parent.parent
SUITE = "ledger"
DAYS, TENANTS, MODELS = 30, 20, ("retouch-mini", "flux.2-klein-4b", "flux.2-klein-9b")
SECONDS = {"document": 0.0031, "prompt": 0.0004, "start": 0.0007, "step": 0.117, "preview": 0.0, "finish": 0.05}
REPEATS, GIVEN = 7, 500
"""Of each query; rows that are handed over to see what that takes."""


def entry(number: int, lease: str) -> Entry:
    """As `serve/books.py` makes them; the times are spread over a month."""
    return Entry(
        run=f"job_{secrets.token_hex(12)}", part=0, time=time.time() - number * 7919 % (DAYS * 86_400),
        tenant=f"tenant-{number % TENANTS}", model=MODELS[number % len(MODELS)], device="AMD EPYC", latency=0.17, steps=4,
        seconds=dict(SECONDS), tokens_computed=400 + number % 100, tokens_whole=4096, cache_hits=("document", "prompt"),
        price=1.2, dollars=sum(SECONDS.values()) * 1.2 / 3600, version="0.1.0", commit="0" * 40, lease=lease,
    )  # fmt: skip


class Loop:
    """The server's stand-in: `work` seconds of arithmetic an edit, counted in turns of a loop, so that waiting is not work."""

    def __init__(self, work: float) -> None:
        self.turns = 1000
        while (took := min(self._timed(self.turns) for _ in range(5))) < work:
            self.turns = max(self.turns + 1, int(self.turns * min(2.0, 1.02 * work / took)))

    def edit(self) -> None:
        self._spin(self.turns)

    def _timed(self, turns: int) -> float:
        started = time.perf_counter()
        self._spin(turns)
        return time.perf_counter() - started

    @staticmethod
    def _spin(turns: int) -> int:
        value = 0
        for turn in range(turns):
            value ^= turn
        return value


class Bench:
    """The figures, in the order in which they are measured."""

    def __init__(self, address: str, edits: int, work: float) -> None:
        self.address, self.edits, self.work = address, edits, work
        self.found: list[tuple[str, Spread, str, float | None]] = []

    def add(self, name: str, values: Sequence[float], unit: str, target: float | None = None) -> None:
        self.found.append((name, Spread.of(list(values)), unit, target))

    def lost(self) -> None:
        """Pairs of about a second, since a machine is not the same for long: with books until the writer has written twice, so
        that what was taken is written within the time that counts, and as many edits without.
        """
        loop, writer = Loop(self.work), Writer(self.address, Lease("AMD EPYC", MODELS[0], 1.2, "bench"))
        assert writer.lease is not None
        lease, number, rates, shares, count = writer.lease.id, 0, ([], []), [], int(2 * EVERY / self.work)
        while not writer.written:  # what is done once is not a row's
            writer.add(entry(number := number + 1, lease))
            _drained(writer)
        clock = time.pthread_getcpuclockid(writer._thread.ident or 0)
        already, first = time.clock_gettime(clock), number

        def book() -> None:
            nonlocal number
            number += 1
            writer.add(entry(number, lease))

        while number - first < self.edits:
            for kept in (False, True) if len(shares) % 2 else (True, False):
                started = time.perf_counter()
                if kept:
                    count = _until_written(writer, loop, book)
                else:
                    for _ in range(count):
                        loop.edit()
                rates[kept].append(count / (time.perf_counter() - started))
                _drained(writer)
            shares.append(1 - rates[True][-1] / rates[False][-1])
        written = (time.clock_gettime(clock) - already) / (number - first)
        given = self._given(book)
        writer.close(60)
        if writer.dropped or writer.written != number:
            raise RuntimeError(f"{writer.written} of {number} rows were written, {writer.dropped} dropped")
        self.add("edits without books", rates[False], "1/s")
        self.add("edits with books", rates[True], "1/s")
        self.add("throughput lost to books", shares, "1", 0.01)
        self.add("processor time a row, writer's thread", [written], "s")
        self.add("processor time a row, made and handed over", given, "s")
        self.add("the two over the work of an edit", [(written + one) / self.work for one in given], "1", 0.01)

    @staticmethod
    def _given(book: Callable[[], None]) -> list[float]:
        seconds = []
        for _ in range(REPEATS):
            started = time.thread_time()
            for _ in range(GIVEN):
                book()
            seconds.append((time.thread_time() - started) / GIVEN)
        return seconds

    def write(self) -> None:
        """All rows at once, from rows that are made."""
        rates = []
        for _ in range(3):
            rows = [entry(number, "bench") for number in range(self.edits)]
            writer = Writer(self.address, most=len(rows), every=0.01)
            started = time.perf_counter()
            for row in rows:
                writer.add(row)
            writer.close(600)
            rates.append(writer.written / (time.perf_counter() - started))
        self.add("rows written at once", rates, "1/s")

    def query(self) -> None:
        with Ledger(self.address) as ledger:
            for key in ("tenant", "model", "day", "stage"):
                seconds = []
                for _ in range(REPEATS):
                    started = time.perf_counter()
                    found = sums.by(ledger, key, 0.0, time.time() + 1)
                    seconds.append(time.perf_counter() - started)
                rows = sum(one.edits for group in found.values() for one in group.values())
                self.add(f"sums of {rows:,} rows by {key}", seconds, "s", 1.0)
            seconds = []
            for _ in range(REPEATS):
                started = time.perf_counter()
                sums.by(ledger, "tenant", time.time() - 86_400, time.time() + 1)
                seconds.append(time.perf_counter() - started)
            self.add("sums of a day by tenant", seconds, "s", 1.0)


def _until_written(writer: Writer, loop: Loop, book: Callable[[], None]) -> int:
    """Edits until the writer has written twice."""
    count = turns = 0
    before = writer.written
    while turns < 2:
        loop.edit()
        book()
        count += 1
        if writer.written != before:
            turns, before = turns + 1, writer.written
    return count


def _drained(writer: Writer) -> None:
    while writer.waiting:
        time.sleep(EVERY / 5)


def table_of(bench: Bench, where: dict[str, Any], database: str) -> Table:
    table = Table(title=f"ledger, {database}, {where['device']}, {1e3 * bench.work:g} ms of work an edit", title_justify="left")
    for name in ("figure", "median", "p10 - p90", "n", "target"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for name, spread, unit, target in bench.found:
        micro = unit == "s" and spread.median < 1e-3
        scale, shown = (1e6, "µs") if micro else (1e3, "ms") if unit == "s" else (100, "%") if unit == "1" else (1, unit)
        values = [f"{scale * value:,.2f}" for value in (spread.median, spread.low, spread.high)]
        wanted = ""
        if target is not None:
            wanted = f"[{'green' if spread.median <= target else 'red'}]<= {scale * target:g} {shown}"
        table.add_row(name, f"{values[0]} {shown}", f"{values[1]} - {values[2]}", str(spread.n), wanted)
    return table


def rows_of(bench: Bench, where: dict[str, Any], database: str) -> list[Record]:
    extra = {"database": database, "edits": bench.edits, "work": bench.work}
    return [
        Record(SUITE, name, s.median, unit, s.low, s.high, s.n, **where, extra={**extra, "target": target})
        for name, s, unit, target in bench.found
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=100_000, help="rows to write beside the loop (%(default)s)")
    parser.add_argument("--work", type=float, default=4.0, metavar="MS", help="of the loop, an edit (%(default)s)")
    parser.add_argument("--ledger", metavar="ADDRESS", help="(an SQLite file that is removed again)")
    parser.add_argument("--quick", action="store_true", help="2,000 edits: a smoke test")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "ledger.jsonl", help="rows are added (%(default)s)")
    args = parser.parse_args(argv)
    edits = 2000 if args.quick else args.edits
    console = Console(width=None if sys.stdout.isatty() else 120)
    with TemporaryDirectory() as folder:
        address = args.ledger or str(Path(folder) / "ledger.sqlite")
        database = address_of(address).get_backend_name()
        bench = Bench(address, edits, args.work / 1e3)
        with console.status("a loop with books and without, in turn"):
            bench.lost()
        with console.status("queries"):
            bench.query()
        with console.status("rows at once"):
            bench.write()
    where = record.environment()
    console.print(table_of(bench, where, database))
    record.append(args.out, rows_of(bench, where, database))
    console.print(f"rows in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
