"""The report's part on quality: everybody against the truth by kind of edit, and against the plain rung; the worst pictures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from retouch.measure import grids
from retouch.measure.gate import FAIL, PASS
from retouch.measure.grids import PSNR, scrolled
from retouch.measure.standing import Line, Standing
from retouch.record import Record

VERDICTS = {PASS: "good", FAIL: "bad"}


def quality(standing: Standing) -> str:
    grid = grids.by_kind(standing.lines)
    if not grid:
        return ""
    by_kind = f'<p class="quiet">{escape(judged_on(standing.lines))}</p>{grids.in_html(grid)}'
    return f"<h3>Quality</h3>{by_kind}{_losses(standing.lines)}{_worst(standing.lines)}"


def judged_on(lines: Sequence[Line]) -> str:
    """What the quality by kind is of, and what it does not show."""
    count = next(line.quality["", PSNR].n for line in lines if ("", PSNR) in line.quality)
    return (
        f"Inside the mask against the truth, PSNR in dB: means over {count} edits of the bundled set, the same for everybody. "
        "Its documents are 128 to 256 px wide and high, where a crop leaves out hardly anything: what one loses of its context "
        "in a larger picture is not seen here."
    )


def _table(head: str, rows: Sequence[str]) -> str:
    head = f"<thead><tr><th scope=col></th>{head}</tr></thead>"
    return scrolled(f"{head}<tbody>{''.join(rows)}</tbody>")


def _losses(lines: Sequence[Line]) -> str:
    """What each loses against the plain rung, with bounds, and the gate's word."""
    shown = [line for line in lines if line.gate is not None]
    if not shown:
        return ""
    rows = []
    for line in shown:
        assert line.gate is not None
        verdict = str(line.gate.extra.get("verdict", ""))
        cells = "".join(f"<td>{_bounded(line.losses.get(name))}</td>" for name in (PSNR, "inside ssimulacra2"))
        reasons = escape(str(line.gate.extra.get("reasons") or ""))
        rows.append(
            f'<tr><th scope=row>{escape(line.label)}</th>{cells}<td class="{VERDICTS.get(verdict, "")}">{escape(verdict)}</td>'
            f'<td class="words quiet">{reasons}</td></tr>'
        )
    head = "".join(f"<th scope=col>{name}</th>" for name in ("PSNR lost, dB", "SSIMULACRA2 lost", "verdict"))
    head += "<th scope=col class=words>why not a pass</th>"
    return (
        '<p class="quiet">Against the plain rung, edit by edit and seed by seed: the mean loss and its confidence bounds; '
        "below 0 it is better.</p>" + _table(head, rows)
    )


def _bounded(row: Record | None) -> str:
    if row is None or row.value is None:
        return "-"
    between = "" if row.low is None or row.high is None else f" ({row.low:+.2f} to {row.high:+.2f})"
    return f"{row.value:+.2f}{between}"


def _worst(lines: Sequence[Line]) -> str:
    made = []
    for line in lines:
        pictures = "".join(_picture(row) for row in line.worst)
        if pictures:
            made.append(f"<details><summary>The worst of {escape(line.label)}</summary>{pictures}</details>")
    return "".join(made)


def _picture(row: Record) -> str:
    extra = row.extra
    said = escape(f"“{extra['prompt']}”, {extra['case_kind']}: against plain it loses {extra['lost']}")
    over = "".join(f"<span>{name}</span>" for name in ("document", "truth", "plain", "this"))
    return (
        f'<div class="worst"><p class="quiet">{said}</p><div class="over">{over}</div>'
        f'<img src="{escape(str(extra["picture"]))}" alt="{said}" width="576" height="144"></div>'
    )
