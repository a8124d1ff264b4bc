"""Tables of figures as text, made once for both reports: a head, then a row a subject, named in its first cell."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from retouch.measure.standing import Line, Standing
from retouch.measure.subjects import AGAIN, RUNG
from retouch.measure.table import dollars, seconds
from retouch.measure.tally import IDLE
from retouch.record import Record

Grid = list[list[str]]

PSNR = "inside psnr"
STAGES = ("document", "prompt", "start", "step", "finish", "preview", IDLE)


def by_kind(lines: Sequence[Line]) -> Grid:
    """PSNR inside the mask against the truth, in columns by kind of edit; [] where nobody was judged."""
    lines = [line for line in lines if ("", PSNR) in line.quality]
    if not lines:
        return []
    kinds = ["", *dict.fromkeys(kind for line in lines for kind, name in line.quality if kind and name == PSNR)]
    grid = [["PSNR inside, dB", *(kind or "all" for kind in kinds), "SSIMULACRA2, all", "hue as asked"]]
    for line in lines:
        right = line.quality.get(("", "what was asked is there"))
        cells = [_value(line.quality.get((kind, PSNR))) for kind in kinds]
        cells.append(_value(line.quality.get(("", "inside ssimulacra2"))))
        grid.append([line.label, *cells, "-" if right is None or right.value is None else f"{right.value:.0%}"])
    return grid


def _value(row: Record | None) -> str:
    return "-" if row is None or row.value is None else f"{row.value:.2f}"


def stages(standing: Standing) -> Grid:
    """Dollars per million edits of the rungs, by what the device did."""
    lines = [line for line in standing.lines if line.role == RUNG and line.stages]
    if not lines:
        return []
    seen = [stage for stage in STAGES if any(line.stages.get(stage) for line in lines)]
    rows = [[line.label, *(dollars(line.stages.get(stage, 0.0)) for stage in seen)] for line in lines]
    return [["$ / million edits", *seen], *rows]


def at_load(standing: Standing) -> Grid:
    """Latency of the open loop, a row for each rate of each subject."""
    grid = [["latency at load", "of its saturation", "requests/s", "median", "p10", "p90"]]
    for line in standing.lines:
        for row in sorted(line.curve, key=lambda row: float(row.extra["rate"] or 0)) if line.role != AGAIN else ():
            ends = ["-" if value is None else seconds(value) for value in (row.value, row.low, row.high)]
            rate, load = (float(row.extra[name] or 0) for name in ("rate", "load"))
            grid.append([line.label, f"{load:.0%}", f"{rate:.3g}", *ends])
    return grid if len(grid) > 1 else []


def in_html(grid: Grid) -> str:
    head, *rows = grid
    top = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return scrolled(f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>")


def scrolled(inside: str) -> str:
    """A table that a narrow page lets scroll."""
    return f'<div class="scroll"><table>{inside}</table></div>'


def in_markdown(grid: Grid) -> str:
    """An empty one is no text."""
    if not grid:
        return ""
    rows = [grid[0], ["---", *("---:" for _ in grid[0][1:])], *grid[1:]]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows) + "\n"
