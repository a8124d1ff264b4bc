"""Does every request have its one answer while the worker is killed again and again? `python bench/chaos.py`.

    python bench/chaos.py --edits 2000 --kills 12 --seed 0 --concurrency 24

Edits of all sorts go to a server of its own. Some clients go away, some delete their jobs, some ask for what cannot be; every
fourth kill strikes the next process too, while it loads. Each picture that comes back is compared with the same edit run alone
in this process. Rows are added to results/chaos.jsonl; "lost" and "answered twice" have to be 0.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from asks import asks
from live import server
from retouch import record
from retouch.edit import InvalidOption, RetouchError
from retouch.engine import Engine, load
from retouch.record import Record
from storm import TOLERANCE, Outcome, Storm, difference, settled

ROOT = Path(__file__).parent.parent
SUITE = "chaos"


@dataclass(slots=True)
class Report:
    """What has become of all requests. `stats` are the server's at the end, `apart` the largest difference by format."""

    outcomes: list[Outcome]
    kills: int
    stats: dict[str, Any]
    seconds: float
    apart: dict[str, int] = field(default_factory=dict)

    def count(self, *ends: str) -> int:
        return sum(outcome.end in ends for outcome in self.outcomes)

    @property
    def errors(self) -> dict[str, int]:
        """Requests by the code of the error that they were answered with."""
        codes = Counter(outcome.end for outcome in self.outcomes if outcome.end not in ("succeeded", "left", "lost"))
        return dict(sorted(codes.items()))

    @property
    def twice(self) -> int:
        return sum(outcome.extra for outcome in self.outcomes)

    @property
    def faults(self) -> list[str]:
        """What may not be, in words."""
        faults = [f"{o.ask.way} {o.ask.number}: lost ({o.why})" for o in self.outcomes if o.end == "lost"]
        faults += [f"{o.ask.way} {o.ask.number}: answered twice" for o in self.outcomes if o.extra]
        faults += [f"{o.ask.way} {o.ask.number}: {o.why}" for o in self.outcomes if o.end == "internal_error"]
        wrong = [o for o in self.outcomes if o.ask.way == "wrong"]
        faults += [f"{o.ask.way} {o.ask.number}: {o.end}" for o in wrong if o.end != "invalid_mask"]
        faults += [f"{form} differs by {by} levels" for form, by in self.apart.items() if by > TOLERANCE[form]]
        asked = sum(len(o.ask.edits) for o in self.outcomes)
        counted = sum(self.stats["edits"][status] for status in ("succeeded", "failed", "cancelled"))
        return faults + [f"the server has ended {counted} edits of {asked}"] * (counted > asked)

    def rows(self) -> list[tuple[str, float, str]]:
        """(name, value, unit), as they are kept."""
        answered = len(self.outcomes) - self.count("left", "lost")
        rows = [("requests", len(self.outcomes), "requests"), ("answered", answered, "requests")]
        rows += [("succeeded", self.count("succeeded"), "requests"), ("cancelled", self.count("left"), "requests")]
        rows += [(f"error {code}", count, "requests") for code, count in self.errors.items()]
        rows += [("lost", self.count("lost"), "requests"), ("answered twice", self.twice, "pictures")]
        rows += [("worker kills", self.kills, "processes"), ("worker restarts", self.stats["restarts"], "processes")]
        rows += [(f"largest difference, {form}", by, "levels") for form, by in sorted(self.apart.items())]
        return [*rows, ("time", round(self.seconds, 1), "s")]


def storm(address: str, edits: int, kills: int, seed: int, concurrency: int, show: Progress) -> Report:
    """Send them all, and wait for the server to come to rest."""
    requests, began = asks(edits, seed), time.perf_counter()
    task = show.add_task("asking", total=edits)
    sent = Storm(address, concurrency, lambda outcome: show.advance(task, len(outcome.ask.edits)))
    outcomes = sent.run(requests, kills)
    return Report(outcomes, sent.kills, settled(address), time.perf_counter() - began)


def compare(report: Report, engine: Engine, show: Progress) -> None:
    """Against the same edits, one by one."""
    succeeded = [outcome for outcome in report.outcomes if outcome.end == "succeeded"]
    for outcome in show.track(succeeded, description="comparing"):
        form = outcome.ask.form
        report.apart[form] = max(report.apart.get(form, 0), difference(engine, outcome))


def table_of(report: Report) -> Table:
    table = Table(title="chaos", show_header=False)
    for name, value, unit in report.rows():
        table.add_row(name, f"{value:,}", unit)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=2000, help="in all (%(default)s)")
    parser.add_argument("--kills", type=int, default=12, help="of the worker's process, evenly spread (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=24, help="requests at once (%(default)s)")
    parser.add_argument("--beside", type=int, default=0, help="the server's threads beside its step loop (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "chaos.jsonl", help="rows are added (%(default)s)")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    try:
        if min(args.edits, args.concurrency) < 1 or args.kills < 0 or args.beside < 0:
            raise InvalidOption("give at least one edit and one request at once, and no negative numbers.")
        engine = load(dtype="float32", beside=0)
        with Progress(*columns, console=console) as show, TemporaryDirectory() as cache:
            options = ("--dtype", "float32", "--cache", cache, "--beside", str(args.beside))
            with server(*options) as address:
                report = storm(address, args.edits, args.kills, args.seed, args.concurrency, show)
            compare(report, engine, show)
    except RetouchError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    console.print(table_of(report))
    for fault in report.faults:
        console.print(f"[red]{fault}[/red]")
    where = record.environment("", "float32", torch.get_num_threads())
    asked = {name: getattr(args, name) for name in ("edits", "kills", "seed", "concurrency", "beside")}
    rows = [Record(SUITE, name, value, unit, **where, extra=asked) for name, value, unit in report.rows()]
    record.append(args.out, rows)
    console.print(f"rows in {args.out}")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
