"""Charts as inline SVG. Sideways they are in per cent, so that they become narrower without their letters becoming smaller.

Colours are classes of `report.css`, which knows dark and light.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

ROW, BAR, LETTERS = 50, 16, 15
"""Pixels: of a row, of its bar, and down to the foot of the label above that."""


@dataclass(frozen=True, slots=True)
class Part:
    """Of a bar: from `start` to `end` in the chart's unit, of the colour of the class `look`; `title` is a tooltip."""

    start: float
    end: float
    look: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Bar:
    label: str
    value: str
    parts: Sequence[Part]


def bars(shown: Sequence[Bar], about: str) -> str:
    """A row each: label and value, and below them the bar."""
    ends = [at for bar in shown for part in bar.parts for at in (part.start, part.end)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    scale = 100 / ((high - low) or 1.0)
    made = []
    for index, bar in enumerate(shown):
        y = index * ROW
        made.append(f'<text x="0" y="{y + LETTERS}" class="label">{escape(bar.label)}</text>')
        made.append(f'<text x="100%" y="{y + LETTERS}" class="amount">{escape(bar.value)}</text>')
        made.append(f'<rect x="0" y="{y + LETTERS + 6}" width="100%" height="{BAR}" class="trough"/>')
        for part in bar.parts:
            x, width = scale * (min(part.start, part.end) - low), scale * abs(part.end - part.start)
            made.append(
                f'<rect x="{x:.3f}%" y="{y + LETTERS + 6}" width="{max(width, 0.15):.3f}%" height="{BAR}" class="{part.look}">'
                f"<title>{escape(part.title or bar.label)}</title></rect>"
            )
    return _svg(len(shown) * ROW, about, made)


def legend(looks: Iterable[tuple[str, str]]) -> str:
    """Each a class, and what it stands for."""
    keys = "".join(f'<li><i class="{look}"></i>{escape(name)}</li>' for look, name in looks)
    return f'<ul class="legend">{keys}</ul>'


@dataclass(frozen=True, slots=True)
class Curve:
    """Points (x, y, low, high), x rising, all above 0."""

    name: str
    look: str
    points: Sequence[tuple[float, float, float, float]]


def curves(shown: Sequence[Curve], about: str, across: str, up: str, height: int = 300) -> str:
    """On logarithmic axes, with whiskers from low to high."""
    xs = [point[0] for curve in shown for point in curve.points]
    ys = [at for curve in shown for point in curve.points for at in point[1:]]
    (x0, x1), (y0, y1) = _range(xs), _range(ys)
    top = 24

    def at(x: float, y: float) -> tuple[float, float]:
        return 100 * math.log(x / x0) / math.log(x1 / x0), 100 - 100 * math.log(y / y0) / math.log(y1 / y0)

    inside, labels = [], list[str]()
    for tick in _ticks(x0, x1):
        x, _ = at(tick, y0)
        inside.append(f'<path d="M{x:.2f} 0V100" class="grid"/>')
        labels.append(f'<text x="{x:.2f}%" y="{height + 16}" class="tick middle">{tick:g}</text>')
    for tick in _ticks(y0, y1):
        _, y = at(x0, tick)
        inside.append(f'<path d="M0 {y:.2f}H100" class="grid"/>')
        labels.append(f'<text x="0" y="{y * height / 100 - 4:.1f}" class="tick">{tick:g}</text>')
    for curve in shown:
        places = [at(x, y) for x, y, _, _ in curve.points]
        path = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in places)
        whiskers = "".join(f"M{at(x, low)[0]:.2f} {at(x, low)[1]:.2f}V{at(x, high)[1]:.2f}" for x, _, low, high in curve.points)
        inside.append(f'<path d="{whiskers}" class="whisker {curve.look}"/><path d="{path}" class="curve {curve.look}"/>')
        for (x, y), (rate, seconds, _, _) in zip(places, curve.points, strict=True):
            title = f"{curve.name}: {seconds:.3g} s at {rate:.3g} edits/s"
            labels.append(
                f'<circle cx="{x:.2f}%" cy="{y * height / 100:.1f}" r="3.5" class="dot {curve.look}">'
                f"<title>{escape(title)}</title></circle>"
            )
    plot = (
        f'<svg y="{top}" width="100%" height="{height}" overflow="visible">'
        f'<svg width="100%" height="{height}" viewBox="0 0 100 100" preserveAspectRatio="none" overflow="visible">'
        f"{''.join(inside)}</svg>{''.join(labels)}</svg>"
    )
    named = [f'<text x="0" y="12" class="tick">{escape(up)}</text>', plot]
    named.append(f'<text x="100%" y="{height + top + 34}" class="amount tick">{escape(across)}</text>')
    return _svg(height + top + 42, about, named)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """With some room around them."""
    low, high = min(values), max(values)
    return low / 1.15, high * 1.15


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of each power of ten; the powers alone where these would be many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 4 else (1,)
    return [tick for power in powers for step in steps if low <= (tick := step * 10.0**power) <= high]


def _svg(height: int, about: str, inside: Sequence[str]) -> str:
    return f'<svg class="chart" width="100%" height="{height}" role="img" aria-label="{escape(about)}">{"".join(inside)}</svg>'
