"""Whether a client that nobody here wrote measures what `retouch load` does: `python bench/foreign_client.py --aiperf PATH`.

The client is NVIDIA's aiperf (https://github.com/ai-dynamo/aiperf, Apache 2.0), since it has an endpoint type for image edits:
a form with the picture as a file and further fields. It sends no masks, so these edits are of whole pictures. It brings many
packages along, and is best kept in an environment of its own:

  python -m venv ENV && ENV/bin/pip install aiperf
  python bench/foreign_client.py --aiperf ENV/bin/aiperf

Both send the same forms, as many at once, to one `retouch serve` with the bundled model, in turn, for some rounds. Documents
are encoded before the clock runs. Rows are added to results/foreign_client.jsonl, with the ratios of the two clients' figures.
Client, server and worker share the machine: a client that takes much of it makes the server slower. So the server's own clock,
`retouch_request_seconds` of its /metrics, is read too, and each client's mean latency is held against that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from live import server
from retouch import picture, record
from retouch.edit import Edit
from retouch.measure.endpoint import Endpoint
from retouch.measure.load import Replay, closed_loop
from retouch.measure.pictures import Pictures
from retouch.measure.plan import of_edits
from retouch.measure.summary import causes
from retouch.record import Record
from timing import Spread

ROOT = Path(__file__).parent.parent
SUITE = "foreign_client"
MODEL = "retouch-mini"
TOKENIZER = ROOT / "src" / "retouch" / "models" / "bundled" / MODEL / "tokenizer"
"""aiperf counts prompts' tokens; with one from a folder, it asks no hub for it."""

SEED = 7
FIGURES = {"latency p50": "s", "latency mean": "s", "requests per second": "1/s", "latency mean by the server": "s"}
BOTH = "latency mean over the server's"


@dataclass(frozen=True, slots=True)
class Sizes:
    """`pictures`, whose longer side is `side`, are asked for in turn until there are `requests`, by so many `clients`."""

    pictures: int = 8
    side: int = 512
    requests: int = 64
    clients: int = 4
    rounds: int = 3


QUICK = Sizes(pictures=2, side=64, requests=8, clients=2, rounds=1)


class Failed(Exception):
    """The other client gave no figures."""


def asked(sizes: Sizes) -> list[Edit]:
    photos, rng = Pictures(), np.random.default_rng(0)
    views = [photos.view(number, sizes.side, rng) for number in range(sizes.pictures)]
    edits = [Edit(photos.pixels(view), f"a red apple, {number}", seed=SEED, reuse=False) for number, view in enumerate(views)]
    return [edits[i % len(edits)] for i in range(sizes.requests)]


def ours(address: str, edits: list[Edit], clients: int) -> dict[str, float]:
    """By `retouch load`'s client, with a form as aiperf's: the picture in each, and what is constant."""

    async def run() -> Replay:
        fields = {"model": MODEL, "response_format": "b64_json"}
        async with Endpoint(address, {"seed", "use_cache"}, fields=fields) as target:
            return await closed_loop(target, of_edits(edits), clients)

    replay = asyncio.run(run())
    if wrong := causes(replay.answers):
        raise RuntimeError(f"some requests were not served: {wrong}")
    seconds = [answer.seconds for answer in replay.answers]
    rate = len(seconds) / replay.seconds
    return {"latency p50": float(np.median(seconds)), "latency mean": float(np.mean(seconds)), "requests per second": rate}


def theirs(aiperf: str, address: str, edits: list[Edit], sizes: Sizes) -> dict[str, float]:
    """Raises Failed."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        rows = []
        for number, edit in enumerate(edits[: sizes.pictures]):
            file = folder / f"{number}.png"
            file.write_bytes(picture.encode(edit.image, "PNG"))
            rows.append(json.dumps({"text": edit.prompt, "image": str(file)}) + "\n")
        (folder / "edits.jsonl").write_text("".join(rows))
        options = {
            "model": MODEL, "tokenizer": TOKENIZER, "endpoint-type": "image-edit", "url": address, "ui": "none",
            "input-file": folder / "edits.jsonl", "custom-dataset-type": "single_turn",
            "dataset-sampling-strategy": "sequential", "concurrency": sizes.clients, "request-count": len(edits),
            "artifact-dir": folder / "out", "extra-inputs": json.dumps({"seed": SEED, "use_cache": False}),
        }  # fmt: skip
        command = [aiperf, "profile", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
        command += ["--no-gpu-telemetry", "--no-server-metrics"]
        done = subprocess.run(command, capture_output=True, text=True)
        try:
            return figures_of(json.loads((folder / "out" / "profile_export_aiperf.json").read_text()), len(edits))
        except (OSError, ValueError, LookupError, TypeError) as error:
            said = " ".join((done.stdout + done.stderr).split())[-300:]
            raise Failed(f"aiperf gave no figures ({error!r}, exit {done.returncode}): {said}") from error


def figures_of(told: Mapping[str, Any], wanted: int) -> dict[str, float]:
    """Of aiperf's summary, in seconds. Raises Failed where requests are missing or went wrong."""
    served, errors = int(told["request_count"]["avg"]), told["error_summary"]
    if served != wanted or errors:
        raise Failed(f"aiperf had {served} of {wanted} requests served: {json.dumps(errors)[:300]}")
    return {
        "latency p50": float(told["request_latency"]["p50"]) / 1000,
        "latency mean": float(told["request_latency"]["avg"]) / 1000,
        "requests per second": float(told["request_throughput"]["avg"]),
    }


def measured(aiperf: str, sizes: Sizes, serve: list[str]) -> tuple[dict[str, dict[str, list[float]]], dict[str, Any]]:
    """Client -> figure -> its values, one a round; and what the server says of itself. Raises Failed."""
    found: dict[str, dict[str, list[float]]] = {client: {name: [] for name in FIGURES} for client in ("retouch load", "aiperf")}
    edits = asked(sizes)
    with server(*serve) as address:
        told = httpx.get(f"{address}/v1/models").json()["data"][0]["retouch"]
        ours(address, edits[: sizes.pictures], 1)  # documents and prompts are encoded from here on
        for turn in range(sizes.rounds):
            for client in ("retouch load", "aiperf") if turn % 2 == 0 else ("aiperf", "retouch load"):
                before = clock(address)
                one = ours(address, edits, sizes.clients) if client != "aiperf" else theirs(aiperf, address, edits, sizes)
                after = clock(address)
                one["latency mean by the server"] = (after[0] - before[0]) / (after[1] - before[1])
                for name, value in one.items():
                    found[client][name].append(value)
    return found, told


def clock(address: str) -> tuple[float, float]:
    """Seconds that the server's requests took so far by its own clock, and how many these were."""
    lines = dict(line.rsplit(" ", 1) for line in httpx.get(f"{address}/metrics").text.splitlines() if line[:1] != "#")
    return float(lines["retouch_request_seconds_sum"]), float(lines["retouch_request_seconds_count"])


def rows_of(found: dict[str, dict[str, list[float]]], where: dict[str, Any], extra: dict[str, Any]) -> list[Record]:
    """The clients' figures, their ratios round by round, and each one's latency over the server's own."""
    told = []
    for name, unit in FIGURES.items():
        own, other = found["retouch load"][name], found["aiperf"][name]
        told += [(f"retouch load, {name}", own, unit), (f"aiperf, {name}", other, unit)]
        told.append((f"retouch load over aiperf, {name}", [a / b for a, b in zip(own, other, strict=True)], "x"))
    over = [
        [a / b for a, b in zip(figures["latency mean"], figures["latency mean by the server"], strict=True)]
        for figures in found.values()
    ]
    told += [(f"{client}, {BOTH}", values, "x") for client, values in zip(found, over, strict=True)]
    told.append((f"retouch load over aiperf, {BOTH}", [a / b for a, b in zip(*over, strict=True)], "x"))
    spreads = [(title, Spread.of(values), unit) for title, values, unit in told]
    return [Record(SUITE, title, s.median, unit, s.low, s.high, s.n, **where, extra=extra) for title, s, unit in spreads]


def table_of(rows: list[Record], sizes: Sizes) -> Table:
    title = f"{sizes.requests} edits of whole {sizes.side} px pictures, {sizes.clients} at once, {sizes.rounds} rounds"
    table = Table("figure", title=title, title_justify="left")
    for name in ("median", "p10 - p90"):
        table.add_column(name, justify="right")
    for row in rows:
        if row.error:
            table.add_row(f"[red]ERROR {row.name}", row.error, "")
        else:
            table.add_row(row.name, f"{row.value:.4g} {row.unit}", f"{row.low:.4g} - {row.high:.4g}")
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aiperf", default="aiperf", metavar="PATH", help="its command (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few requests of small pictures: a smoke test")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further options of retouch serve")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "foreign_client.jsonl", help="(%(default)s)")
    args = parser.parse_args(argv)
    aiperf = shutil.which(args.aiperf)
    if aiperf is None:
        parser.error(f"there is no {args.aiperf}: install aiperf in an environment of its own, and name it with --aiperf.")
    version = subprocess.run([aiperf, "--version"], capture_output=True, text=True).stdout.strip()
    sizes = QUICK if args.quick else Sizes()
    extra: dict[str, Any] = {
        "client": f"aiperf {version}", "requests": sizes.requests, "clients": sizes.clients, "side": sizes.side,
        "serve": " ".join(args.serve),
    }  # fmt: skip
    try:
        found, told = measured(aiperf, sizes, args.serve)
        where = record.environment(told["device"] if told["device"] != "cpu" else "", told["dtype"], told["threads"])
        rows = rows_of(found, where, extra)
    except Failed as error:
        rows = [Record(SUITE, "aiperf", None, "s", error=str(error), **record.environment(), extra=extra)]
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table_of(rows, sizes))
    record.append(args.out, rows)
    console.print(f"rows in {args.out}")
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
