"""From samples to rows, a table, and the ratios that the issue asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from retouch.record import Record
from timing import STAGES
from variants import Settings, Variant

SUITE = "edit_latency"
COLUMNS = ("mask", "encode ms", "denoise ms", "p10 - p90", "of ceiling", "finish ms", "edit ms", "edits/s", "of ceiling")


def rows_of(
    made: Sequence[Variant], rate: float, settings: Settings, where: dict[str, Any], extra: dict[str, Any]
) -> list[Record]:
    """Records of all that was measured, the rate of matrix products first."""
    base = {**extra, "side": settings.side, "steps": settings.steps, "seed": settings.seed, "flops_per_second": rate}
    rows = [Record(SUITE, "matmul", rate, "FLOP/s", ceiling=rate, n=settings.rounds + 1, **where, extra=base)]
    for variant in made:
        said = {**base, "variant": variant.name, "mask": variant.share, "batch": variant.batch}
        if variant.error:
            rows.append(Record(SUITE, "edit", None, "s", error=variant.error, n=0, **where, extra=said))
            continue
        said["tokens"] = float(np.median([sample.tokens for sample in variant.samples]))
        for stage in (*STAGES, "edit"):
            seconds, flops = variant.spread(stage), float(np.median([sample.flops[stage] for sample in variant.samples]))
            spread = {"low": seconds.low, "high": seconds.high, "n": seconds.n}
            measured = said | {"flops": flops}
            row = Record(SUITE, stage, seconds.median, "s", **spread, ceiling=flops / rate, **where, extra=measured)
            rows.append(row)
            if stage in ("denoise", "edit"):
                edits = variant.batch
                spread = {"low": edits / seconds.high, "high": edits / seconds.low, "ceiling": edits * rate / flops}
                rows.append(replace(row, name=f"{stage}s_per_second", value=edits / seconds.median, unit="1/s", **spread))
        if "compiled" in variant.name:
            compiling = max(0.0, variant.first - variant.spread("edit").median)
            rows.append(Record(SUITE, "compile", compiling, "s", **where, extra=said))
    return rows


def table_of(made: Sequence[Variant], rate: float, where: dict[str, Any], title: str) -> Table:
    machine = f"{where['device']}, {where['threads']} threads, {where['dtype']}, products at {rate / 1e12:.2f} TFLOP/s"
    table = Table(title=f"{title}\n{machine}")
    table.add_column("variant")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for variant in sorted(made, key=lambda v: (v.share or 0, v.name.startswith("Retouch"))):
        share = "any" if variant.share is None else f"{variant.share:.0%}"
        if variant.error:
            table.add_row(variant.name, share, "[red]ERROR " + escape(variant.error[:60]))
            continue
        at = {stage: variant.spread(stage) for stage in (*STAGES, "edit")}
        reached = {s: float(np.median([x.flops[s] for x in variant.samples])) / rate / at[s].median for s in at}
        table.add_row(
            variant.name, share, _ms(at["encode"].median), _ms(at["denoise"].median),
            f"{_ms(at['denoise'].low)} - {_ms(at['denoise'].high)}", f"{reached['denoise']:.0%}", _ms(at["finish"].median),
            _ms(at["edit"].median), f"{variant.batch / at['edit'].median:.2f}", f"{reached['edit']:.0%}",
        )  # fmt: skip
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.02 else f"{seconds * 1e3:.1f}"


def headline(made: Sequence[Variant]) -> list[tuple[str, float, float | None]]:
    """(what, ratio of medians, the issue's target): a single warm edit at 11 %, and packed 8 against packed 1."""
    found = {(v.name, v.share): v for v in made if v.samples}
    warm, eight = found.get(("Retouch warm", 0.11)), found.get(("Retouch warm x8", 0.11))
    if warm is None:
        return []
    whole = [v for v in found.values() if v.share is None]
    crops = [v for v in found.values() if v.share == 0.11 and " crop " in v.name]
    rivals = [
        ("denoise", "plain eager", [v for v in whole if v.name == "plain eager"], 8.0),
        ("denoise", "KV eager", [v for v in whole if v.name == "KV eager"], 5.0),
        ("denoise", "best compiled", [v for v in whole if v.name.endswith("compiled")], None),
        ("denoise", "best crop", crops, None),
        ("edit", "best whole-picture pipeline", whole, 5.0),
        ("edit", "best crop", crops, None),
    ]
    ratios: list[tuple[str, float, float | None]] = []
    for stage, name, among, target in rivals:
        if among:
            best = min(among, key=lambda v: v.spread(stage).median)
            label = f"{stage} vs {name}" + ("" if best.name == name else f" ({best.name})")
            ratios.append((label, best.spread(stage).median / warm.spread(stage).median, target))
    if eight is not None:
        for stage, label, target in (("denoise", "denoised edits/s", 2.0), ("edit", "whole edits/s", None)):
            ratios.append((f"{label}, packed 8 vs 1", 8 * warm.spread(stage).median / eight.spread(stage).median, target))
    return ratios
