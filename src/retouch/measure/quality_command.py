"""`retouch quality`: answers held against known truths, and a fast path against a plain one.

Exit codes: 0 where the gate passes, or none was asked for; 1 where it fails, or nothing was answered; 3 where too little was
seen for a verdict; 2, as everywhere, where the command is refused.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from retouch import picture
from retouch.edit import InvalidOption, RetouchError
from retouch.measure import floor, metrics, quality
from retouch.measure.cases import BUNDLED, Case, load
from retouch.measure.cases import said as set_said
from retouch.measure.endpoint import Endpoint
from retouch.measure.gate import FAIL, LIMITS, PASS, Bounds, Key, Verdict, pair_losses
from retouch.measure.kept import Kept, add_option
from retouch.measure.quality import Answers, Look, Scores
from retouch.measure.quality_table import tables
from retouch.measure.targets import InProcess, Target, where_of
from retouch.record import Record

OWN = ("whole", "masked")
"""Retouch's own plain paths: every cell computed, known ones re-noised, the whole picture decoded; masked cells only, exact."""

TOGETHER = 8
"""Edits at once of the floor's packed run."""

CODES = {PASS: 0, FAIL: 1}
UNSURE = 3


@dataclass(frozen=True, slots=True)
class Way:
    """One way to have edits answered: a server, or an engine of this process."""

    name: str
    target: Target
    engine: Any = None


@dataclass(frozen=True, slots=True)
class Seen:
    """A path's answers, their scores, its runs that ought to be equal, those that could not be had, and what it ran on."""

    answered: Answers
    scores: dict[Key, Scores]
    variants: list[floor.Variant]
    missing: dict[str, str]
    where: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Raises RetouchError for whatever it refuses."""
    args = _parser().parse_args(argv)
    bounds = _checked(args)
    cases = load(args.edits, args.kind, args.cases)
    look = _learned(args)
    if args.sheet is not None:
        picture.check_output(args.sheet, np.zeros((1, 1, 3), np.uint8))
    kept, rows = Kept(args.out, args.ledger), list[Record]()

    def keep(made: Sequence[Record]) -> None:
        rows.extend(made)
        kept.add(made)

    asked, plain = (args, cases, look, bounds), None
    if args.against is not None:
        plain = asyncio.run(_see(*asked, args.against, _extra(args, cases), keep, noisy=args.floor))
    name = "engine" if args.engine else args.url
    extra = _extra(args, cases, fast=name)
    fast = asyncio.run(_see(*asked, name, extra, keep, noisy=args.floor and plain is None))
    verdict = None
    if plain is not None:
        verdict = quality.compare(plain.scores, fast.scores, bounds, floor.floor_of(plain.variants, bounds))
        keep(quality.judged(name, verdict, fast.where, extra))
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    for table in tables(rows, cases, args.seeds, verdict, (args.against, name)):
        console.print(table, highlight=False)
    if args.out is not None:
        console.print(f"rows in {args.out}", highlight=False, markup=False)
    if args.sheet is not None and plain is not None and verdict is not None and fast.answered.pictures:
        _sheet(args, name, cases, plain, fast, verdict)
        console.print(f"worst pictures in {args.sheet}", highlight=False, markup=False)
    if not fast.scores:
        return 1
    if verdict is None:
        return 0
    console.print(
        f"[bold]{verdict.verdict}[/]" + "".join(f"\n  {escape(reason)}" for reason in verdict.reasons), highlight=False
    )
    return CODES.get(verdict.verdict, UNSURE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("retouch quality", "retouch quality [options]", __doc__, allow_abbrev=False)
    add = parser.add_argument
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="a server that has OpenAI's /v1/images/edits")
    where.add_argument("--engine", action="store_true", help="an engine in this process")
    add("--model", default="retouch-mini", help="of engines: a bundled name, a directory or a hub name")
    add("--dtype", default="auto", help="of engines: auto, float32 or bfloat16 (%(default)s)")
    add("--keys", default="exact", help="of --engine: how documents are kept: exact, int8 or fp8 (%(default)s)")
    add("--refresh", metavar="F,K", help="of --engine: full steps are the first F, then every K-th (all)")
    add("--context", type=int, metavar="PX", help="of --engine: pixels that the model sees around the mask (all)")
    add("--against", metavar="URL|whole|masked", help="the plain path that it is paired with: a server, or the engine in plain")
    add("--floor", action="store_true", help="first measure how far the plain path differs from itself")
    add("--seeds", type=int, default=2, metavar="K", help="of each case (%(default)s)")
    add("--cases", type=int, metavar="N", help="so many at most, evenly from the set (all)")
    add("--kind", action="append", default=[], help="only cases of this kind, such as recolour; repeatable")
    add("--edits", type=Path, default=BUNDLED, metavar="DIR", help="another edit set (the bundled one)")
    add("--steps", type=int, metavar="N", help="of denoising (the model's own)")
    add("--clients", type=int, default=1, metavar="K", help="edits at once (%(default)s)")
    add("--limit", action="append", default=[], metavar="NAME=X", help=f"the gate's, instead of {_told(LIMITS)}; repeatable")
    add("--level", type=float, default=0.95, metavar="P", help="confidence of each bound (%(default)s)")
    add("--out", type=Path, metavar="FILE", help="add the rows to it, as JSON lines")
    add_option(parser)
    add("--sheet", type=Path, metavar="FILE", help="a PNG of the pairs that lose most")
    add("--lpips", type=Path, nargs=2, metavar="FILE", help="weights: torchvision's AlexNet, and LPIPS 0.1's linear layers")
    add("--clip", type=Path, metavar="DIR", help="weights: a CLIPModel of transformers, with its tokenizer")
    add("--judge", type=Path, metavar="DIR", help="the folder in which `retouch train judge` has finished its classifier")
    add("--key", help="API key of the servers")
    add("--timeout", type=float, default=600.0, metavar="S", help="after which an answer counts as lost (%(default)s)")
    return parser


def _told(limits: Any) -> str:
    return ", ".join(f"{name}={limit:g}" for name, limit in limits.items())


def _checked(args: argparse.Namespace) -> Bounds:
    """Raises InvalidOption."""
    for name, value in (("seeds", args.seeds), ("cases", args.cases), ("clients", args.clients)):
        if value is not None and value < 1:
            raise InvalidOption(f"--{name} is {value}; give at least 1.")
    if args.sheet is not None and args.against is None:
        raise InvalidOption("--sheet shows what loses most against a plain path; name one with --against.")
    if args.url is not None and (args.keys != "exact" or args.refresh is not None or args.context is not None):
        raise InvalidOption("--keys, --refresh and --context are options of --engine; a server has its own.")
    limits: dict[str, float] = {}
    for text in args.limit:
        name, equals, value = text.rpartition("=")
        zone, _, metric = name.partition(" ")
        known = metric in metrics.UNITS and zone in ("inside", "seam", "outside")
        try:
            limits[name] = float(value)
        except ValueError:
            known = False
        if not equals or not known:
            raise InvalidOption(f"--limit is {text!r}; give ZONE METRIC=LOSS, such as 'inside psnr=0.5'.")
    return Bounds(limits or dict(LIMITS), args.level)


def _learned(args: argparse.Namespace) -> Look | None:
    if args.lpips is None and args.clip is None and args.judge is None:
        return None
    from retouch.measure.learned import Learned

    return Learned(None if args.lpips is None else tuple(args.lpips), args.clip, args.judge)


@contextmanager
def _opened(args: argparse.Namespace, name: str, **form: Any) -> Iterator[Way]:
    """`name` is a server's address, "engine" with the options of the command line, or one of OWN. An engine is loaded in
    another `form` where that is given.
    """
    if name not in ("engine", *OWN):
        keys = {} if args.key is None else {"": args.key}
        yield Way(name, Endpoint(name, keys=keys, timeout=args.timeout))
        return
    from retouch.engine import load as load_engine
    from retouch.models.options import Options

    asked = Options(keys=args.keys, refresh=args.refresh, context=args.context)
    options = {"engine": asked, "whole": Options(whole=True, halo=None), "masked": Options(whole=False)}[name]
    engine = load_engine(args.model, **{"dtype": args.dtype, **form}, options=options)
    try:
        yield Way(name, InProcess(engine), engine)
    finally:
        engine.close()


async def _see(
    args: argparse.Namespace, cases: Sequence[Case], look: Look | None, bounds: Bounds, name: str, extra: dict[str, Any],
    keep: Callable[[Sequence[Record]], None], noisy: bool,
) -> Seen:  # fmt: skip
    """`noisy`: its noise floor too, which takes as long again for each variant. `keep` has rows as soon as they are measured:
    what comes later may fail.
    """
    with ExitStack() as opened:
        way = opened.enter_context(_opened(args, name))
        first, scores = await _run(args, way, name, cases, look, args.clients)
        seen = Seen(first, scores, [], {}, where_of(way.target))
        kinds = {case.name: case.kind for case in cases}
        keep(quality.records(name, scores, None, seen.where, kinds, first.failed, extra))
        if not (noisy and scores):
            return seen

        async def again(text: str, way: Way, clients: int) -> None:
            run = await _run(args, way, f"{name}, {text}", cases, look, clients)
            one = floor.variant(text, cases, (first, scores), run, bounds)
            seen.variants.extend([one] if one else [])

        try:
            await again("answered again", way, args.clients)
            await again("packed", way, TOGETHER)
            opened.close()  # one engine at a time
            await _other_forms(args, name, way, seen, again)
        finally:
            if seen.variants:
                keep(floor.records(name, seen.variants, seen.where, floor.between_seeds(scores), seen.missing))
    return seen


async def _other_forms(
    args: argparse.Namespace, name: str, way: Way, seen: Seen, again: Callable[[str, Way, int], Awaitable[None]]
) -> None:  # fmt: skip
    if way.engine is None:
        seen.missing["other dtype, compiled"] = "a server has the one form that it was started in"
        return
    other = "bfloat16" if seen.where["dtype"] == "float32" else "float32"
    for text, form in ((other, {"dtype": other}), ("compiled", {"compile": True})):
        try:
            with _opened(args, name, **form) as formed:
                await again(text, formed, args.clients)
        except RetouchError:
            raise
        except Exception as error:  # a compiler that is not there, or fails, may raise anything
            seen.missing[text] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


async def _run(
    args: argparse.Namespace, path: Way, text: str, cases: Sequence[Case], look: Look | None, clients: int
) -> tuple[Answers, dict[Key, Scores]]:  # fmt: skip
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        edits, scoring = (bar.add_task(f"{text}: {what}", total=len(cases) * args.seeds) for what in ("edits", "scores"))
        target = path.target if path.engine is None else InProcess(path.engine)
        async with target:
            answered = await quality.answers(target, cases, range(args.seeds), clients, args.steps, lambda: bar.advance(edits))
        return answered, quality.scored(cases, answered, look, lambda: bar.advance(scoring))


def _extra(args: argparse.Namespace, cases: Sequence[Case], fast: str = "") -> dict[str, Any]:
    """What was asked, of the plain path's rows, or of those of the `fast` one."""
    extra: dict[str, Any] = {"cases": len(cases), "case_seeds": args.seeds, "clients": args.clients, "steps": args.steps}
    extra |= {"edits": set_said(args.edits)}
    extra |= {"model": args.model} if args.engine or args.against in OWN else {}
    extra |= {"against": args.against} if fast and args.against is not None else {}
    return extra | ({"keys": args.keys, "refresh": args.refresh, "context": args.context} if fast == "engine" else {})


def _sheet(
    args: argparse.Namespace, name: str, cases: Sequence[Case], plain: Seen, fast: Seen, verdict: Verdict
) -> None:  # fmt: skip
    before, after = ({key: one.flat() for key, one in seen.scores.items()} for seen in (plain, fast))
    gated = [loss.name for loss in verdict.losses.values() if loss.limit is not None]
    losses = pair_losses(before, after, gated)
    page = quality.sheet(
        cases, plain.answered.pictures, fast.answered.pictures, verdict, names=(args.against, name), losses=losses
    )
    picture.write(args.sheet, page)
