"""How an edit's threads wait for each other, alone and beside a busy neighbour: `python bench/spins.py`.

The bundled checkpoint edits a photo of 512 px under a mask of 11 %, document and prompt cached, in a process of its own for
each way of waiting: libgomp's own (a thread looks for work 300,000 times before it sleeps), `config.SPINS`, and not at all.
Beside it run as many busy processes as `--neighbours` says, as a browser or another server would. All ways in turn, in rounds.
Rows are added to results/spins.jsonl.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from retouch import config, record
from retouch.record import Record
from timing import Clock, Spread
from variants import Edits, Settings, roomy, serve

ROOT = Path(__file__).parent.parent
SUITE = "spins"
WAYS = {"libgomp's own": {}, config.SPINS: {"GOMP_SPINCOUNT": config.SPINS}, "passive": {"OMP_WAIT_POLICY": "passive"}}
OURS = config.SPINS
WARM = 3
"""Edits before those that count."""


def edit(count: int) -> None:
    """The seconds of so many edits, a line each."""
    import torch

    from retouch.engine import load

    model = load(dtype="auto").model
    edits, engine, clock = Edits(Settings()), roomy(model), Clock(torch.device("cpu"))
    for turn in range(count + WARM):
        asked = edits.of(0, 0.11, 1)
        sample = serve(engine, asked, clock, warm=turn > 0)
        if turn >= WARM:
            print(sample.seconds["edit"], flush=True)


def timed(way: dict[str, str], count: int, neighbours: int) -> list[float]:
    """Of so many edits in a fresh process, beside so many that count for ever."""
    usual = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)]
    try:
        asked = [sys.executable, __file__, "--child", str(count)]
        done = subprocess.run(asked, env=usual | way, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        for one in busy:
            one.kill()
            one.wait()
    return [float(line) for line in done.stdout.split()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=10, help="of each process (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--neighbours", type=int, default=1, help="busy processes beside the edits (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / f"{SUITE}.jsonl", help="rows are added (%(default)s)")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child is not None:
        edit(args.child)
        return 0
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(args.rounds):
        for neighbours in (0, args.neighbours):
            for name, way in WAYS.items():
                found.setdefault((name, neighbours), []).extend(timed(way, args.edits, neighbours))
    where, rows = record.environment("", "", os.cpu_count() or 0), []
    console = Console(width=None if sys.stdout.isatty() else 100)
    table = Table("looks before it sleeps", "beside", "an edit, ms", "p10 - p90", title=SUITE, box=None, title_justify="left")
    for (name, neighbours), seconds in found.items():
        spread = Spread.of(seconds)
        beside = f"{neighbours} busy" if neighbours else "nobody"
        table.add_row(name, beside, f"{1e3 * spread.median:.0f}", f"{1e3 * spread.low:.0f} - {1e3 * spread.high:.0f}")
        extra = {"way": name, "neighbours": neighbours, "ours": name == OURS}
        rows.append(Record(SUITE, "edit", spread.median, "s", spread.low, spread.high, spread.n, **where, extra=extra))
    console.print(table)
    record.append(args.out, rows)
    console.print(f"rows in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
