"""The statistics of a trace, each beside what is published of it: `retouch trace show`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

from retouch.boxes import Size
from retouch.measure.masks import share_of
from retouch.measure.published import IMAGES_A_PROMPT, QUANTILES, SOURCES, TURNS_A_SESSION, VARIATIONS
from retouch.trace import Request, Result, Shape, Trace, View

WINDOW = 10.0
"""Seconds of the stretches in which arrivals are counted."""

Value = TypeVar("Value", str, Shape)


@dataclass(frozen=True, slots=True)
class Figure:
    """`published` is what else is known: a number to compare with, or a word on it."""

    group: str
    name: str
    value: float
    unit: str = ""
    published: float | str = ""


def figures(trace: Trace) -> list[Figure]:
    return [*_time(trace), *_sessions(trace), *_reuse(trace), *_masks(trace)]


def _time(trace: Trace) -> list[Figure]:
    requests = trace.requests
    starts = [of_session[0].at for of_session in _by_session(trace).values()]
    found = [Figure("traffic", "requests", len(requests)), Figure("traffic", "sessions", len(starts))]
    span = requests[-1].at - requests[0].at
    found.append(Figure("traffic", "span", span, "s"))
    if span:
        found.append(Figure("traffic", "requests a second", (len(requests) - 1) / span, "1/s"))
    counts = np.bincount(((np.array(starts) - starts[0]) / WINDOW).astype(int))[:-1]
    if len(counts) >= 10:
        name = f"sessions begun in {WINDOW:g} s: variance over mean"
        found.append(Figure("traffic", name, float(counts.var() / counts.mean()), "", "1 is Poisson; bursts unpublished"))
    return found


def _sessions(trace: Trace) -> list[Figure]:
    sessions = _by_session(trace).values()
    gaps = [after.at - before.at for turns in sessions for before, after in pairwise(turns)]
    turns = len(trace.requests) / len(sessions)
    found = [Figure("sessions", "turns", turns, "", f"{TURNS_A_SESSION} in a data set; 2 to 4 assumed")]
    if gaps:
        found.append(Figure("sessions", "think time, mean", float(np.mean(gaps)), "s", "20 to 60 s assumed"))
    variations = float(np.mean([request.n for request in trace.requests]))
    return [*found, Figure("sessions", "variations", variations, "", VARIATIONS)]


def _by_session(trace: Trace) -> dict[str, list[Request]]:
    sessions: dict[str, list[Request]] = {}
    for request in trace.requests:
        sessions.setdefault(request.session, []).append(request)
    return sessions


def _reuse(trace: Trace) -> list[Figure]:
    requests, count = trace.requests, len(trace.requests)
    roots = trace.roots()
    by_root = sorted(Counter(roots).values(), reverse=True)
    documents = {request.document for request in requests}
    edits = sum(request.n for request in requests)
    prompts = _repeated([request.prompt or request.prompt_hash for request in requests], roots)
    masks = _repeated([request.mask for request in requests], roots)
    committed = sum(isinstance(request.document, Result) for request in requests)
    names = {request.prompt or request.prompt_hash for request in requests}
    top = len(by_root) // 100
    found = [
        Figure("reuse", "pictures", len(by_root), "", "970 templates in a production trace"),
        Figure("reuse", "requests a picture", count / len(by_root), "", "unpublished for editors"),
    ]
    if top:
        found.append(Figure("reuse", "requests on the most asked 1 % of them", sum(by_root[:top]) / count, "%", "unpublished"))
    return [
        *found,
        Figure("reuse", "requests on results of earlier ones", committed / count, "%", "unpublished"),
        Figure("reuse", "edits that could find their document encoded", 1 - len(documents) / edits, "%"),
        Figure("reuse", "requests that repeat the prompt before", sum(prompts) / count, "%", "unpublished"),
        Figure("reuse", "requests that repeat the mask before", sum(masks) / count, "%", "unpublished"),
        Figure("reuse", "requests that repeat either", sum(map(max, prompts, masks)) / count, "%", "20 to 40 % assumed"),
        Figure("reuse", "images a prompt", edits / len(names), "", IMAGES_A_PROMPT),
    ]


def _repeated(values: list[Value] | list[Value | None], roots: list[View]) -> list[bool]:
    """Whether each is that of the request before it on the same picture."""
    last: dict[View, Value | None] = {}
    found = []
    for value, root in zip(values, roots, strict=True):
        found.append(root in last and last[root] == value)
        last[root] = value
    return found


def _masks(trace: Trace) -> list[Figure]:
    """A mask that many requests share is drawn once."""
    areas: dict[tuple[Shape | None, Size], float] = {}
    by_source: dict[str, list[float]] = {}
    for request, size in zip(trace.requests, trace.sizes(), strict=True):
        key = request.mask, size
        if key not in areas:
            areas[key] = share_of(*key)
        source = "none: the whole picture" if request.mask is None else request.mask.source or "unknown"
        by_source.setdefault(source, []).append(areas[key])
    known = {source.name: source for source in SOURCES}
    found = [Figure("masks, all", "mean", float(np.mean(np.concatenate(list(by_source.values())))), "%")]
    for name in [*(name for name in known if name in by_source), *sorted(set(by_source) - set(known))]:
        shares, said = by_source[name], known[name].figures if name in known else {}
        group = f"masks, {name}"
        found.append(Figure(group, "of all", len(shares) / len(trace.requests), "%"))
        found.append(Figure(group, "mean", float(np.mean(shares)), "%", said.get("mean", "")))
        for quantile, at in QUANTILES.items():
            found.append(Figure(group, quantile, float(np.percentile(shares, at)), "%", said.get(quantile, "")))
    return found
