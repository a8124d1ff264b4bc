"""Is the fast path as good as the plain one? Paired losses over (case, seed), their confidence bounds, and a verdict.

The same case with the same seed is answered by both, and only the difference counts: what is hard about a case falls out.
Seeds of one case resemble each other, so that cases are the sample: a case's loss is the mean over its seeds, and the bounds
are over cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from retouch.edit import InvalidOption

Key = tuple[str, int]
"""A case's name and the number of the seed."""

PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"

GATED, LOSS = "the gate", "loss of "
"""What rows of a verdict, and of a loss before the metric's name, are called."""

LIMITS: Mapping[str, float] = MappingProxyType({"inside psnr": 0.5, "inside ssimulacra2": 1.0})
"""What the upper bound of a paired loss stays under: dB, and points."""

RESAMPLES = 4000
LOWER_IS_BETTER = frozenset(("flip", "lpips", "gmsd", "mdsi"))


@dataclass(frozen=True, slots=True)
class Bounds:
    """What passes. `limits` are the largest losses by "zone metric", of which the upper bounds are taken; `level` is the
    confidence of each of these bounds. Fewer than `cases` cases, or `seeds` seeds of a case, decide nothing. Raises
    InvalidOption.

    All limits must hold, so that the chance of passing what breaks any of them is at most 1 - `level`, however many there are.
    """

    limits: Mapping[str, float] = field(default_factory=lambda: dict(LIMITS))
    level: float = 0.95
    cases: int = 20
    seeds: int = 2

    def __post_init__(self) -> None:
        for name, limit in self.limits.items():
            if not (math.isfinite(limit) and limit > 0):
                raise InvalidOption(f"the bound of {name} is {limit:g}; give the largest loss that passes, above 0.")
        if not self.limits:
            raise InvalidOption("there is no bound, and everything would pass; give at least one.")
        if not 0.5 < self.level < 1:
            raise InvalidOption(f"the level of confidence is {self.level:g}; give more than 0.5 and less than 1, such as 0.95.")
        if self.cases < 3 or self.seeds < 1:
            raise InvalidOption("a verdict takes at least 3 cases and 1 seed; give more.")


@dataclass(frozen=True, slots=True)
class Loss:
    """A metric of a zone, plain against fast, over `n` cases with `seeds` seeds each (the fewest that a case has).

    Above 0 the fast path is worse, whichever way the metric counts. `low` and `high` each hold with the level's confidence.
    `plain` and `fast` are the means of both; `spread` is the standard deviation of the cases' losses. `limit` None: not gated.
    """

    name: str
    mean: float
    low: float
    high: float
    n: int
    seeds: int
    plain: float
    fast: float
    spread: float
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """`verdict` is pass, fail or undecided, and `reasons` say why it is no pass. `losses` are by "zone metric".

    `worst` are all pairs, those that lose most against the limits first. `unpaired` were answered by one path only.
    `changed` are the fast path's edits that are not identical outside of the mask, with how many pixels.
    """

    verdict: str
    reasons: tuple[str, ...]
    losses: Mapping[str, Loss]
    worst: tuple[Key, ...]
    unpaired: tuple[Key, ...]
    changed: Mapping[Key, int]


def decide(
    plain: Mapping[Key, Mapping[str, float]], fast: Mapping[Key, Mapping[str, float]], changed: Mapping[Key, int],
    bounds: Bounds, floor: Mapping[str, float] | None = None,
) -> Verdict:  # fmt: skip
    """From metrics by "zone metric" of every pair. `floor`: how far the plain path's means move between runs that ought to be
    equal (`floor.py`). A bound that comes so near to its limit decides nothing, nor does a gated value that is no number.
    """
    pairs = sorted(set(plain) & set(fast))
    strange = {name: [key for key in pairs if _strange(name, plain[key], fast[key])] for name in bounds.limits}
    plain, fast = _numbers(plain), _numbers(fast)
    unpaired = tuple(sorted(set(plain) ^ set(fast)))
    names = list(dict.fromkeys([*bounds.limits, *(name for key in pairs for name in plain[key])]))
    losses = {}
    for name in names:
        loss = _loss(name, [key for key in pairs if name in plain[key] and name in fast[key]], plain, fast, bounds)
        if loss is not None:
            losses[name] = loss
    floor = floor or {}
    failed, unsure = _failures(losses, changed, bounds, floor), _doubts(losses, pairs, unpaired, strange, bounds, floor)
    verdict = FAIL if failed else UNDECIDED if unsure else PASS
    worst = sorted(pairs, key=lambda key: _badness(key, plain, fast, changed, bounds), reverse=True)
    return Verdict(verdict, (*failed, *unsure), losses, tuple(worst), unpaired, changed)


def _strange(name: str, *sides: Mapping[str, float]) -> bool:
    """Whether it was measured, and what came is not a number."""
    return any(name in side and not math.isfinite(side[name]) for side in sides)


def _numbers(side: Mapping[Key, Mapping[str, float]]) -> dict[Key, dict[str, float]]:
    """Without what is none: every comparison with it is false, and so would pass."""
    return {key: {name: value for name, value in found.items() if math.isfinite(value)} for key, found in side.items()}


def _failures(
    losses: Mapping[str, Loss], changed: Mapping[Key, int], bounds: Bounds, floor: Mapping[str, float]
) -> list[str]:  # fmt: skip
    """Pixels outside are counted, not estimated; of a loss even the lower bound is to be over its limit."""
    reasons = []
    if changed:
        (name, seed), count = max(changed.items(), key=lambda item: item[1])
        reasons.append(f"{len(changed)} edits changed pixels outside of the mask, up to {count:,} ({name}, seed {seed})")
    for name, limit in bounds.limits.items():
        loss = losses.get(name)
        if loss is not None and loss.n >= bounds.cases and loss.low - floor.get(name, 0.0) > limit:
            sure = f"with {bounds.level:.0%} confidence more than {loss.low:.3g}"
            reasons.append(f"{name} loses {loss.mean:.3g}, {sure} (limit {limit:g})")
    return reasons


def _doubts(
    losses: Mapping[str, Loss], pairs: Sequence[Key], unpaired: Sequence[Key], strange: Mapping[str, Sequence[Key]],
    bounds: Bounds, floor: Mapping[str, float],
) -> list[str]:  # fmt: skip
    reasons = []
    cases, seeds = _counts(pairs)
    if cases < bounds.cases:
        reasons.append(f"{cases} cases are too few to tell, {bounds.cases} are needed")
    if seeds < bounds.seeds:
        reasons.append(f"{seeds} seeds a case are too few to tell, {bounds.seeds} are needed")
    if unpaired:
        reasons.append(f"{len(unpaired)} edits were answered by one path only")
    for name, limit in bounds.limits.items():
        loss = losses.get(name)
        if strange[name]:
            case, seed = strange[name][0]
            reasons.append(f"{name} is not a number in {len(strange[name])} edits ({case}, seed {seed})")
        if loss is None or loss.n < cases:
            scored = 0 if loss is None else loss.n
            reasons.append(f"{name} was measured in {scored} of {cases} cases")
        elif not loss.high < limit:
            reasons.append(f"{name} may lose {loss.high:.3g} (limit {limit:g})")
        elif not loss.high + floor.get(name, 0.0) < limit:
            moved = f"the plain path itself moves by {floor[name]:.3g}"
            reasons.append(f"{name} may lose {loss.high:.3g}, and {moved} (limit {limit:g})")
    return reasons


def _counts(pairs: Sequence[Key]) -> tuple[int, int]:
    """How many cases, and the fewest seeds that one has."""
    names = [name for name, _ in pairs]
    return len(set(names)), min((names.count(name) for name in set(names)), default=0)


def _loss(
    name: str, pairs: Sequence[Key], plain: Mapping[Key, Mapping[str, float]], fast: Mapping[Key, Mapping[str, float]],
    bounds: Bounds,
) -> Loss | None:  # fmt: skip
    if not pairs:
        return None
    by_case: dict[str, list[float]] = {}
    for key in pairs:
        by_case.setdefault(key[0], []).append(_lost(name, plain[key][name], fast[key][name]))
    values = np.array([float(np.mean(losses)) for losses in by_case.values()])
    low, high = interval(values, bounds.level)
    _, seeds = _counts(pairs)
    before, after = (float(np.mean([side[key][name] for key in pairs])) for side in (plain, fast))
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return Loss(name, float(values.mean()), low, high, len(values), seeds, before, after, spread, bounds.limits.get(name))


def pair_losses(
    plain: Mapping[Key, Mapping[str, float]], fast: Mapping[Key, Mapping[str, float]], names: Sequence[str]
) -> dict[Key, dict[str, float]]:  # fmt: skip
    """By pair, of the named metrics ("inside psnr") that are numbers; above 0 the fast path is worse."""
    plain, fast = _numbers(plain), _numbers(fast)
    return {
        key: {
            name: _lost(name, plain[key][name], fast[key][name]) for name in names if name in plain[key] and name in fast[key]
        }
        for key in set(plain) & set(fast)
    }


def _lost(name: str, plain: float, fast: float) -> float:
    return fast - plain if name.split()[-1] in LOWER_IS_BETTER else plain - fast


def _badness(
    key: Key, plain: Mapping[Key, Mapping[str, float]], fast: Mapping[Key, Mapping[str, float]], changed: Mapping[Key, int],
    bounds: Bounds,
) -> tuple[int, float, Key]:  # fmt: skip
    """Orders pairs: pixels changed outside first, then the largest loss in units of its limit."""
    gated = [name for name in bounds.limits if name in plain[key] and name in fast[key]]
    lost = max((_lost(name, plain[key][name], fast[key][name]) / bounds.limits[name] for name in gated), default=0.0)
    return changed.get(key, 0), lost, key


def interval(values: np.ndarray, level: float, seed: int = 0) -> tuple[float, float]:
    """Bounds of the mean of `values` (n,), a lower and an upper one, each with confidence `level`; infinite for fewer than 2.

    The wider of two on each side: Student's t, which is right for few values of a normal kind, and the bootstrap's
    percentiles, which follow a skewed tail, but are too narrow for few values (Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993).
    """
    n = len(values)
    if n < 2:
        return -math.inf, math.inf
    mean = float(values.mean())
    reach = student(level, n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
    drawn = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
    low, high = np.quantile(values[drawn].mean(1), [1 - level, level])
    return min(mean - reach, float(low)), max(mean + reach, float(high))


def student(level: float, freedom: int) -> float:
    """The quantile of Student's t, by bisection of its integral (Simpson, with t = sqrt(freedom) tan(angle)); to 1e-9."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)

    def above_half(angle: float) -> float:
        steps = 400
        at = np.linspace(0, angle, steps + 1)
        weights = np.where(np.arange(steps + 1) % 2, 4.0, 2.0)
        weights[[0, -1]] = 1.0
        return float(scale * (weights * np.cos(at) ** (freedom - 1)).sum() * angle / steps / 3)

    return math.sqrt(freedom) * math.tan(_bisected(above_half, level - 0.5, 0.0, math.pi / 2))


def _bisected(rising: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return (low + high) / 2
