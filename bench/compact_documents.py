"""What keeping documents in 8 bits does to edits: `python bench/compact_documents.py`.

The same edits of the bundled photos with exact, int8 and fp8 documents: bytes of a document, the difference of the pictures
inside the mask, and the time of a step. Rows are added to results/compact_documents.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from retouch import record
from retouch.engine import load
from retouch.models.compact import FORMS
from retouch.models.options import Options
from retouch.record import Record
from timing import Spread
from variants import Edits, Settings

ROOT = Path(__file__).parent.parent
SUITE = "compact_documents"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="retouch-mini", help="bundled name, directory or hub name (%(default)s)")
    parser.add_argument("--edits", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--share", type=float, default=0.11, help="of the picture under the mask (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / f"{SUITE}.jsonl", help="rows are added (%(default)s)")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    edits = Edits(Settings(batches=(args.edits,))).of(0, args.share, args.edits)
    engines = {form: load(args.model, options=Options(keys=form)) for form in ("exact", *FORMS)}
    pictures, steps, sizes = {}, {}, {}
    for form, engine in engines.items():
        engine.edit(edits[:2])
        pictures[form] = [engine.edit([edit])[0].image for edit in edits]
        frames = [engine.model.frame(edit) for edit in edits]
        sizes[form] = [float(engine.documents.get(f.key, lambda: None)[0].bytes) for f in frames]  # type: ignore
    for edit in edits:  # in turn, so that a slow moment falls on all
        for form, engine in engines.items():
            job = engine.admit(edit)
            started = time.perf_counter()
            engine.step([job])
            steps.setdefault(form, []).append(time.perf_counter() - started)
    model: Any = engines["exact"].model
    where = record.environment("", str(model.dtype).removeprefix("torch."), torch.get_num_threads())
    table, rows = Table("documents", "MB each", "PSNR inside", "step ms", box=None, title_justify="left"), []
    for form in engines:
        pairs = zip(pictures["exact"], pictures[form], edits, strict=True)
        quality = [_psnr(a[e.mask], b[e.mask]) for a, b, e in pairs]
        found = {"bytes": (sizes[form], "B"), "psnr_inside": (quality, "dB"), "step": (steps[form], "s")}
        for name, (values, unit) in found.items():
            s = Spread.of(values)
            extra = {"documents": form, "model": args.model, "mask": args.share, "side": 512}
            rows.append(Record(SUITE, name, s.median, unit, s.low, s.high, s.n, **where, extra=extra))
        shown = "same" if form == "exact" else f"{np.median(quality):.1f} dB (p10 {np.percentile(quality, 10):.1f})"
        table.add_row(form, f"{np.median(sizes[form]) / 1e6:.2f}", shown, f"{1e3 * np.median(steps[form]):.1f}")
    console.print(table)
    record.append(args.out, rows)
    console.print(f"rows in {args.out}")
    return 0


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB, at most 99."""
    error = float(((a.astype(np.float64) - b) ** 2).mean())
    return min(99.0, 10 * float(np.log10(255**2 / error))) if error else 99.0


if __name__ == "__main__":
    sys.exit(main())
