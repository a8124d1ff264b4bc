"""The table of `retouch bench`, for terminals and as cells for the reports; and what is said below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from retouch.measure.standing import Claim, Line, Standing
from retouch.measure.subjects import RUNG
from retouch.measure.tally import ASKED_AGAIN
from retouch.measure.waterfall import WITHIN

EXACT = "identical outside the mask"


@dataclass(frozen=True, slots=True)
class Column:
    """`row` is the name of the Record whose value it shows; `kind` where that is one of quality's: of edits, "" for all."""

    head: str
    row: str = ""
    kind: str | None = None


COLUMNS = (
    Column("$ / million edits"), Column("times ours"), Column("edits/s", "edits per second"), Column("p50", "latency p50"),
    Column("p95", "latency p95"), Column("device s", "device seconds an edit"),
    Column("PSNR inside", "inside psnr", ""), Column("of removal", "inside psnr", "remove on photos"),
    Column("SSIMULACRA2", "inside ssimulacra2", ""),
    Column("same outside", EXACT),    Column("quality"),
)  # fmt: skip


def columns(standing: Standing) -> list[Column]:
    """Those that anybody has something in."""
    shown = [[cell(standing, line, column) for line in standing.lines if not line.error] for column in COLUMNS]
    return [column for column, cells in zip(COLUMNS, shown, strict=True) if any(one not in ("", "-") for one in cells)]


def cell(standing: Standing, line: Line, column: Column) -> str:
    if column.head == COLUMNS[0].head:
        return "" if line.cost is None else dollars(line.cost)
    if column.head == "times ours":
        ours = standing.ours
        return "" if ours is None or not ours.settled or line.settled is None else f"{line.settled / ours.settled:.2f}"
    if column.head == "quality":
        return "-" if line.gate is None else str(line.gate.extra.get("verdict", "-"))
    if column.kind is not None:
        found = line.quality.get((column.kind, column.row))
        return "-" if found is None or found.value is None else f"{found.value:.2f}"
    value = line.value(column.row)
    if value is None:
        return "-"
    return f"{value:.2f}" if column.head == "edits/s" else seconds(value) if column.row != EXACT else f"{value:.0%}"


def dollars(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"


def seconds(value: float) -> str:
    return f"{value * 1e3:,.0f} ms" if value < 1 else f"{value:,.2f} s"


def said(claim: Claim) -> str:
    target = "" if claim.target is None else f" (target {claim.target:g}x: {'met' if claim.holds else 'missed'})"
    return f"{claim.times:.1f} x fewer dollars than {claim.what}, {claim.theirs}{target}"


def notes(standing: Standing) -> list[str]:
    """What has to be known to read the table."""
    extra, first = standing.extra, standing.first
    trace = f"{extra['requests']} requests of the mix {standing.mix}" + (f" ({extra['knobs']})" if extra.get("knobs") else "")
    found = [
        f"{trace}, {extra['model']} in {first.dtype} on {first.processor}, {first.threads} threads, "
        f"${extra['price_per_hour']:.4g} an hour ({extra['price_source']})",
    ]
    rates = [rate for line in standing.lines for rate in line.rates or ()]
    if rates:
        low, high = min(rates) / 1e12, max(rates) / 1e12
        found.append(f"matrix products ran at {low:.3g} to {high:.3g} TFLOP/s meanwhile")
    return found + [one for one in (gated(standing), unjudged(standing)) if one] + of_fall(standing) + drift(standing)


def gated(standing: Standing) -> str:
    """Whether the quality gate lets the cheapest rung pass; "" where nobody asked."""
    ours = standing.ours
    if ours is None and any(line.role == RUNG and line.cost is not None for line in standing.lines):
        return "no rung is ours: none was held against the plain rung's answers and passed"
    if ours is None or ours.gate is None:
        return ""
    verdict, reasons = (str(ours.gate.extra.get(name) or "") for name in ("verdict", "reasons"))
    return f"quality of {ours.label} against the plain rung: {verdict}" + (f" ({reasons})" if reasons else "")


def unjudged(standing: Standing) -> str:
    """Why some have no verdict: where a run went on, the plain rung did not answer again."""
    found = [(line.label, row.error) for line in standing.lines if (row := line.figures.get(ASKED_AGAIN)) and row.error]
    return "; ".join(f"ERROR {label}, asked again, so that who came later was not judged: {error}" for label, error in found)


def of_fall(standing: Standing) -> list[str]:
    fall = standing.fall
    if fall is None:
        return []
    parts = [f"{cause} {dollars(value)}" for cause, value in fall.savings.items()]
    found = [f"saved per million edits, of {dollars(fall.plain)}: {', '.join(parts)}; left {dollars(fall.last)}"]
    if fall.share is not None:
        fits = "adds up" if fall.adds_up else f"does NOT add up within {WITHIN:.0%}"
        found.append(f"the parts' sum is {fall.share:.1%} off the saving measured again: it {fits}")
    return found


def drift(standing: Standing) -> list[str]:
    """Both costs of a rung that was measured twice, and which savings are lost between them; who had a slower machine."""
    found = []
    for line in standing.lines:
        if line.cost is None or line.again is None or line.settled is None:
            continue
        between = abs(line.again - line.cost)
        savings = {} if standing.fall is None else standing.fall.savings
        lost = [f"{cause} {dollars(value)}" for cause, value in savings.items() if abs(value) < between]
        said = f"{line.label} cost {dollars(line.cost)}, measured again {dollars(line.again)}"
        said += f" ({line.again / line.cost - 1:+.1%}); it counts with the mean, {dollars(line.settled)}"
        if lost:
            said += f". Smaller than the difference of the two, {dollars(between)}, so unresolved: {', '.join(lost)}"
        found.append(said)
    if standing.slowed:
        shares = [(standing.line(name), share) for name, share in standing.slowed.items()]
        names = ", ".join(f"{line.label} ({share:.0%})" for line, share in shares if line is not None)
        found.append(f"measured while the machine was slower than it usually was in this run: {names}")
    return found


def show(standing: Standing, console: Console) -> None:
    shown = columns(standing)
    table = Table(title=f"retouch bench, {standing.mix}", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for column in shown:
        table.add_column(column.head, justify="right")
    for line in standing.lines:
        cells: Sequence[str] = [escape(cell(standing, line, column)) for column in shown]
        table.add_row(escape(line.label), *(["[red]ERROR"] + [""] * (len(shown) - 1) if line.error else cells))
    console.print(table, highlight=False)
    for line in standing.lines:
        if line.error:
            console.print(f"ERROR {line.label}: {line.error}", style="red", markup=False, highlight=False, soft_wrap=True)
    for claim in standing.claims():
        console.print(said(claim), markup=False, highlight=False, soft_wrap=True)
    for note in notes(standing):
        console.print(note, style="dim", markup=False, highlight=False, soft_wrap=True)
