"""The command line. Whatever Retouch refuses is one line on stderr and exit code 2, with nothing half-written.

Heavy imports happen inside the commands, so that `retouch --help` and bad input answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import stat
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import retouch
from retouch.edit import Edit, Edited, InvalidMask, InvalidOption, RetouchError, UnknownAdapter

if TYPE_CHECKING:
    from retouch.picture import Picture

log = logging.getLogger(__name__)

MAX_VARIATIONS = 64
DTYPES = ("auto", "float32", "bfloat16")

FORWARDED = {
    "serve": "serve edits over HTTP, with a studio page",
    "models": "which model families are served, and what each has; what a checkpoint is",
    "filter": "one-shot filters: remove-background, upscale, or any that a TOML describes",
    "demo": "edit the bundled photos with plain diffusers and with Retouch; a sheet and a table",
    "trace": "`trace make` makes a workload of edits from a seed, `trace show` tells its statistics",
    "load": "replay a trace against a server, or an engine in this process, and measure",
    "bench": "what a million edits cost, rung by rung of the savings, beside the peers",
    "quality": "how good the answers are against known truths, and whether a fast path is as good as a plain one",
    "cost": "what the served edits took and cost, by tenant, model, stage or day",
    "train": "`train mini` makes the bundled checkpoint, `train judge` measures one",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Commands in FORWARDED read their own options."""
    args, rest = _parser().parse_known_args(argv)
    logging.basicConfig(format="retouch: %(message)s", level=logging.INFO if args.verbose else logging.WARNING)
    try:
        if args.command in FORWARDED:
            return _forward(args.command, rest)
        if rest:
            raise InvalidOption(f"unknown option {' '.join(rest)}; see retouch {args.command} --help.")
        edit(args)
    except RetouchError as error:
        print(f"retouch: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:  # of no path that somebody gave
            raise
        log.info("where it came from", exc_info=True)
        text = f"{error.filename} cannot be used ({error.strerror}); check the path."
        print(f"retouch: {' '.join(text.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("retouch: stopped; nothing was written.", file=sys.stderr)
        return 130
    return 0


def _forward(command: str, rest: list[str]) -> int:
    """Run a command that reads its own options."""
    if command in ("demo", "serve"):
        return int(importlib.import_module(f"retouch.{command}").main(rest) or 0)
    if command in ("trace", "load", "bench", "quality"):
        return int(importlib.import_module(f"retouch.measure.{command}_command").main(rest) or 0)
    if command == "models":
        return int(importlib.import_module("retouch.models.table").main(rest) or 0)
    if command == "filter":
        return int(importlib.import_module("retouch.engine.filter_command").main(rest) or 0)
    if command == "cost":
        return int(importlib.import_module("retouch.measure.cost").main(rest) or 0)
    what, *options = rest or [""]
    if what == "mini":
        return int(importlib.import_module("retouch.train.mini").main(options) or 0)
    if what == "judge":
        return int(importlib.import_module("retouch.train.judge").main(options, retouch.load) or 0)
    raise InvalidOption("give what to train or judge: retouch train mini, or retouch train judge (--help lists options).")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("retouch", description="Image edits for a fraction of the cost.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"retouch {retouch.__version__}")
    parser.set_defaults(verbose=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _edit_options(commands.add_parser("edit", help="edit one picture", allow_abbrev=False))
    for name, text in FORWARDED.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _edit_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "Edit one picture. Without a mask or a box, the whole picture."
    add = parser.add_argument
    add("image", help="the picture to edit")
    add("--prompt", "-p", required=True, help='what to do: "a red apple", "remove the object", "make the car blue"')
    add("--mask", action="append", default=[], metavar="FILE", help="where to edit; several are united")
    add("--mask-mode", choices=("auto", "alpha", "white"), default="auto", help="what marks the place in a mask file")
    add("--box", action="append", default=[], metavar="X,Y,W,H", help="where to edit, in pixels; several are united")
    add("--reference", action="append", default=[], metavar="FILE", help="a further picture to look at; repeatable")
    add("-n", type=int, default=1, metavar="N", help="variations, seeds counting up (default 1)")
    add("--seed", type=int, default=0, help="seed of the first variation (default 0)")
    add("--steps", type=int, help="denoising steps (default: the model's own)")
    add("--guidance", type=float, help="guidance scale (default: the model's own)")
    add("--negative", default="", metavar="TEXT", help="what to keep away from, where guidance takes a second pass")
    add("--model", default="retouch-mini", help="a bundled name, a directory, a file or a hub name")
    add("--base", metavar="DIR", help="or hub name, with what a .safetensors --model lacks")
    add("--adapter", action="append", default=[], metavar="NAME[=SCALE]", help="a LoRA to wear; repeatable")
    add("--adapters", type=Path, metavar="DIR", help="the folder of such adapters")
    add("--refresh", metavar="F,K", help="full steps: the first F, then every K-th; between, the mask alone (all full)")
    add("--dtype", choices=DTYPES, default="auto", help="auto takes what is fastest on this machine")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    add("--offload", metavar="HOW", help="stages: the model's parts are on the device in turn")
    add("--device-map", metavar="HOW", help="balanced or auto: the transformer over several GPUs")
    add("--cache", metavar="DIR", help="keep what is encoded there: the next edit of the same picture starts at once")
    add("-o", "--output", required=True, metavar="FILE", help=".png, .webp (both exact) or .jpg; -n 3 adds -1, -2, -3")
    add("-v", "--verbose", action="store_true")


def edit(args: argparse.Namespace) -> None:
    """`retouch edit`: everything that can be refused is refused before a model is loaded."""
    from retouch import picture

    photo = picture.read(args.image)
    outputs = _outputs(Path(args.output), args.n)
    for output in outputs:
        picture.check_output(output, photo.pixels)
    edits = _edits(args, photo)
    cache = _cache(args.cache)

    start = time.perf_counter()
    engine = retouch.load(args.model, dtype=args.dtype, cache=cache, **_extra(args))
    loaded = time.perf_counter()
    edited = _with_progress(engine.edit, edits)
    done = time.perf_counter()
    engine.close()
    picture.write_all([(path, one.image) for path, one in zip(outputs, edited, strict=True)], like=photo)
    _report(edited, outputs, load=loaded - start, wall=done - loaded)


def _extra(args: argparse.Namespace) -> dict[str, Any]:
    """What else `retouch.load` is to be told, where it is asked for."""
    if args.adapter and args.adapters is None:
        raise InvalidOption("--adapter names one of a folder; give that with --adapters DIR.")
    if args.adapters is not None and not os.path.isdir(args.adapters):  # also False for what cannot be a path
        raise UnknownAdapter(f"{args.adapters} is no folder; give one with .safetensors files of LoRA adapters.")
    asked = {name: getattr(args, name) for name in ("adapters", "base", "device", "offload", "device_map")}
    extra: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if args.refresh is not None:
        from retouch.models.options import Options

        extra["options"] = Options(refresh=args.refresh)
    return extra


def _cache(folder: str | None) -> Path | None:
    """The folder to keep things in, which need not be there yet."""
    if not folder:
        return None
    path = Path(folder)
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            raise InvalidOption(f"--cache {path} is a file; give a folder.")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InvalidOption(f"--cache {path} cannot be a folder ({error.strerror}); check the path.") from error
    return path


def _outputs(path: Path, n: int) -> list[Path]:
    """The file itself for one variation, numbered files beside it for several."""
    if not 1 <= n <= MAX_VARIATIONS:
        raise InvalidOption(f"-n is {n}; give 1 to {MAX_VARIATIONS} variations.")
    if n == 1:
        return [path]
    if not path.name:
        raise InvalidOption(f"-o {path} has no file name; give one, such as out.png.")
    return [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(1, n + 1)]


def _edits(args: argparse.Namespace, photo: Picture) -> list[Edit]:
    from retouch import picture

    masks = [picture.read_mask(path, photo.size, args.mask_mode) for path in args.mask]
    masks += [picture.box_mask(_box(text), photo.size) for text in args.box]
    mask = picture.union(masks) if masks else None
    references = tuple(picture.read(path).pixels for path in args.reference)
    adapters = tuple(_adapter(text) for text in args.adapter)
    return [
        Edit(
            image=photo.pixels,
            prompt=args.prompt,
            mask=mask,
            references=references,
            seed=args.seed + i,
            steps=args.steps,
            guidance=args.guidance,
            negative=args.negative,
            adapters=adapters,
        )
        for i in range(args.n)
    ]


def _box(text: str) -> tuple[int, int, int, int]:
    try:
        x, y, w, h = (int(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidMask(f"box {text!r} is not x,y,width,height in whole pixels, such as 120,80,96,96.") from error
    return x, y, w, h


def _adapter(text: str) -> tuple[str, float]:
    name, _, scale = text.partition("=")
    try:
        return name, float(scale or 1)
    except ValueError as error:
        raise InvalidOption(f"adapter {text!r} is not NAME or NAME=SCALE, such as ink=0.8.") from error


def _with_progress(
    run: Callable[[Sequence[Edit], Callable[[int, int], None]], list[Edited]], edits: Sequence[Edit]
) -> list[Edited]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("steps", total=None)
        return run(edits, lambda done, total: bar.update(task, completed=done, total=total))


def _report(edited: Sequence[Edited], outputs: Sequence[Path], load: float, wall: float) -> None:
    """Time by stage summed over the edits, tokens computed against those of the whole picture, and what was written."""
    from rich.console import Console
    from rich.table import Table

    seconds: dict[str, float] = {}
    for one in edited:
        for stage, spent in one.usage.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    computed = sum(one.usage.tokens_computed for one in edited)
    whole = sum(one.usage.tokens_whole for one in edited)

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("load the model", f"{load:.3f} s")
    for stage, spent in seconds.items():
        table.add_row(stage, f"{spent:.3f} s")
    table.add_row("total without load", f"{wall:.3f} s")
    table.add_row("image tokens", f"{computed:,} of {whole:,}" + (f" ({computed / whole:.0%})" if whole else ""))
    console = Console()
    console.print(table)
    for path, one in zip(outputs, edited, strict=True):
        console.print(f"{path}  seed {one.seed}", soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    sys.exit(main())
