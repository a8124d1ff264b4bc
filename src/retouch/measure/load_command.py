"""`retouch load`: a trace against a server, or an engine in this process."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import secrets
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from retouch import trace
from retouch.edit import InvalidOption
from retouch.measure import summary
from retouch.measure.endpoint import EXTENSIONS, Endpoint
from retouch.measure.kept import Kept, add_option
from retouch.measure.load import Answer, Heard, closed_loop, open_loop, saturation
from retouch.measure.pictures import Pictures
from retouch.measure.plan import Plan, of_trace
from retouch.measure.targets import InProcess, Target, where_of
from retouch.measure.traffic import option, turned
from retouch.record import Record
from retouch.trace import hash_of

LASTING = 5
"""So many deadlines a probe for the saturating rate lasts at least: else what the queue swallows would pass for held."""


def main(argv: Sequence[str] | None = None) -> int:
    """1 where nothing was served. Raises RetouchError for whatever it refuses."""
    args = _parser().parse_args(argv)
    _check(args)
    asked = trace.read(args.trace)
    asked = asked if args.requests is None else asked.first(args.requests)
    pictures = Pictures(args.pictures, args.stand_ins)
    pictures.check(asked, args.trace)
    plan = of_trace(asked, pictures, args.reuse)
    kept = Kept(args.out, args.ledger)
    extra: dict[str, Any] = {
        "trace": args.trace.name, "trace_hash": hash_of(args.trace.read_bytes()), "mix": asked.mix, "trace_seed": asked.seed,
        "knobs": turned(asked.mix, asked.knobs), "new_documents": not asked.knobs.get("documents"), "requests": len(plan.calls),
    }  # fmt: skip
    engine = None
    target: Target
    if args.engine:
        from retouch.engine import load

        engine = load(args.model, args.dtype)
        target = InProcess(engine)
    else:
        target = Endpoint(args.url, _extensions(args.send), _keys(args), _further(args.field), args.timeout)
    try:
        rows = asyncio.run(_run(args, target, plan, extra))
    finally:
        if engine is not None:
            engine.close()
    kept.add(rows)
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    console.print(summary.table(rows, f"{args.trace.name} on {target.name}"), highlight=False)
    if args.out is not None:
        print(f"rows in {args.out}")
    return int(all(row.value is None or row.name == "errors" for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("retouch load", description="Replay a trace, and measure.", allow_abbrev=False)
    add = parser.add_argument
    add("trace", type=Path, metavar="TRACE", help="a file of retouch trace make, or a recorded one")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="a server that has OpenAI's /v1/images/edits")
    where.add_argument("--engine", action="store_true", help="an engine in this process")
    add("--model", default="retouch-mini", help="of --engine: a bundled name, a directory or a hub name")
    add("--dtype", default="auto", help="of --engine: auto, float32 or bfloat16")
    add("--clients", type=int, metavar="K", help="closed loop: so many at once (open loop, at the trace's times)")
    add("--speed", type=float, default=1.0, metavar="X", help="of the trace's time in the open loop (%(default)s)")
    add("--requests", type=int, metavar="N", help="only the trace's first so many")
    add("--warm-up", type=int, default=3, metavar="N", help="requests beforehand that do not count (%(default)s)")
    add("--deadline", type=float, metavar="S", help="seconds in which an answer is a good one, where the trace does not say")
    add(
        "--saturate",
        type=float,
        metavar="SHARE",
        help="search the rate at which less than this, such as 0.95, is served in time",
    )
    add("--fresh", action="store_true", help="change a pixel of each picture: documents that no earlier run left in a cache")
    add("--reuse", action="store_true", help="a finished result of the very same edit may be the answer")
    add("--timeout", type=float, default=600.0, metavar="S", help="after which an answer counts as lost (%(default)s)")
    add("--key", help="API key, for all tenants")
    add("--keys", type=Path, metavar="FILE", help="theirs: TOML of [[tenant]] name, key, as retouch serve reads it")
    add(
        "--send",
        metavar="NAMES",
        help=f"extensions: all, none, or of {','.join(sorted(EXTENSIONS))} (a Retouch: all)",
    )
    add("--field", action="append", default=[], metavar="NAME=VALUE", help="a further field of each request; repeatable")
    add("--stand-ins", action="store_true", help="for pictures and prompts that were not recorded")
    add("--out", type=Path, metavar="FILE", help="add the rows to it, as JSON lines")
    add_option(parser)
    add("--pictures", type=Path, metavar="DIR", help="the folder of the trace's pictures (the bundled photos)")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises InvalidOption."""
    for name, low in (("clients", 1), ("requests", 1), ("warm_up", 0)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise InvalidOption(f"{option(name)} is {value}; give at least {low}.")
    for name in ("speed", "deadline", "timeout"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1e9:
            raise InvalidOption(f"--{name} is {value:g}; give a number above 0.")
    if args.saturate is not None and not 0 < args.saturate <= 1:
        raise InvalidOption(f"--saturate is {args.saturate:g}; give a share of the requests, such as 0.95.")
    if args.clients is not None and (args.saturate is not None or args.speed != 1):
        raise InvalidOption("--clients is the closed loop, whose clients wait for answers; leave out --speed and --saturate.")


def _extensions(text: str | None) -> frozenset[str] | None:
    if text is None:
        return None
    return EXTENSIONS if text == "all" else frozenset(() if text == "none" else text.split(","))


def _keys(args: argparse.Namespace) -> dict[str, str]:
    """By tenant. Raises InvalidOption."""
    found = {} if args.key is None else {"": args.key}
    if args.keys is not None:
        try:
            told = tomllib.loads(args.keys.read_text(encoding="utf-8"))
            found |= {str(tenant["name"]): str(tenant["key"]) for tenant in told["tenant"]}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InvalidOption(f"{args.keys} cannot be read ({error}); give TOML of [[tenant]] with name and key.") from error
        hashed = [name for name, key in found.items() if key.startswith("sha256:")]
        if hashed:
            raise InvalidOption(f"{args.keys} has only the digest of the key of {', '.join(hashed)}; give the key itself.")
    return found


def _further(given: Sequence[str]) -> dict[str, str]:
    """Raises InvalidOption."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise InvalidOption(f"--field is {text!r}; give NAME=VALUE.")
        found[name] = value
    return found


async def _run(args: argparse.Namespace, target: Target, plan: Plan, extra: dict[str, Any]) -> list[Record]:
    async with target:
        where, extra = where_of(target), {**extra, "target": target.name, "warm_up": args.warm_up}
        turn = 1 + secrets.randbelow(2**24 - 64) if args.fresh else 0
        if args.warm_up:
            warm = await closed_loop(target, plan.alone(args.warm_up).renewed(turn + 1), 1)
            if all(answer.error == "unreachable" for answer in warm.answers):
                return summary.records(warm, where, extra)  # which says so, instead of the whole trace's time later
        if args.saturate is not None:
            return [await _saturate(args, target, plan, turn, where, extra)]
        with _bar(len(plan.calls)) as heard:
            if args.clients is not None:
                replay = await closed_loop(target, plan.renewed(turn), args.clients, heard)
                extra |= {"loop": "closed", "clients": args.clients}
            else:
                replay = await open_loop(target, plan.renewed(turn), args.speed, heard)
                extra |= {"loop": "open", "speed": args.speed}
        return summary.records(replay, where, extra, args.deadline)


async def _saturate(
    args: argparse.Namespace, target: Target, plan: Plan, turn: int, where: dict[str, Any], extra: dict[str, Any]
) -> Record:
    """Where each session of the trace has a picture of its own, each probe has new ones: a cache is to know no more than the
    trace lets it. Raises InvalidOption.
    """
    limits = [limit for limit in (args.deadline, *(call.deadline for call in plan.calls)) if limit is not None]
    span = plan.calls[-1].at - plan.calls[0].at
    if not limits or not span:
        raise InvalidOption("--saturate needs --deadline, and a trace whose requests come one after the other.")
    own = (len(plan.calls) - 1) / span
    last: list[str] = []
    turns = itertools.count(turn + 2) if extra["new_documents"] else itertools.repeat(turn)

    async def probe(rate: float) -> float:
        with _bar(len(plan.calls), f"{rate:.3g} requests a second") as heard:
            replay = await open_loop(target, plan.renewed(next(turns)), rate / own, heard)
        last[:] = [cause for cause, _, _ in summary.causes(replay.answers)]
        return sum(answer.good(args.deadline) for answer in replay.answers) / len(replay.answers)

    found = await saturation(probe, args.saturate, own * args.speed, len(plan.calls) / (LASTING * max(limits)))
    return summary.saturated(found, where, extra, args.saturate, args.deadline, ", ".join(last))


@contextmanager
def _bar(total: int, text: str = "requests") -> Iterator[Heard]:
    console = Console(stderr=True)
    before, after = TextColumn("{task.description}"), TextColumn("{task.fields[wrong]}")
    columns = (before, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), after)
    wrong = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=total, wrong="")

        def heard(answer: Answer) -> None:
            nonlocal wrong
            wrong += bool(answer.error)
            bar.update(task, advance=1, wrong=f"[red]{wrong} failed" if wrong else "")

        yield heard
