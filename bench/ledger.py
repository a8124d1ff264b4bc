"""What the books take from the server, and how soon they answer: `python bench/ledger.py`.

  lost     a loop in Python that never rests stands for the server: so many milliseconds of work an edit (an answer takes the
           server more), and a row of the ledger for each, which the writer's thread writes beside it
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

import numpy as np
from rich.console import Console
from rich.table import Table

from retouch import record
from retouch.ledger import Entry, Lease, Ledger, Writer, address_of, sums
from retouch.ledger.spared import by_cause
from retouch.ledger.writer import EVERY
from retouch.record import Record
from timing import Spread

ROOT = Path(__file__).parent.parent
SUITE = "ledger"
DAYS, TENANTS, MODELS = 30, 20, ("retouch-mini", "flux.2-klein-4b", "flux.2-klein-9b")
SECONDS = {"document": 0.0031, "prompt": 0.0004, "start": 0.0007, "step": 0.117, "preview": 0.0, "finish": 0.05}
REPEATS = 7
"""Of each query."""


def entry(number: int, lease: str) -> Entry:
    """As `serve/books.py` makes them; the times are spread over a month."""
    return Entry(
        run=f"job_{secrets.token_hex(12)}", part=0, time=time.time() - number * 7919 % (DAYS * 86_400),
        tenant=f"tenant-{number % TENANTS}", model=MODELS[number % len(MODELS)], device="AMD EPYC", latency=0.17, steps=4,
        seconds=dict(SECONDS), tokens_computed=400 + number % 100, tokens_whole=4096, cache_hits=("document", "prompt"),
        price=1.2, dollars=sum(SECONDS.values()) * 1.2 / 3600, version="0.1.0", commit="0" * 40, lease=lease,
    )  # fmt: skip


class Loop:
    """The server's stand-in: `work` seconds of arithmetic an edit, counted in turns of a loop, so that waiting is not work.

    It makes no objects: with those, its speed hangs by several percent on what the allocator was last asked for.
    """

    def __init__(self, work: float) -> None:
        turns = 1000
        while (took := min(self._timed(turns) for _ in range(5))) < work:
            turns = max(turns + 1, int(turns * min(2.0, 1.02 * work / took)))

    def edit(self) -> None:
        value = 0
        for turn in self.turns:
            value ^= turn

    def _timed(self, turns: int) -> float:
        self.turns = bytes(range(256)) * (turns // 256 + 1)
        started = time.perf_counter()
        self.edit()
        return time.perf_counter() - started


Timed = tuple[float, float, float]
"""When an edit's work began and ended, and when its row was handed over."""


class Watched(Writer):
    """Notes when it is at work. `already` is the processor time that its thread took to open the ledger."""

    lease: Lease

    def __init__(self, address: str) -> None:
        self.spans: list[tuple[float, float]] = []
        super().__init__(address, Lease("AMD EPYC", MODELS[0], 1.2, "bench"))
        while not self.spans:
            time.sleep(EVERY / 5)
        self.already = time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident or 0))

    def _turn(self) -> None:
        started = time.perf_counter()
        super()._turn()
        self.spans.append((started, time.perf_counter()))


class Bench:
    """The figures, in the order in which they are measured."""

    def __init__(self, address: str, edits: int, work: float) -> None:
        self.address, self.edits, self.work = address, edits, work
        self.found: list[tuple[str, Spread, str, float | None]] = []

    def add(self, name: str, values: Sequence[float], unit: str, target: float | None = None) -> None:
        self.found.append((name, Spread.of(list(values)), unit, target))

    def lost(self) -> None:
        """Of each second: what making and handing over the rows took, and by how much longer those edits were beside which the
        writer wrote. It is counted, not compared with a loop without books: where a machine is shared, the same loop's speed
        differs by several percent from one second to the next.
        """
        loop, writer = Loop(self.work), Watched(self.address)
        edits: list[tuple[float, float, float]] = []
        for number in range(self.edits):
            started = time.perf_counter()
            loop.edit()
            worked = time.perf_counter()
            writer.add(entry(number, writer.lease.id))
            edits.append((started, worked, time.perf_counter()))
        clock = time.pthread_getcpuclockid(writer._thread.ident or 0)
        taken = time.clock_gettime(clock) - writer.already
        writer.close(60)
        if writer.dropped or writer.written != self.edits:
            raise RuntimeError(f"{writer.written} of {self.edits} rows were written, {writer.dropped} dropped")
        seconds = _seconds(edits, writer.spans)
        self.add("edits", [len(second) / (second[-1][2] - second[0][0]) for second, _ in seconds], "1/s")
        self.add("an edit's row, made and handed over", [end - worked for _, worked, end in edits], "s")
        self.add("an edit's row, processor time of the writer", [taken / self.edits], "s")
        self.add("throughput lost to books", [_lost(second, beside) for second, beside in seconds], "1", 0.01)

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
                found = sums.by(ledger, key, 0.0, time.time() + 1)
                rows = sum(one.edits for group in found.values() for one in group.values())
                seconds = _repeated(lambda key=key: sums.by(ledger, key, 0.0, time.time() + 1))
                self.add(f"sums of {rows:,} rows by {key}", seconds, "s", 1.0)
            day = time.time() - 86_400
            self.add("sums of a day by tenant", _repeated(lambda: sums.by(ledger, "tenant", day, time.time() + 1)), "s", 1.0)
            spared = _repeated(lambda: by_cause(ledger, 0.0, time.time() + 1))
            self.add("what all rows were spared, by cause", spared, "s", 1.0)


def _repeated(ask: Callable[[], Any]) -> list[float]:
    """Seconds of each time."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        ask()
        seconds.append(time.perf_counter() - started)
    return seconds


def _seconds(edits: list[Timed], spans: list[tuple[float, float]]) -> list[tuple[list[Timed], list[bool]]]:
    """The edits of each whole second, and beside which of them the writer was at work."""
    found: list[tuple[list[Timed], list[bool]]] = []
    turn, second = 0, -1
    for one in edits:
        while turn < len(spans) and spans[turn][1] <= one[0]:
            turn += 1
        if int(one[0] - edits[0][0]) != second:
            second += 1
            found.append(([], []))
        found[-1][0].append(one)
        found[-1][1].append(turn < len(spans) and spans[turn][0] < one[2])
    return found[:-1] or found


def _lost(second: list[Timed], beside: list[bool]) -> float:
    """Share of the time."""
    alone = [worked - started for (started, worked, _), written in zip(second, beside, strict=True) if not written]
    usual = float(np.median(alone)) if alone else 0.0
    handed = sum(end - worked for _, worked, end in second)
    longer = sum(worked - started - usual for (started, worked, _), written in zip(second, beside, strict=True) if written)
    return (handed + longer) / (second[-1][2] - second[0][0])


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
        with console.status("a loop, and the writer beside it"):
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
