"""The report of `retouch bench`: one HTML file that needs nothing else, and its tables in Markdown. From rows alone.

The charts, the worst pictures, the losses' bounds and what was measured in which order are in the HTML alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from retouch.edit import OutputFailed
from retouch.measure import charts, grids, table
from retouch.measure.charts import Bar, Curve, Part
from retouch.measure.grids import scrolled
from retouch.measure.report_quality import VERDICTS, judged_on, quality
from retouch.measure.standing import Claim, Line, Standing
from retouch.measure.subjects import AGAIN, RUNG
from retouch.measure.table import dollars

CSS = Path(__file__).with_name("report.css")
STAGES = dict(zip(grids.STAGES, ("s1", "s2", "s3", "s4", "s5", "s6", "idle"), strict=True))
LOOKS = ("s1", "s3", "s4", "s2", "s5", "s6", "s7")
ROLES = {
    "full": ("peer", "peers, the whole picture"),
    "crop": ("s1", "peers, a crop around the mask"),
    "other": ("s3", "other peers"),
    RUNG: ("own", "rungs of Retouch"),
}
"""Class and meaning of a bar."""


def write(path: Path, standings: Sequence[Standing]) -> None:
    """The HTML, and Markdown beside it under the same name. Raises OutputFailed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html(standings), encoding="utf-8")
        path.with_suffix(".md").write_text(markdown(standings), encoding="utf-8")
    except OSError as error:
        raise OutputFailed(f"{path} cannot be written ({error.strerror or error}); give another --report.") from error


def html(standings: Sequence[Standing]) -> str:
    first = standings[0].first
    links = "".join(f'<a href="#{escape(one.mix)}">{escape(one.mix)}</a>' for one in standings)
    commit = f"{first.commit[:10]}{' and changes' if first.dirty else ''}" if first.commit else "unknown"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>What a million edits cost</title>'
        f"<style>{CSS.read_text(encoding='utf-8')}</style></head><body>"
        f"<header><h1>What a million edits cost</h1>"
        f'<p class="quiet">{escape(first.processor)}, {first.threads} threads, {escape(first.dtype)}; '
        f"{escape(str(first.extra['model']))}; commit {escape(commit)}; {escape(first.date[:10])}</p>"
        f"{f'<nav>{links}</nav>' if len(standings) > 1 else ''}</header><main>"
        f"{''.join(map(_section, standings))}</main></body></html>\n"
    )


def _section(standing: Standing) -> str:
    extra = standing.extra
    return (
        f'<section id="{escape(standing.mix)}"><h2>{escape(standing.mix.capitalize())}</h2>'
        f'<p class="quiet">{extra["requests"]} requests; each subject a fresh process that serves HTTP, all asked by one '
        f"client in a closed loop. Dollars: ${extra['price_per_hour']:.4g} an hour of the machine over its edits an hour.</p>"
        f"{_claims(standing)}{_costs(standing)}{_table(standing)}{_errors(standing)}{_waterfall(standing)}{_stages(standing)}"
        f"{_curves(standing)}{quality(standing)}{_machine(standing)}</section>"
    )


def _claims(standing: Standing) -> str:
    items = "".join(f"<li>{_claim(claim)}</li>" for claim in standing.claims())
    ours = standing.ours
    if ours is not None and ours.gate is not None:
        verdict, reasons = (escape(str(ours.gate.extra.get(name) or "")) for name in ("verdict", "reasons"))
        items += (
            f'<li><b class="{VERDICTS.get(verdict, "")}">{verdict}</b> is what the quality gate says of {escape(ours.label)}'
        )
        items += f' against the plain rung<small class="quiet">{reasons}</small></li>'
    return f'<ul class="claims">{items}</ul>' if items else ""


def _claim(claim: Claim) -> str:
    target = ""
    if claim.target is not None:
        look, word = ("good", "met") if claim.holds else ("bad", "missed")
        target = f'<small class="{look}">target {claim.target:g}×: {word}</small>'
    return f"<b>{claim.times:.1f}×</b> fewer dollars than {escape(claim.what)}, {escape(claim.theirs)}{target}"


def _costs(standing: Standing) -> str:
    lines = [line for line in standing.lines if line.cost is not None and line.role != AGAIN]
    if not lines:
        return ""
    shown = []
    for line in lines:
        shown.append(Bar(line.label, f"${dollars(line.cost or 0)}", [Part(0, line.cost or 0, ROLES[line.role][0])]))
    looks = [meant for role, meant in ROLES.items() if any(line.role == role for line in lines)]
    return (
        f"<h3>Dollars per million edits</h3><figure>{charts.legend(looks)}"
        f"{charts.bars(shown, f'dollars per million edits, {standing.mix}')}</figure>"
    )


def _table(standing: Standing) -> str:
    shown = table.columns(standing)
    head = "".join(f"<th scope=col>{escape(column.head)}</th>" for column in shown)
    rows = "".join(_row(standing, line, shown) for line in standing.lines if not line.error)
    said = [*table.drift(standing), table.unjudged(standing), table.gated(standing) if standing.ours is None else ""]
    below = "".join(f'<p class="quiet">{escape(note)}</p>' for note in said if note)
    return scrolled(f"<thead><tr><th scope=col></th>{head}</tr></thead><tbody>{rows}</tbody>") + below


def _row(standing: Standing, line: Line, shown: Sequence[table.Column]) -> str:
    looks = [name for name, has in (("ours", line.role == RUNG), ("best", line is standing.ours)) if has]
    cells = "".join(f"<td>{escape(table.cell(standing, line, column))}</td>" for column in shown)
    return f'<tr class="{" ".join(looks)}"><th scope=row>{escape(line.label)}</th>{cells}</tr>'


def _errors(standing: Standing) -> str:
    found = [line for line in standing.lines if line.error]
    return "".join(
        f'<details><summary><span class="bad">ERROR</span> {escape(line.label)}: {escape(line.error)}</summary>'
        f"<pre>{escape(line.log or 'it printed nothing')}</pre></details>"
        for line in found
    )


def _waterfall(standing: Standing) -> str:
    fall = standing.fall
    if fall is None:
        return ""
    left, shown = fall.plain, [Bar("plain pipeline", f"${dollars(fall.plain)}", [Part(0, fall.plain, "own")])]
    for cause, saving in fall.savings.items():
        parts = [Part(0, min(left, left - saving), "own"), Part(left - saving, left, "saved" if saving >= 0 else "s4")]
        shown.append(Bar(cause, f"{'−' if saving >= 0 else '+'}${dollars(abs(saving))}", parts))
        left -= saving
    shown.append(Bar("what is left", f"${dollars(fall.last)}", [Part(0, fall.last, "own")]))
    if fall.again is not None:
        shown.append(Bar("the same, measured again", f"${dollars(fall.again)}", [Part(0, fall.again, "own")]))
    said = " ".join(f"{note[0].upper()}{note[1:]}." for note in table.of_fall(standing)[1:])
    return (
        f"<h3>What each cause saves</h3><figure>{charts.legend([('own', 'dollars per million edits'), ('saved', 'saved')])}"
        f"{charts.bars(shown, 'the cost waterfall')}<figcaption>{escape(said)}</figcaption></figure>"
    )


def _stages(standing: Standing) -> str:
    lines = [line for line in standing.lines if line.role == RUNG and line.stages]
    if not lines:
        return ""
    seen = [stage for stage in STAGES if any(line.stages.get(stage) for line in lines)]
    shown = []
    for line in lines:
        at, parts = 0.0, []
        for stage in seen:
            cost = max(0.0, line.stages.get(stage, 0.0))
            parts.append(Part(at, at + cost, STAGES[stage], f"{stage}: ${dollars(cost)}"))
            at += cost
        shown.append(Bar(line.label, f"${dollars(line.cost or at)}", parts))
    return (
        f"<h3>Where the dollars go</h3><figure>{charts.legend((STAGES[stage], stage) for stage in seen)}"
        f"{charts.bars(shown, 'dollars per million edits by stage')}</figure>" + grids.in_html(grids.stages(standing))
    )


def _curves(standing: Standing) -> str:
    lines = [line for line in standing.lines if line.curve and line.role != AGAIN]
    if not lines:
        return ""
    shown = []
    for index, line in enumerate(lines):
        look = LOOKS[index % len(LOOKS)] + (" dashed" if index >= len(LOOKS) else "")
        points = []
        for row in sorted(line.curve, key=lambda row: float(row.extra["rate"] or 0)):
            edits = float(row.extra["rate"] or 0) * float(row.extra["edits"] or 0) / row.n
            points.append((edits, row.value or 0.0, row.low or 0.0, row.high or 0.0))
        shown.append(Curve(line.label, "own" if line is standing.ours else look, points))
    return (
        f"<h3>Latency against load</h3><figure>{charts.legend([(one.look, one.name) for one in shown])}"
        f"{charts.curves(shown, 'median latency against load', 'edits a second', 'seconds, median with p10 to p90')}"
        "<figcaption>Open loop: requests come whether earlier ones are answered or not, at shares of what each subject served "
        "in the closed loop. Both axes are logarithmic.</figcaption></figure>"
    )


def _machine(standing: Standing) -> str:
    extra, first = standing.extra, standing.first
    facts = {
        "trace": f"{extra.get('trace') or 'made'}, {extra['trace_hash']}, seed {extra['trace_seed']}", "knobs": extra["knobs"],
        "price": f"${extra['price_per_hour']:.4g} an hour: {extra['price_source']}", "processor": first.processor,
        "device": first.device, "threads": f"{first.threads} of {extra['vcpus']:g} CPUs", "dtype": first.dtype,
        "versions": f"Python {first.python}, torch {first.torch}, diffusers {first.diffusers}",
        "commit": f"{first.commit}{', with changes' if first.dirty else ''}", "begun": first.date, "run": str(extra["run"]),
    }  # fmt: skip
    told = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    lines = sorted((line for line in standing.lines if line.rates), key=lambda line: line.order)
    rows = "".join(
        f"<tr><th scope=row>{escape(line.label)}</th>{''.join(f'<td>{rate / 1e9:,.0f}</td>' for rate in line.rates or ())}"
        f"<td>{line.clients}</td>{''.join(f'<td>{_spent(line, name)}</td>' for name in ('start', 'warm-up'))}</tr>"
        for line in lines
    )
    head = "<th scope=col>GFLOP/s before</th><th scope=col>after</th><th scope=col>requests at once</th>"
    head += "<th scope=col>start</th><th scope=col>warm-up</th>"
    return (
        f'<h3>Machine and settings</h3><dl class="facts">{told}</dl>'
        '<p class="quiet">In the order in which they were measured, with the rate of square matrix products just before and '
        "after each: the ceiling of all of them, and whether the machine was the same for all.</p>"
        + scrolled(f"<thead><tr><th scope=col></th>{head}</tr></thead><tbody>{rows}</tbody>")
    )


def _spent(line: Line, name: str) -> str:
    value = line.value(name)
    return "-" if value is None else table.seconds(value)


def markdown(standings: Sequence[Standing]) -> str:
    parts = ["# What a million edits cost\n"]
    for standing in standings:
        parts += [f"## {standing.mix.capitalize()}\n", markdown_table(standing)]
        parts += _list(table.said(claim) for claim in standing.claims())
        parts += _list(f"ERROR {line.label}: {line.error}" for line in standing.lines if line.error)
        parts += _list(table.notes(standing))
        quality_by_kind = grids.by_kind(standing.lines)
        more = {
            "Where the dollars go": grids.stages(standing), "Latency against load": grids.at_load(standing),
            "Quality": quality_by_kind,
        }  # fmt: skip
        for head, grid in more.items():
            parts += [f"### {head}\n", grids.in_markdown(grid)] if grid else []
        parts += [f"{judged_on(standing.lines)}\n"] if quality_by_kind else []
    return "\n".join(parts)


def _list(items: Iterable[str]) -> list[str]:
    found = [f"- {item}" for item in items]
    return ["\n".join(found) + "\n"] if found else []


def markdown_table(standing: Standing) -> str:
    """Of those that have a cost; the second measurement of the last rung is left to the notes."""
    shown = table.columns(standing)
    rows = [["", *(column.head for column in shown)]]
    for line in standing.lines:
        if line.cost is not None and line.role != AGAIN:
            name = f"**{line.label}**" if line is standing.ours else line.label
            rows.append([name, *(table.cell(standing, line, column) for column in shown)])
    return grids.in_markdown(rows)
