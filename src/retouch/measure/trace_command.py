"""`retouch trace make` and `retouch trace show`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from retouch import trace
from retouch.edit import InvalidOption
from retouch.measure import figures, traffic
from retouch.measure.pictures import Pictures
from retouch.measure.traffic import MIXES, Knobs, option


def main(argv: Sequence[str] | None = None) -> int:
    """Raises RetouchError for whatever it refuses."""
    args = _parser().parse_args(argv)
    if args.what == "show":
        _show(trace.read(args.file), Path(args.file))
        return 0
    if args.seed < 0:
        raise InvalidOption(f"--seed is {args.seed}; give a whole number from 0 on.")
    given = {one.name: getattr(args, one.name) for one in fields(Knobs) if getattr(args, one.name) is not None}
    made = traffic.make(args.mix, args.seed, replace(MIXES[args.mix], **given), Pictures(args.pictures))
    trace.write(args.out, made)
    print(f"{args.out}  {len(made.requests):,} requests, {made.requests[-1].at:,.0f} s")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("retouch trace", description="Make and look at edit traces.", allow_abbrev=False)
    what = parser.add_subparsers(dest="what", required=True, metavar="make | show")
    make = what.add_parser("make", help="make a trace from a seed", allow_abbrev=False)
    make.add_argument("--mix", choices=list(MIXES), default="personal", help="whose knobs are the defaults (%(default)s)")
    make.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    make.add_argument("--out", type=Path, required=True, metavar="FILE")
    make.add_argument("--pictures", type=Path, metavar="DIR", help="the folder of the pictures (the bundled photos)")
    for one in fields(Knobs):
        make.add_argument(option(one.name), type=_reader(one.default), metavar=_metavar(one.default), help=_help(one.name))
    show = what.add_parser("show", help="its statistics, beside what is published", allow_abbrev=False)
    show.add_argument("file", type=Path, metavar="FILE")
    return parser


def _reader(default: Any) -> Callable[[str], Any]:
    if isinstance(default, tuple):
        kind = type(default[0])
        return lambda text: tuple(kind(part) for part in text.split(",") if part)
    return type(default)


def _metavar(default: Any) -> str:
    return "X,Y,..." if isinstance(default, tuple) else "N" if isinstance(default, int) else "X"


def _help(name: str) -> str:
    """The default of each mix, where they differ."""
    about = next(one.metadata["about"] for one in fields(Knobs) if one.name == name)
    values = [getattr(knobs, name) for knobs in MIXES.values()]
    shown = [",".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" for value in values]
    if len(set(shown)) > 1:
        shown = [f"{mix} {value}" for mix, value in zip(MIXES, shown, strict=True)]
    return f"{about} ({'; '.join(dict.fromkeys(shown))})"


def _show(made: trace.Trace, path: Path) -> None:
    table = Table(title=f"{path}: {made.mix}, seed {made.seed}", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("this trace", justify="right")
    table.add_column("published", justify="right")
    group = ""
    for figure in figures.figures(made):
        if figure.group != group:
            group = figure.group
            table.add_row(f"[bold]{group}")
        known = figure.published
        told = known if isinstance(known, str) else _figure(known, figure.unit)
        table.add_row(f"  {figure.name}", _figure(figure.value, figure.unit), told)
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table, highlight=False)


def _figure(value: float, unit: str) -> str:
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:,.6g} {unit}".strip()
