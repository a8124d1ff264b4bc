"""How long does an edit take: Retouch beside the stock diffusers pipelines, on the same weights, in one run.

    python bench/edit_latency.py                      the bundled checkpoint, 512 px documents
    python bench/edit_latency.py --shape klein-4b     FLUX.2-klein-4B shape at 1024 px, random weights, on a GPU
    python bench/edit_latency.py --quick              a smoke test

Every round runs every variant once, so that a drift of the machine hits all alike; the round before the first warms up and
compiles. Each variant and mask gives rows for `encode` (prompt and document until the first step), `denoise` (all steps),
`finish` (decode and composite), `edit` (all of it) and two rates, each beside its ceiling: the matrix products' FLOPs over the
rate that square products reach on this machine in this run.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from report import headline, rows_of, table_of
from retouch import record
from retouch.edit import InvalidOption, RetouchError
from retouch.models.dtype import choose, matmul_rate
from retouch.models.flux2 import Flux2
from retouch.record import Record
from shapes import SHAPES, build, of_checkpoint
from timing import Clock
from variants import SHARES, Settings, Variant, variants

ROOT = Path(__file__).parent.parent


def measure(made: Sequence[Variant], settings: Settings, rate: Callable[[], float], show: Progress) -> float:
    """Fill the variants' samples, in rounds; returns the best rate of matrix products seen, FLOP/s.

    A variant that fails has an error from then on, and no samples.
    """
    best = 0.0
    task = show.add_task("warming up", total=len(made) * (settings.rounds + 1))
    for turn in range(settings.rounds + 1):
        best = max(best, rate())
        for variant in made:
            show.update(task, description=f"{f'round {turn} of {settings.rounds}' if turn else 'warming up'}: {variant.name}")
            started = time.perf_counter()
            try:
                sample = None if variant.error else variant.run(turn)
            except Exception as error:  # a failed variant is a row of the result
                variant.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                variant.samples.clear()
                sample = None
            if turn == 0:
                variant.first = time.perf_counter() - started
            elif sample:
                variant.samples.append(sample)
            show.advance(task)
    return best


def bench(model: Flux2, settings: Settings, name: str, note: str, console: Console) -> list[Record]:
    """Measure, print, and return the rows."""
    if model.family.embeds_guidance or model.family.guidance is not None:
        raise InvalidOption("this bench is for the step-distilled klein checkpoints; a guided one runs every step twice.")
    # A silent fall back to eager would flatter us: where code is compiled too often, it is an error row.
    torch._dynamo.config.recompile_limit = 32
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    clock = Clock(model.device)
    size = 8192 if model.device.type == "cuda" else 2048
    with Progress(console=console, transient=True) as show:
        made = variants(model, settings, clock)
        rate = measure(made, settings, lambda: matmul_rate(model.dtype, model.device, size), show)
    gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else ""
    where = record.environment(gpu, str(model.dtype).removeprefix("torch."), torch.get_num_threads())
    title = f"{name}, {settings.side} px, {settings.steps} steps" + (f" ({note})" if note else "")
    console.print(table_of(made, rate, where, title))
    for what, ratio, target in headline(made):
        console.print(f"  {ratio:6.2f}x  {what}" + (f"  [dim](target {target:g}x)[/dim]" if target else ""))
    extra = {"model": name, "note": note, "vae_layout": "channels_last"}
    return rows_of(made, rate, settings, where, extra)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", default="retouch-mini", help="bundled name, directory or hub name (%(default)s)")
    what.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape instead")
    what.add_argument("--quick", action="store_true", help="one round of --shape tiny: a smoke test")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (%(default)s)")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=SHARES, metavar="S", help="of the picture under the mask (all: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=4, help="denoising steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of noise and of the masks' places (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16; auto measures which is faster")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled peers")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "results" / "edit_latency.jsonl", help="rows are added (%(default)s)"
    )
    args = parser.parse_args(argv)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        if args.rounds < 1 or args.steps < 1:
            raise InvalidOption("give at least one round and one step.")
        if not all(0 < share <= 1 for share in args.shares):
            raise InvalidOption("a mask's share of the picture is above 0 and at most 1.")
        name = "tiny" if args.quick else args.shape
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(auto if args.device == "auto" else args.device)
        if name:
            shape = SHAPES[name]
            dtype = torch.bfloat16 if shape.needs_cuda and args.dtype == "auto" else choose(args.dtype, device)
            model, side, note = build(name, device, dtype), shape.side, shape.note
        else:
            model, name, side, note = of_checkpoint(args.model, device, choose(args.dtype, device)), args.model, 512, ""
        rounds = 1 if args.quick else args.rounds
        settings = Settings(side, rounds, args.steps, args.seed, not args.no_compile, tuple(args.shares))
        record.append(args.out, bench(model, settings, name, note, console))
    except RetouchError as error:
        print(f"edit_latency: {error}", file=sys.stderr)
        return 2
    console.print(f"rows in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
