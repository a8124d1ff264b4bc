"""What `retouch quality` prints, from its rows."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from retouch.measure.cases import Case
from retouch.measure.gate import GATED, LOSS, Verdict
from retouch.record import Record

FLOOR = "floor: "


def tables(
    rows: Sequence[Record], cases: Sequence[Case], seeds: int, verdict: Verdict | None, names: tuple[str, str]
) -> list[Table | Text]:  # fmt: skip
    """The paths' means by zone, the noise floor, the paired losses. `names` are the plain path's and the fast one's."""
    paths = list(dict.fromkeys(str(row.extra["path"]) for row in rows))
    found = _means(rows, paths, f"{len(cases)} cases, {seeds} seeds; means over all, and PSNR inside by kind")
    noise = [row for row in rows if row.name.startswith(FLOOR)]
    if noise:
        found.append(_noise(noise))
    if verdict is not None:
        found.append(_losses(verdict, *names))
    return found


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def _means(rows: Sequence[Record], paths: Sequence[str], title: str) -> list[Table | Text]:
    table = _table(title, "", *paths, "")
    values: dict[str, dict[str, Record]] = {}
    for row in rows:
        if row.name.startswith((LOSS, FLOOR, GATED)):
            continue
        kind = str(row.extra.get("kind") or "")
        if not kind or row.name in ("inside psnr", "what was asked is there"):
            values.setdefault(f"{row.name}, {kind}" if kind else row.name, {})[str(row.extra["path"])] = row
    wrong: dict[str, list[str]] = {}
    for name, by_path in values.items():
        error = next((row.error for row in by_path.values() if row.error), "")
        if error and all(row.value is None for row in by_path.values()):
            wrong.setdefault(error, []).append(name.removeprefix("inside "))
            continue
        cells = ["" if path not in by_path else _value(by_path[path]) for path in paths]
        table.add_row(name, *cells, f"[yellow]{escape(error)}" if error else next(iter(by_path.values())).unit)
    return [table, *(Text(f"not measured: {', '.join(names)}: {error}", "yellow") for error, names in wrong.items())]


def _value(row: Record) -> str:
    return "-" if row.value is None else f"{row.value:.4g}"


def _noise(rows: Sequence[Record]) -> Table:
    table = _table("noise floor: the plain path against itself", "", "", "from", "to", "")
    for row in rows:
        variant = str(row.extra.get("variant", ""))
        ends = ["" if end is None else f"{end:+.3g}" for end in (row.low, row.high)]
        name = row.name.removeprefix(FLOOR)
        told = f"[yellow]{escape(row.error)}" if row.error else ""
        if "identical" in row.extra:
            told = f"{row.extra['identical']} of {row.n} identical, at most {row.extra['largest_difference']} levels apart"
        table.add_row(f"{variant}: {name}" if variant else name, f"{_value(row)} {row.unit}", *ends, told)
    return table


def _losses(verdict: Verdict, plain: str, fast: str) -> Table:
    title = f"{fast} against {plain}: paired losses, above 0 it is worse"
    table = _table(title, "", "mean", "from", "to", "limit", plain, fast)
    for loss in sorted(verdict.losses.values(), key=lambda loss: loss.limit is None):
        wrong = loss.limit is not None and loss.high >= loss.limit
        limit = "" if loss.limit is None else f"{loss.limit:g}"
        cells = (f"{loss.mean:+.3g}", f"{loss.low:+.3g}", f"{loss.high:+.3g}", limit, f"{loss.plain:.4g}", f"{loss.fast:.4g}")
        table.add_row(loss.name, *cells, style="red" if wrong else "")
    return table
