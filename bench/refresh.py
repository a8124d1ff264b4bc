"""What partial steps do to edits: `python bench/refresh.py`.

The bundled checkpoint with its exact document cache switched off: references run along at the step's own timestep, and all
tokens attend to all, as in a model that was not trained for masked cells. The same edits, with the same noise, of the bundled
photos, and with `--data` of held-out scenes whose answer is known: every step full; full steps on several schedules, with
partial ones between them (`models/refresh.py`); and the masked cells alone at every step, with references but nothing else to
see, which this checkpoint was also trained for, and others were not. Every edit runs on all of these in turn, so that a slow
moment falls on all. Rows are added to results/refresh.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from retouch import record
from retouch.edit import Edit, Usage
from retouch.engine.engine import Engine
from retouch.models import checkpoint
from retouch.models.adapter import Adapter
from retouch.models.dtype import choose
from retouch.models.families import adapter_of
from retouch.models.options import Options
from retouch.record import Record
from retouch.train.cases import cases, source_of
from retouch.train.figures import psnr
from retouch.train.judge import held_out_photos
from timing import Clock, Spread
from variants import Edits, Settings

ROOT = Path(__file__).parent.parent
SUITE = "refresh"
FULL, ALONE = "every step full", "masked alone"
SCHEDULES = ("1,2", "2,2", "1,4", "2,4", "1,100")
KINDS = ("remove on photos", "remove on flat", "replace", "recolour")
"""Of `train.cases`: those with one answer."""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """An edit of a workload, and its answer where there is one, (H, W, 3) uint8."""

    workload: str
    edit: Edit
    truth: np.ndarray | None = None


@dataclass(slots=True)
class Found:
    """Of one plan, workload and number of steps, a value for each edit."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)


UNITS = {
    "psnr_full": "dB", "psnr_truth": "dB", "truth_loss": "dB", "tokens": "share", "step": "s", "speedup": "x", "kept": "B",
}  # fmt: skip
"""`truth_loss` is paired: an edit's psnr_truth less that of the same edit with every step full. Below 0 the plan loses."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="retouch-mini", help="bundled name, directory or hub name (%(default)s)")
    add("--edits", type=int, default=24, help="of each workload (%(default)s)")
    add("--share", type=float, default=0.11, help="of the photos under the mask (%(default)s)")
    add("--side", type=int, default=512, help="of the photos (%(default)s)")
    add("--steps", type=int, nargs="+", default=[4, 12], help="(%(default)s)")
    add("--schedules", nargs="+", default=list(SCHEDULES), help="(%(default)s)")
    add("--data", type=Path, help="folder of the training's packages, for edits with a known answer")
    add("--dtype", default="auto", help="auto, float32 or bfloat16 (%(default)s)")
    add("--out", type=Path, default=ROOT / "results" / f"{SUITE}.jsonl", help="rows are added (%(default)s)")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    models = built(args.model, args.dtype, args.schedules)
    asked = workload(args.edits, args.share, args.side, args.data)
    some = models[FULL]
    where = record.environment("", str(some.dtype).removeprefix("torch."), torch.get_num_threads())
    rows = []
    for steps in args.steps:
        found = measured(models, asked, steps, Clock(some.device))
        rows += rows_of(found, steps, args.model, where)
        console.print(table_of(found, steps))
    record.append(args.out, rows)
    console.print(f"rows in {args.out}")
    return 0


def built(name: str, dtype: str, schedules: Sequence[str]) -> dict[str, Adapter]:
    """One model for each plan, over the same weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline, family = checkpoint.read(checkpoint.find(name), choose(dtype, device))
    family, pipeline = replace(family, cached=False, masked=False), pipeline.to(device)
    plans = {FULL: Options(), **{plan: Options(refresh=plan) for plan in schedules}, ALONE: Options(whole=False)}
    return {plan: adapter_of(family)(pipeline, family, plan, options) for plan, options in plans.items()}


def workload(count: int, share: float, side: int, data: Path | None) -> list[Asked]:
    photos = Edits(Settings(side=side, batches=(count,))).of(0, share, count)
    asked = [Asked(f"photos, {share:.0%}", edit) for edit in photos]
    if data is not None:
        source = source_of(data, held_out_photos(ROOT / "photos"))
        asked += [Asked(kind, case.edit, case.truth) for kind in KINDS for case in cases(source, kind, count)]
    return asked


def measured(models: dict[str, Adapter], asked: Sequence[Asked], steps: int, clock: Clock) -> dict[tuple[str, str], Found]:
    """By plan and workload. The first edit is run once before, unmeasured."""
    found: dict[tuple[str, str], Found] = {}
    engines = {plan: Engine(model) for plan, model in models.items()}
    for engine in engines.values():
        run(engine, replace(asked[0].edit, steps=steps), clock)
    for one in asked:
        edit, answers = replace(one.edit, steps=steps), {}
        for plan, engine in engines.items():
            answers[plan] = run(engine, edit, clock)
        whole, whole_seconds, _ = answers[FULL]
        mask = np.ones(edit.image.shape[:2], bool) if edit.mask is None else edit.mask
        best = None if one.truth is None else psnr(whole, one.truth, mask)
        for plan, (picture, seconds, usage) in answers.items():
            of = found.setdefault((plan, one.workload), Found())
            of.add("psnr_full", psnr(picture, whole, mask))
            if one.truth is not None and best is not None:
                near = psnr(picture, one.truth, mask)
                of.add("psnr_truth", near)
                of.add("truth_loss", near - best)
            of.add("tokens", usage.tokens_computed / usage.tokens_whole)
            of.add("step", seconds / steps)
            of.add("speedup", whole_seconds / seconds)
            of.add("kept", float(usage.kept_bytes))
    return found


def run(engine: Engine, edit: Edit, clock: Clock) -> tuple[np.ndarray, float, Usage]:
    """(picture, seconds of all steps, usage)."""
    job = engine.admit(edit)
    started = clock()
    while not job.done:
        engine.step([job])
    seconds = clock() - started
    edited = engine.finish(job)
    return edited.image, seconds, edited.usage


def rows_of(found: dict[tuple[str, str], Found], steps: int, model: str, where: dict[str, object]) -> list[Record]:
    rows = []
    for (plan, workload_), of in found.items():
        extra = {"plan": plan, "workload": workload_, "steps": steps, "model": model}
        for name, values in of.values.items():
            s = Spread.of(values)
            rows.append(Record(SUITE, name, s.median, UNITS[name], s.low, s.high, s.n, **where, extra=extra))  # type: ignore[arg-type]
    return rows


def table_of(found: dict[tuple[str, str], Found], steps: int) -> Table:
    heads = ("workload", "plan", "tokens", "dB to full (p10)", "dB to truth (paired)", "step ms", "faster")
    table = Table(*heads, title=f"{steps} steps", box=None, title_justify="left")
    for workload_ in dict.fromkeys(name for _, name in found):
        for plan, of in ((plan, of) for (plan, name), of in found.items() if name == workload_):
            at = {name: Spread.of(values) for name, values in of.values.items()}
            near = "same" if plan == FULL else f"{at['psnr_full'].median:.1f} ({at['psnr_full'].low:.1f})"
            pair = "" if plan == FULL or "truth_loss" not in at else f" ({at['truth_loss'].median:+.1f})"
            truth = f"{at['psnr_truth'].median:.1f}{pair}" if "psnr_truth" in at else ""
            step, faster = f"{1e3 * at['step'].median:.1f}", f"{at['speedup'].median:.2f} x"
            table.add_row(workload_, plan, f"{at['tokens'].median:.0%}", near, truth, step, faster)
    return table


if __name__ == "__main__":
    sys.exit(main())
