"""`retouch bench`: what a million edits cost on this machine, rung by rung and peer by peer."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from retouch import record, trace
from retouch.edit import InvalidOption
from retouch.measure import cases, report, table, tally
from retouch.measure.contest import Contest
from retouch.measure.kept import Kept, add_option
from retouch.measure.machine import Machine
from retouch.measure.pictures import Pictures
from retouch.measure.plan import Plan, of_trace
from retouch.measure.standing import standings
from retouch.measure.subjects import PEERS, Common, Subject, chosen, named, peers, rungs, spread
from retouch.measure.traffic import MIXES, make, option, turned
from retouch.measure.trial import LEAST, Course
from retouch.record import Record, Scalar
from retouch.trace import Trace

if TYPE_CHECKING:
    from retouch.measure.jury import Jury

REQUESTS = {"personal": 24, "template": 48}
"""As many as two slow cores serve in a minute or two with the whole picture computed for each."""

LOADS = (0.3, 0.6, 0.8, 0.9)
SAME = ("trace_hash", "model", "retouch_clients", "price_per_hour", "quality", "edit_set", "cases", "seeds", "warm_up")
PLACE = ("processor", "device", "threads", "dtype", "commit")
"""What has to be the same where a run goes on: of what is asked, and of where and by which code it is answered."""


def main(argv: Sequence[str] | None = None) -> int:
    """1 where nobody was measured, 130 where it was stopped. Raises RetouchError for whatever it refuses."""
    args = _parser().parse_args(argv)
    _check(args)
    code = 0 if args.rows is not None else _measure(args)
    source = args.out if args.rows is None else args.rows
    found = standings(tally.latest(record.read(source))) if source.exists() or args.rows is not None else []
    if not found:
        if code:
            return code
        raise InvalidOption(f"{source} has no rows of retouch bench; measure some first.")
    console = Console()
    console = console if console.is_terminal else Console(width=150)
    for standing in found:
        table.show(standing, console)
    report.write(args.report, found)
    print(f"rows in {source}, report in {args.report} and {args.report.with_suffix('.md')}")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("retouch bench", "retouch bench [options]", __doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--mix", choices=list(MIXES), default="personal", help="of the edits that are sent (%(default)s)")
    add("--trace", type=Path, metavar="FILE", help="a trace in place of one of --mix")
    add("--seed", type=int, default=1, help="of the trace (%(default)s)")
    add("--requests", type=int, metavar="N", help="(24 of personal, 48 of template, all of --trace)")
    add("--clients", type=int, default=8, metavar="K", help="at once at a Retouch; peers say it themselves (%(default)s)")
    add("--peers", type=Path, metavar="FILE", help="TOML of [[peer]] (bench/peers/peers.toml)")
    add("--only", default="", metavar="NAMES", help="who is measured, with commas between; * for any letters")
    add("--skip", default="", metavar="NAMES", help="who is not")
    add("--model", default="retouch-mini", help="a bundled name, a directory or a hub name (%(default)s)")
    add("--dtype", default="auto", help="float32, bfloat16, or auto, which takes what is faster here (%(default)s)")
    add("--threads", type=int, metavar="N", help="of every subject (the CPUs of this process)")
    add("--price", type=float, metavar="USD", help="dollars an hour of this machine")
    add("--prices", type=Path, metavar="FILE", help="else TOML of [[price]] by device; some are known")
    add("--quality", action=argparse.BooleanOptionalAction, default=True, help="judge everybody's answers against ground truth")
    add("--edits", type=Path, default=cases.BUNDLED, metavar="DIR", help="the set that quality is judged by (the bundled one)")
    add("--cases", type=int, default=20, metavar="N", help="edits that quality is judged by (%(default)s)")
    add("--seeds", type=int, default=2, metavar="N", help="of each of them (%(default)s)")
    add("--again", action=argparse.BooleanOptionalAction, default=True, help="measure once more who had a slower machine"
        " than the others")  # fmt: skip
    add("--curves", type=_loads, default=(), nargs="?", const=LOADS, metavar="X,Y,..", help="latency at these shares of the own"
        " saturation (0.3,0.6,0.8,0.9)")  # fmt: skip
    add("--curve-seconds", type=float, default=60.0, metavar="S", help="that each of them lasts, about (%(default)s)")
    add("--warm-up", type=int, default=8, metavar="N", help="requests beforehand at most (%(default)s)")
    add("--timeout", type=float, default=300.0, metavar="S", help="after which an answer counts as lost (%(default)s)")
    add("--patience", type=float, default=600.0, metavar="S", help="that a subject may take to start (%(default)s)")
    add("--pictures", type=Path, metavar="DIR", help="the folder of the trace's pictures (the bundled photos)")
    add("--out", type=Path, default=Path("out/bench.jsonl"), metavar="FILE", help="rows are added to it (%(default)s)")
    add_option(parser)
    add("--resume", action="store_true", help="go on with the last run in --out: who has figures there is left out")
    add("--report", type=Path, default=Path("out/bench.html"), metavar="FILE", help="and FILE.md beside it (%(default)s)")
    add("--from", dest="rows", type=Path, metavar="FILE", help="measure nothing: the report of these rows")
    return parser


def _loads(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _check(args: argparse.Namespace) -> None:
    """Raises InvalidOption."""
    for name, low in (("requests", 2), ("clients", 1), ("threads", 1), ("cases", 1), ("seeds", 1), ("warm_up", 0), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise InvalidOption(f"{option(name)} is {value}; give at least {low}.")
    for name in ("timeout", "patience", "curve_seconds"):
        if not 0 < getattr(args, name) < 1e6:
            raise InvalidOption(f"{option(name)} is {getattr(args, name):g}; give seconds, above 0.")
    if not all(0 < load < 1 for load in args.curves):
        raise InvalidOption("--curves are shares of the saturation between 0 and 1, such as 0.3,0.6,0.9.")
    if args.report.suffix not in (".html", ".htm"):
        raise InvalidOption(f"--report is {args.report}; give a name that ends with .html.")


def _measure(args: argparse.Namespace) -> int:
    asked = _trace(args)
    first = [request.at for request in asked.requests[:LEAST]]
    if args.curves and first[0] == first[-1]:
        raise InvalidOption("--curves needs a trace whose requests come one after the other; give another, or leave it out.")
    pictures = Pictures(args.pictures)
    pictures.check(asked, args.trace or Path(f"the trace of --mix {args.mix}"))
    machine = Machine.here(args.dtype, args.threads)
    price = machine.price(args.price, args.prices)
    subjects = _subjects(args, machine)
    extra: dict[str, Scalar] = {
        "run": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()), "mix": asked.mix, "trace_seed": asked.seed,
        "trace": "" if args.trace is None else args.trace.name,
        "trace_hash": trace.hash_of("".join(trace.lines(asked)).encode()), "knobs": turned(asked.mix, asked.knobs),
        "requests": len(asked.requests), "model": args.model, "vcpus": record.vcpus(),
        "retouch_clients": args.clients, "price_per_hour": price.per_hour, "price_source": price.said, "quality": args.quality,
        "edit_set": cases.said(args.edits) if args.quality else "", "cases": args.cases if args.quality else 0,
        "seeds": args.seeds if args.quality else 0, "warm_up": args.warm_up,
    }  # fmt: skip
    device = "" if machine.device == "cpu" else machine.name
    where = record.environment(device, machine.dtype, machine.threads)
    earlier = _earlier(args, extra, where) if args.resume else []
    if earlier:
        extra["run"] = earlier[0].extra["run"]
    contest = Contest(
        _course(args, of_trace(asked, pictures), machine), Kept(args.out, args.ledger), where,
        extra, price.per_hour, machine.rate, _jury(args), earlier, args.again,
    )  # fmt: skip
    try:
        with _terminable():
            asyncio.run(contest.run(subjects))
    except KeyboardInterrupt:
        print(f"retouch: stopped; the rows so far are in {args.out}, --resume goes on.", file=sys.stderr)
        return 130
    return int(all(row.error for row in contest.rows if row.name == tally.COST))


def _trace(args: argparse.Namespace) -> Trace:
    if args.trace is not None:
        asked = trace.read(args.trace)
        return asked if args.requests is None else asked.first(args.requests)
    knobs = replace(MIXES[args.mix], requests=args.requests or REQUESTS[args.mix])
    return make(args.mix, args.seed, knobs, Pictures(args.pictures))


def _subjects(args: argparse.Namespace, machine: Machine) -> list[Subject]:
    """In the order in which they are measured. Raises InvalidOption."""
    common = Common(_directory(args.model), machine.dtype, machine.threads, args.clients)
    ladder, file = rungs(common), args.peers
    if file is None and PEERS.exists():
        file = PEERS
    others = [] if file is None else peers(file, common)
    everybody = [*ladder, *others]
    asked = {one.name for one in chosen(everybody, named(args.only, everybody), named(args.skip, everybody))}
    return spread(*([one for one in some if one.name in asked] for some in (ladder, others)))


def _directory(model: str) -> str:
    """Of a checkpoint, which peers ask for; absolute, as they run elsewhere. Raises UnknownCheckpoint."""
    if Path(model).is_dir():
        return str(Path(model).resolve())
    from retouch.models import checkpoint

    return str(checkpoint.find(model).resolve())


def _course(args: argparse.Namespace, plan: Plan, machine: Machine) -> Course:
    return Course(plan, machine.threads, args.warm_up, args.timeout, args.patience, tuple(args.curves), args.curve_seconds)


def _jury(args: argparse.Namespace) -> Jury | None:
    if not args.quality:
        return None
    from retouch.measure.jury import Jury

    return Jury(cases.load(args.edits, count=args.cases), args.seeds)


def _earlier(args: argparse.Namespace, extra: dict[str, Scalar], where: dict[str, Any]) -> list[Record]:
    """The rows of the run that goes on. Raises InvalidOption where it was another one."""
    rows = tally.latest(record.read(args.out)).get(str(extra["mix"]), []) if args.out.exists() else []
    if not rows:
        raise InvalidOption(f"{args.out} has no run on the mix {extra['mix']} that could go on; leave out --resume.")
    other = [name for name in SAME if rows[0].extra.get(name) != extra[name]]
    other += [name for name in PLACE if any(getattr(row, name) != where[name] for row in rows)]
    if other:
        raise InvalidOption(f"the last run in {args.out} was with another {', '.join(other)}; leave out --resume.")
    return rows


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM as Ctrl-C: the subjects are ended, and the rows are kept.

    Also where SIGINT is ignored, as a shell has it for what it starts in the background.
    """

    def stop(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
