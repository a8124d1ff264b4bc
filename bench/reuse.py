"""What the reuse in a trace is worth: `python bench/reuse.py`.

Nobody publishes how often people ask again for a picture, a mask or a prompt, so the knobs of `retouch trace make` that say so
are guesses. Each is turned here alone, the others as their mix has them: the trace is replayed in a closed loop on an engine in
this process with caches that begin empty, and on one that keeps nothing encoded (`--savings mask,packing`), one after the
other, in rounds. Rows are added to results/reuse.jsonl: device seconds of an edit, and the shares of edits that found their
document and their prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from retouch import record
from retouch.engine import load
from retouch.engine.engine import Engine
from retouch.measure.load import Replay, closed_loop
from retouch.measure.pictures import Pictures
from retouch.measure.plan import Plan, of_trace
from retouch.measure.targets import InProcess, where_of
from retouch.measure.traffic import MIXES, make, turned
from retouch.record import Record
from timing import Spread

ROOT = Path(__file__).parent.parent
SUITE = "reuse"
POINTS: dict[str, tuple[dict[str, Any], ...]] = {
    "personal": (
        {}, {"variations": 1}, {"turns": 1.5}, {"turns": 6.0}, {"commit": 0.0}, {"commit": 0.8},
        {"repeat_prompt": 0.0, "repeat_mask": 0.0}, {"repeat_prompt": 0.5, "repeat_mask": 0.5},
    ),
    "template": (
        {"documents": 4}, {"documents": 16}, {"documents": 1000}, {"documents": 16, "zipf": 0.0},
        {"documents": 16, "zipf": 2.0},
        {"documents": 4, "repeat_prompt": 0.0, "repeat_mask": 0.0}, {"documents": 4, "repeat_prompt": 0.7, "repeat_mask": 0.7},
    ),
}  # fmt: skip
"""Knobs that are turned, by mix. Of `documents` only the ratio to the requests matters: a service's trace is longer."""

REQUESTS = {"personal": 12, "template": 32}
KEPT, BARE = "kept", "nothing kept"


@dataclass(slots=True)
class Point:
    """One setting of the knobs: its plan, and of each engine the device seconds of an edit, a value for each round."""

    mix: str
    knobs: str
    plan: Plan
    seconds: dict[str, list[float]] = field(default_factory=dict)
    documents: float = 0.0
    prompts: float = 0.0

    @property
    def saved(self) -> float:
        """Of the device seconds without caches."""
        kept, bare = (Spread.of(self.seconds[name]).median for name in (KEPT, BARE))
        return 1 - kept / bare


def points(mixes: Sequence[str], seed: int, requests: int | None) -> list[Point]:
    pictures, found = Pictures(), []
    for mix in mixes:
        for given in POINTS[mix]:
            knobs = replace(MIXES[mix], requests=requests or REQUESTS[mix], **given)
            trace = make(mix, seed, knobs, pictures)
            said = " ".join(part for part in turned(mix, trace.knobs).split() if not part.startswith("requests="))
            found.append(Point(mix, said or "as it is", of_trace(trace, pictures)))
    return found


def replayed(engine: Engine, plan: Plan, clients: int) -> Replay:
    async def run() -> Replay:
        async with InProcess(engine) as target:
            return await closed_loop(target, plan, clients)

    replay = asyncio.run(run())
    for answer in replay.answers:
        if answer.error:
            raise RuntimeError(f"a request was not served: {answer.error} {answer.detail}")
    return replay


def measure(point: Point, kept: Engine, bare: Engine, clients: int) -> None:
    for name, engine in ((KEPT, Engine(kept.model)), (BARE, bare)):
        usages = [answer.usage for answer in replayed(engine, point.plan, clients).answers if answer.usage is not None]
        edits = sum(call.n for call in point.plan.calls)
        point.seconds.setdefault(name, []).append(sum(sum(usage.seconds.values()) for usage in usages) / edits)
        if name == KEPT:
            point.documents, point.prompts = (
                sum(usage.cache_hits.count(what) for usage in usages) / edits for what in ("document", "prompt")
            )


def rows_of(found: Sequence[Point], where: dict[str, Any], extra: dict[str, Any]) -> list[Record]:
    rows = []
    for point in found:
        said, n = {**extra, "mix": point.mix, "knobs": point.knobs}, sum(call.n for call in point.plan.calls)
        for name, seconds in point.seconds.items():
            one, more = Spread.of(seconds), {**said, "caches": name}
            rows.append(Record(SUITE, "device seconds an edit", one.median, "s", one.low, one.high, n, **where, extra=more))
        for name, value in (("document", point.documents), ("prompt", point.prompts)):
            rows.append(Record(SUITE, f"edits that found their {name} encoded", value, "1", n=n, **where, extra=said))
        rows.append(Record(SUITE, "saved by what is kept", point.saved, "1", n=n, **where, extra=said))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixes", nargs="+", choices=list(POINTS), default=list(POINTS), help="(all)")
    parser.add_argument("--requests", type=int, help="of each trace (12 of personal, 32 of template)")
    parser.add_argument("--rounds", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--clients", type=int, default=2, help="at once (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the traces (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / f"{SUITE}.jsonl", help="rows are added (%(default)s)")
    args = parser.parse_args(argv)
    found = points(args.mixes, args.seed, args.requests)
    kept, bare = load(), load(savings=("mask", "packing"))
    for engine in (kept, bare):
        replayed(engine, found[0].plan.alone(1), 1)  # the first edit of a process is slow
    for _ in range(args.rounds):
        for point in found:
            measure(point, kept, bare, args.clients)
    where = where_of(InProcess(kept))
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(
        "mix", "knobs", "edits", "found document", "found prompt", "device s, kept", "nothing kept", "saved", title=SUITE
    )
    for point in found:
        seconds = [f"{Spread.of(point.seconds[name]).median:.3f}" for name in (KEPT, BARE)]
        edits = sum(call.n for call in point.plan.calls)
        shares = (point.documents, point.prompts)
        table.add_row(point.mix, point.knobs, str(edits), *(f"{x:.0%}" for x in shares), *seconds, f"{point.saved:.0%}")
    console.print(table)
    record.append(args.out, rows_of(found, where, {"rounds": args.rounds, "clients": args.clients, "seed": args.seed}))
    console.print(f"rows in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
