"""What a replay comes to: percentiles, throughput, goodput and errors, as Records and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from retouch.measure.load import Answer, Replay, Saturation
from retouch.record import Record, Scalar

SUITE = "load"
PERCENTILES = (50, 90, 95, 99)


def records(
    replay: Replay, where: Mapping[str, Any], extra: Mapping[str, Scalar], deadline: float | None = None
) -> list[Record]:
    """`where` is `record.environment`. Without a single answer that was served, one row says why."""
    answers = replay.answers
    served = [answer for answer in answers if not answer.error]

    def row(name: str, value: float | None, unit: str, **more: Any) -> Record:
        said = more.pop("said", {})
        return Record(SUITE, name, value, unit, **{"n": len(served), **more}, **where, extra={**extra, **said})

    errors = [
        row("errors", float(count), "1", n=len(answers), said={"cause": cause, "detail": detail})
        for cause, count, detail in causes(answers)
    ]
    if not served:
        return [row("latency p50", None, "s", n=0, error=failure(answers)), *errors]
    seconds = [answer.seconds for answer in served]
    low, high = (float(np.percentile(seconds, at)) for at in (10, 90))
    spread = {50: {"low": low, "high": high}}
    rows = [
        row(f"latency p{at}", float(np.percentile(seconds, at)), "s", **spread.get(at, {})) for at in percentiles(len(served))
    ]
    rows.append(row("requests per second", len(served) / replay.seconds, "1/s"))
    rows.append(row("edits per second", sum(answer.n for answer in served) / replay.seconds, "1/s"))
    if deadline is not None or any(answer.deadline is not None for answer in answers):
        good = sum(answer.good(deadline) for answer in answers)
        said = {"deadline": deadline}
        rows.append(row("goodput", good / replay.seconds, "1/s", n=len(answers), said=said))
        rows.append(row("served in time", good / len(answers), "1", n=len(answers), said=said))
    rows.append(row("sent late p99", float(np.percentile([answer.late for answer in answers], 99)), "s", n=len(answers)))
    return [*rows, *_costs(served, row), *errors]


def _costs(served: Sequence[Answer], row: Any) -> list[Record]:
    """Where the target says what its answers took."""
    usages = [(answer.usage, answer.n) for answer in served if answer.usage is not None]
    edits = sum(n for _, n in usages)
    if not edits:
        return []
    spent = sum(sum(usage.seconds.values()) for usage, _ in usages)
    hits = sum(usage.cache_hits.count("document") for usage, _ in usages)
    whole = sum(usage.tokens_whole for usage, _ in usages)
    rows = [
        row("device seconds an edit", spent / edits, "s", n=edits),
        row("edits that found their document encoded", hits / edits, "1", n=edits),
    ]
    if whole:
        computed = sum(usage.tokens_computed for usage, _ in usages)
        rows.append(row("image tokens computed, of the whole", computed / whole, "1", n=edits))
    return rows


def percentiles(count: int) -> list[int]:
    """Those that so many answers can tell; the median always."""
    return [at for at in PERCENTILES if at == 50 or count * (100 - at) >= 100]


def causes(answers: Sequence[Answer]) -> list[tuple[str, int, str]]:
    """(cause, how often, what the first of them said), the most frequent first."""
    counts = Counter(answer.error for answer in answers if answer.error)
    return [
        (cause, count, next(answer.detail for answer in answers if answer.error == cause))
        for cause, count in counts.most_common()
    ]


def failure(answers: Sequence[Answer]) -> str:
    """Why nothing was served, in one line."""
    told = [f"{count} x {cause}" + (f" ({detail})" if detail else "") for cause, count, detail in causes(answers)]
    return f"nothing was served: {'; '.join(told) or 'no request was sent'}"


def saturated(
    found: Saturation, where: Mapping[str, Any], extra: Mapping[str, Scalar], share: float, deadline: float | None, why: str
) -> Record:
    """`why` is what the last probe's requests failed of, if they did."""
    said = {**extra, "share": share, "deadline": deadline, "probes": len(found.probes)}
    low, high = found.held, found.failed
    error = ""
    if low is None:
        slowest = min(probe.rate for probe in found.probes)
        error = f"even at {slowest:.3g} requests a second fewer than {share:.0%} were served in time ({why or 'all late'})"
    elif high is None:
        error = f"undecided: it held {low:.3g} requests a second, the most that a trace of this length can tell; make it longer"
    value = low if not error else None
    return Record(SUITE, "saturating rate", value, "1/s", low, high, len(found.probes), error=error, **where, extra=said)


def table(rows: Sequence[Record], title: str) -> Table:
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False)
    shown.add_column("")
    shown.add_column("", justify="right")
    shown.add_column("")
    for row in rows:
        if row.error:
            shown.add_row(f"[red]ERROR {row.name}", "", escape(row.error))
        elif row.name == "errors":
            cause, detail = (escape(str(row.extra[name])) for name in ("cause", "detail"))
            shown.add_row(f"[red]errors: {cause}", f"{row.value:.0f}", detail)
        elif row.name == "saturating rate":
            shown.add_row(row.name, value_of(row.value, row.unit), f"holds; {row.high:.3g} does not")
        else:
            shown.add_row(row.name, value_of(row.value, row.unit), "")
    return shown


def value_of(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "s":
        return f"{value * 1e3:,.1f} ms" if abs(value) < 10 else f"{value:,.1f} s"
    return f"{100 * value:.1f} %" if unit == "1" else f"{value:,.3f} {unit}".strip()
