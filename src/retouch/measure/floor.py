"""The noise floor: how far a path moves between runs that ought to be equal. A loss smaller than that means nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from retouch.measure.cases import Case
from retouch.measure.gate import Bounds, Key, Loss
from retouch.measure.metrics import UNITS, psnr
from retouch.measure.quality import SUITE, Answers, Scores, compare
from retouch.record import Record, Scalar


@dataclass(frozen=True, slots=True)
class Variant:
    """One run held against the first. `agree` is the mean PSNR inside the mask between their pictures, in dB, `most` the
    largest difference in levels, `same` how many of `n` pictures are identical; `losses` are against the truth, as of a fast
    path.
    """

    name: str
    agree: float
    most: int
    same: int
    n: int
    losses: Mapping[str, Loss]


def variant(
    name: str, cases: Sequence[Case], first: tuple[Answers, Mapping[Key, Scores]], again: tuple[Answers, Mapping[Key, Scores]],
    bounds: Bounds,
) -> Variant | None:  # fmt: skip
    """None where no edit was answered by both."""
    masks = {case.name: case.mask for case in cases}
    pictures = [(key, first[0].pictures[key], again[0].pictures[key]) for key in first[1] if key in again[1]]
    if not pictures:
        return None
    apart = [int(np.abs(a.astype(int) - b).max()) for _, a, b in pictures]
    agree = float(np.mean([psnr(a, b, masks[key[0]]) for key, a, b in pictures]))
    losses = compare(first[1], again[1], bounds).losses
    return Variant(name, agree, max(apart), apart.count(0), len(pictures), losses)


def floor_of(variants: Sequence[Variant], bounds: Bounds) -> dict[str, float]:
    """By limit, the largest move of a mean."""
    return {
        name: max((abs(one.losses[name].mean) for one in variants if name in one.losses), default=0.0) for name in bounds.limits
    }


def between_seeds(scores: Mapping[Key, Scores], name: str = "inside psnr") -> float | None:
    """The standard deviation within a case, over its seeds: not noise, but the scale on which to see it. None for one seed."""
    by_case: dict[str, list[float]] = {}
    for (case, _), one in scores.items():
        by_case.setdefault(case, []).append(one.flat()[name])
    spreads = [float(np.var(values, ddof=1)) for values in by_case.values() if len(values) > 1]
    return float(np.sqrt(np.mean(spreads))) if spreads else None


def records(
    path: str, variants: Sequence[Variant], where: Mapping[str, Any], seeds: float | None,
    missing: Mapping[str, str] = MappingProxyType({}),
) -> list[Record]:  # fmt: skip
    """`missing` are variants that could not be had, and why."""
    rows = []
    for one in variants:
        extra: dict[str, Scalar] = {"path": path, "variant": one.name, "largest_difference": one.most, "identical": one.same}
        rows.append(Record(SUITE, "floor: agreement inside", one.agree, "dB", n=one.n, **where, extra=extra))
        for loss in one.losses.values():
            if loss.limit is not None and np.isfinite([loss.low, loss.high]).all():
                unit, extra = UNITS[loss.name.split()[-1]], {"path": path, "variant": one.name, "limit": loss.limit}
                name, interval = f"floor: loss of {loss.name}", (loss.low, loss.high)
                rows.append(Record(SUITE, name, loss.mean, unit, *interval, loss.n, **where, extra=extra))
    for name, why in missing.items():
        extra = {"path": path, "variant": name}
        rows.append(Record(SUITE, "floor: agreement inside", None, "dB", n=0, error=why, **where, extra=extra))
    if seeds is not None:
        rows.append(Record(SUITE, "floor: between seeds, inside psnr", seeds, "dB", **where, extra={"path": path}))
    return rows
