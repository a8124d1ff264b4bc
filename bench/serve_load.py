"""What serving adds to the engine, and how it holds under load: `python bench/serve_load.py`.

  overhead   one edit at a time: the server's answer to a client against the engine called directly, in turn; and eight at once
  schedule   what deciding who steps next takes of the steps
  load       latency at 80 % of the throughput that saturates it, against the unloaded one
  flood      a tenant's latency while another sends as much as it can, against its ordinary traffic, under the policy `fair`
  warm       throughput on documents that are encoded already, against new ones

512 px documents, masks of 11 %, the bundled weights. Client, server and worker share the machine. Rows are added to
results/serve_load.jsonl; targets are printed beside the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from live import closed, one_by_one, open_loop, server
from retouch import record
from retouch.edit import Edit
from retouch.engine import Engine, load
from retouch.measure.load import Answer
from retouch.measure.pictures import another
from retouch.measure.summary import causes
from retouch.record import Record
from timing import Spread
from variants import Edits, Settings

ROOT = Path(__file__).parent.parent
SUITE = "serve_load"
SHARE, CLIENTS = 0.11, 8


@dataclass(frozen=True, slots=True)
class Sizes:
    """Requests of each measurement."""

    single: int = 40
    rounds: int = 3
    together: int = 64
    loaded: int = 150
    cold: int = 32


QUICK = Sizes(4, 1, 8, 8, 4)


class Bench:
    """The figures, in the order in which they are measured."""

    def __init__(self, sizes: Sizes, console: Console) -> None:
        self.sizes, self.console = sizes, console
        self.edits = Edits(Settings(batches=(1, 8)))
        self.found: list[tuple[str, Spread, str, float | None, bool]] = []
        self.turn = 0

    def add(self, name: str, values: Sequence[float], unit: str, target: float | None = None, at_least: bool = False) -> float:
        """Keep a figure; returns its median."""
        spread = Spread.of(list(values))
        self.found.append((name, spread, unit, target, at_least))
        return spread.median

    def fresh(self, count: int, tenant: str = "") -> list[Edit]:
        """Edits that nobody has seen, of the eight documents."""
        self.turn += 1
        made: list[Edit] = []
        while len(made) < count:
            made += self.edits.of(1000 * self.turn + len(made), SHARE, 8)
        return [replace(edit, reuse=False, tenant=tenant) for edit in made[:count]]


def overhead(bench: Bench, engine: Engine, address: str) -> None:
    sizes = bench.sizes
    engine.edit(bench.fresh(8))
    one_by_one(address, bench.fresh(8))
    ours, named, sent = [], [], []
    for edit in bench.fresh(sizes.single):
        started = time.perf_counter()
        engine.edit([edit])
        ours.append(time.perf_counter() - started)
        named += _seconds(one_by_one(address, [edit]))
        sent += _seconds(one_by_one(address, [edit], named=False))
    bench.add("engine, one edit", ours, "s")
    bench.add("server, document named", named, "s")
    bench.add("server, picture sent", sent, "s")
    bench.add("overhead, document named", [b - a for a, b in zip(ours, named, strict=True)], "s", 0.005)
    bench.add("overhead, picture sent", [b - a for a, b in zip(ours, sent, strict=True)], "s")
    rates, lost = ([], []), []
    for _ in range(sizes.rounds):
        edits = bench.fresh(sizes.together)
        started = time.perf_counter()
        _eight_at_once(engine, edits)
        direct = time.perf_counter() - started
        answers, seconds = closed(address, edits, CLIENTS)
        _checked(answers)
        rates[0].append(len(edits) / direct)
        rates[1].append(len(edits) / seconds)
        lost.append(1 - direct / seconds)
    bench.add(f"engine, {CLIENTS} at once", rates[0], "1/s")
    bench.add(f"server, {CLIENTS} clients", rates[1], "1/s")
    bench.add("throughput lost to serving", lost, "1", 0.03)


def _eight_at_once(engine: Engine, edits: Sequence[Edit]) -> None:
    """As eight clients would ask: the next is submitted when one is answered."""
    waiting = list(reversed(edits))
    running = [engine.submit(waiting.pop()) for _ in range(min(CLIENTS, len(waiting)))]
    while running:
        engine.tick()
        done = [one for one in running if one.answer.done()]
        for one in done:
            one.answer.result()
            running.remove(one)
            if waiting:
                running.append(engine.submit(waiting.pop()))


def load_at_80(bench: Bench, address: str) -> None:
    sizes = bench.sizes
    alone = _seconds(one_by_one(address, bench.fresh(sizes.single)))
    answers, seconds = closed(address, bench.fresh(sizes.together), 2 * CLIENTS)
    full = len(_checked(answers)) / seconds
    loaded = _p95(open_loop(address, bench.fresh(sizes.loaded), 0.8 * full))
    bench.add("unloaded latency", alone, "s")
    bench.add("saturating throughput", [full], "1/s")
    bench.add("p95 at 80 % of it", [loaded], "s")
    bench.add("p95 at 80 % over the unloaded p95", [loaded / float(np.percentile(alone, 95))], "x", 2.5)
    bench.add("the same ratio of a queue before one server", [one_server(0.8)], "x")
    share = httpx.get(f"{address}/v1/stats").json()["step"]["scheduling_share"]
    bench.add("scheduling, of the steps", [share], "1", 0.02)


def one_server(share: float, arrivals: int = 200_000) -> float:
    """p95 of the time in a queue with one server that always takes as long, over that time without a queue (M/D/1).

    What there is to be had where edits that share a step are done no sooner than one after the other, as on a CPU.
    """
    gaps = np.random.default_rng(0).exponential(1 / share, arrivals)
    free, now, times = 0.0, 0.0, []
    for gap in gaps:
        now += gap
        free = max(now, free) + 1.0
        times.append(free - now)
    return float(np.percentile(times, 95))


def flood(bench: Bench) -> None:
    """Only the calm tenant's answers count. Ordinary traffic is as much again by the other tenant, in turn with its own."""
    sizes = bench.sizes
    alone, ordinary, flooded = list[float](), list[float](), list[float]()
    with TemporaryDirectory() as folder:
        keys = Path(folder) / "keys.toml"
        keys.write_text("".join(f'[[tenant]]\nname = "{name}"\nkey = "{name}"\n' for name in ("calm", "flood")))
        with server("--policy", "fair", "--keys", str(keys)) as address:
            one_by_one(address, bench.fresh(8, "calm"))  # documents are a tenant's own
            answers, seconds = closed(address, bench.fresh(sizes.together, "flood"), 2 * CLIENTS)
            full = len(_checked(answers)) / seconds
            for turn in range(sizes.rounds):
                calm, others = bench.fresh(sizes.loaded // 2, "calm"), bench.fresh(sizes.loaded, "flood")
                both = [edit for pair in zip(calm, others, strict=False) for edit in pair]
                alone.append(_p95(open_loop(address, calm, 0.2 * full, turn)))
                answers = _checked(open_loop(address, both, 0.4 * full, turn))
                ordinary.append(_p95([answer for answer in answers if both[answer.number].tenant == "calm"]))
                flooded.append(_p95(open_loop(address, calm, 0.2 * full, turn, flood=others)))
    bench.add("calm tenant alone, p95", alone, "s")
    bench.add("calm tenant beside ordinary traffic, p95", ordinary, "s")
    bench.add("calm tenant beside a flood, p95", flooded, "s")
    bench.add("flood over ordinary traffic", [a / b for a, b in zip(flooded, ordinary, strict=True)], "x", 1.3)
    bench.add("flood over alone", [a / b for a, b in zip(flooded, alone, strict=True)], "x")


def warm_and_cold(bench: Bench, address: str) -> None:
    sizes, rates = bench.sizes, ([], [])
    for turn in range(sizes.rounds):
        edits = bench.fresh(sizes.cold)
        new = [replace(edit, image=another(edit.image, sizes.cold * turn + i)) for i, edit in enumerate(edits)]
        for rate, some in zip(rates, (edits, new), strict=True):
            answers, seconds = closed(address, some, CLIENTS)
            rate.append(len(_checked(answers)) / seconds)
    bench.add("warm documents", rates[0], "1/s")
    bench.add("new documents", rates[1], "1/s")
    bench.add("warm over new", [a / b for a, b in zip(*rates, strict=True)], "x", 3.0, at_least=True)


def _p95(answers: list[Answer]) -> float:
    return float(np.percentile(_seconds(answers), 95))


def _seconds(answers: list[Answer]) -> list[float]:
    return [answer.seconds for answer in _checked(answers)]


def _checked(answers: list[Answer]) -> list[Answer]:
    if wrong := causes(answers):
        raise RuntimeError(f"some requests were not served: {wrong}")
    return answers


def table_of(bench: Bench, where: dict[str, Any]) -> Table:
    table = Table(title=f"serve_load, {where['device']}, {where['threads']} threads, {where['dtype']}", title_justify="left")
    for name in ("figure", "median", "p10 - p90", "n", "target"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for name, spread, unit, target, at_least in bench.found:
        scale, shown = (1e3, "ms") if unit == "s" else (100, "%") if unit == "1" else (1, unit)
        values = [f"{scale * value:.2f}" for value in (spread.median, spread.low, spread.high)]
        met = target is not None and (spread.median >= target if at_least else spread.median <= target)
        wanted = (
            "" if target is None else f"[{'green' if met else 'red'}]{'>=' if at_least else '<='} {scale * target:g} {shown}"
        )
        table.add_row(name, f"{values[0]} {shown}", f"{values[1]} - {values[2]}", str(spread.n), wanted)
    return table


def rows_of(bench: Bench, where: dict[str, Any], extra: dict[str, Any]) -> list[Record]:
    return [
        Record(SUITE, name, s.median, unit, s.low, s.high, s.n, **where, extra={**extra, "target": target})
        for name, s, unit, target, _ in bench.found
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few requests of each: a smoke test")
    parser.add_argument("--only", nargs="+", choices=("overhead", "load", "flood", "warm"), help="(all)")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further options of retouch serve")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "serve_load.jsonl", help="rows are added (%(default)s)")
    args = parser.parse_args(argv)
    import torch

    console = Console(width=None if sys.stdout.isatty() else 120)
    bench, chosen = Bench(QUICK if args.quick else Sizes(), console), args.only or ("overhead", "load", "flood", "warm")
    engine = load()
    if set(chosen) & {"overhead", "load", "warm"}:
        with server(*args.serve) as address:
            if "overhead" in chosen:
                overhead(bench, engine, address)
            if "load" in chosen:
                load_at_80(bench, address)
            if "warm" in chosen:
                warm_and_cold(bench, address)
            console.print(json.dumps(httpx.get(f"{address}/v1/stats").json()["step"]))
    if "flood" in chosen:
        flood(bench)
    model: Any = engine.model
    where = record.environment("", str(model.dtype).removeprefix("torch."), torch.get_num_threads())
    console.print(table_of(bench, where))
    record.append(args.out, rows_of(bench, where, {"serve": " ".join(args.serve), "side": 512, "mask": SHARE}))
    console.print(f"rows in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
