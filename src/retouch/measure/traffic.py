"""Makes traces: who comes when, with which picture, and what of it is asked again. The same seed and knobs, the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from retouch.edit import MAX_STEPS, InvalidOption
from retouch.measure.masks import random_shape
from retouch.measure.pictures import Pictures
from retouch.measure.prompts import Wish, chosen, wish
from retouch.measure.published import SOURCES
from retouch.trace import MAX_VARIATIONS, Request, Result, Shape, Trace, View


def _knob(default: Any, about: str, low: float, high: float, published: str = "") -> Any:
    """A field with what it means, what it may be, and what is published of it."""
    return field(default=default, metadata={"about": about, "low": low, "high": high, "published": published})


MASKS = (0.5, 0.3, 0.2)
"""Shares of the sources of `published.SOURCES`."""


@dataclass(frozen=True, slots=True)
class Knobs:
    """Everything that a trace depends on beside its seed and the pictures. Raises InvalidOption.

    Nobody publishes what most of them are in an editor that people use: where `published` is empty, the default is our guess,
    which bench/reuse.py sweeps.
    """

    requests: int = _knob(1000, "how many", 1, 10_000_000)
    rate: float = _knob(1.0, "requests a second, over a long time", 1e-4, 1e5)
    burst: float = _knob(4.0, "the rate in a burst over that outside of one; 1: none, plain Poisson arrivals", 1, 1000)
    burst_share: float = _knob(0.1, "of the time that is burst", 0, 0.9)
    burst_seconds: float = _knob(20.0, "mean length of a burst", 0.001, 1e6)
    documents: int = _knob(0, "that sessions draw from by Zipf's law; 0: each session has a new one", 0, 10_000_000)
    zipf: float = _knob(1.0, "exponent of that law; 0: all documents alike", 0, 10)
    turns: float = _knob(3.0, "of a session in the mean, geometric", 1, 1000, "1.95 (MagicBrush, a data set); 2 to 4 assumed")
    think: float = _knob(40.0, "mean seconds between a session's turns, exponential", 0, 1e6)
    variations: int = _knob(3, "of each request", 1, MAX_VARIATIONS, "3 (a well-known editor)")
    repeat_prompt: float = _knob(0.17, "of all requests: the prompt of the request before it on that document", 0, 1)
    repeat_mask: float = _knob(0.17, "of all requests: the mask of the request before it on that document", 0, 1)
    commit: float = _knob(0.3, "of later turns: they edit what the turn before made, a new document", 0, 1)
    masks: tuple[float, ...] = _knob(
        MASKS, "shares of the sources production, inpainting, detailing", 0, 1, "the areas of each"
    )
    side: tuple[int, ...] = _knob((512,), "longer side of a document in pixels; of several, any", 64, 8192)
    tenants: int = _knob(1, "that the sessions are of", 1, 1_000_000)
    steps: int = _knob(0, "of denoising; 0: the model's own", 0, MAX_STEPS)
    deadline: float = _knob(0.0, "seconds that each request is given; 0: any", 0, 86_400)

    def __post_init__(self) -> None:
        for one in fields(self):
            value, (low, high) = getattr(self, one.name), (one.metadata["low"], one.metadata["high"])
            for number in value if isinstance(value, tuple) else (value,):
                if not low <= number <= high:
                    raise InvalidOption(f"{option(one.name)} is {number:g}; give {low:g} to {high:g}: {one.metadata['about']}.")
        if len(self.masks) != len(SOURCES) or not sum(self.masks):
            names = ", ".join(source.name for source in SOURCES)
            raise InvalidOption(f"--masks has {len(self.masks)} shares; give one of {names} each, such as 0.5,0.3,0.2.")
        if not self.side:
            raise InvalidOption("--side is empty; give pixels, such as 512 or 384,512.")
        later = 1.0 if self.documents else 1 - 1 / self.turns
        for name in ("repeat_prompt", "repeat_mask"):
            if getattr(self, name) > later:
                raise InvalidOption(
                    f"{option(name)} is {getattr(self, name):g}, but only {later:.0%} of the requests have one before them "
                    "on their document; give less, or more --turns."
                )


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


MIXES = {
    "personal": Knobs(),
    "template": Knobs(documents=1000, turns=1.0, variations=1, repeat_prompt=0.3, repeat_mask=0.3),
}
"""*Personal*: people with pictures of their own. *Template*: everybody edits the same thousand pictures."""


@dataclass(frozen=True, slots=True)
class _Turn:
    at: float
    session: int
    number: int


@dataclass(frozen=True, slots=True)
class _Last:
    """The request before, on the same picture; `index` is its number."""

    wish: Wish
    mask: Shape
    index: int


def make(mix: str, seed: int, knobs: Knobs, pictures: Pictures) -> Trace:
    """Each part has random numbers of its own, so that a knob changes nothing but what it is for."""
    rngs = {
        name: np.random.default_rng([seed, i]) for i, name in enumerate(("time", "picture", "mask", "text", "reuse", "seed"))
    }
    turns = _turns(knobs, rngs["time"])
    views = _views(knobs, turns, pictures, rngs["picture"])
    roots = [views[turn.session] for turn in turns]
    later = len(turns) - len(set(roots))
    again = {n: min(1.0, getattr(knobs, n) * len(turns) / later) if later else 0.0 for n in ("repeat_prompt", "repeat_mask")}
    tenants = [int(rngs["picture"].integers(knobs.tenants)) for _ in views]
    last_of: dict[View, _Last] = {}
    made: list[Request] = []
    before: dict[int, int] = {}
    for turn, view in zip(turns, roots, strict=True):
        last, previous = last_of.get(view), before.get(turn.session)
        repeats = {name: last is not None and rngs["reuse"].random() < share for name, share in again.items()}
        commits, variation = rngs["reuse"].random() < knobs.commit, int(rngs["reuse"].integers(knobs.variations))
        document: View | Result = view
        if previous is not None:
            document = Result(previous, variation) if commits else made[previous].document
        mask = last.mask if last is not None and repeats["repeat_mask"] else _mask(knobs, view, rngs["mask"])
        there = last.wish.leaves if last is not None and mask is last.mask and document == Result(last.index, variation) else ""
        text = last.wish if last is not None and repeats["repeat_prompt"] else _other(last, there, rngs["text"])
        request = Request(
            turn.at, f"s{turn.session + 1}", document, text.prompt, mask=mask, seed=int(rngs["seed"].integers(2**31)),
            n=knobs.variations, steps=knobs.steps or None, deadline=knobs.deadline or None,
            tenant=f"tenant-{tenants[turn.session] + 1}" if knobs.tenants > 1 else "",
        )  # fmt: skip
        last_of[view], before[turn.session] = _Last(text, mask, len(made)), len(made)
        made.append(request)
    return Trace(tuple(made), mix, seed, _told(knobs))


def _told(knobs: Knobs) -> dict[str, Any]:
    """As they stand in a header, and as a header is read again."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(knobs).items()}


def turned(mix: str, knobs: Mapping[str, Any]) -> str:
    """Those of a header that stand otherwise than their mix has them, in one line."""
    usual = _told(MIXES[mix]) if mix in MIXES else {}
    return " ".join(f"{name}={value}".replace(" ", "") for name, value in knobs.items() if usual.get(name) != value)


def _other(last: _Last | None, there: str, rng: np.random.Generator) -> Wish:
    """One that is no repetition by chance."""
    while True:
        made = wish(there, rng)
        if last is None or made.prompt != last.wish.prompt:
            return made


def _mask(knobs: Knobs, view: View, rng: np.random.Generator) -> Shape:
    source = {source.name: source for source in SOURCES}[
        chosen({source.name: share for source, share in zip(SOURCES, knobs.masks, strict=True) if share}, rng)
    ]
    return replace(random_shape(chosen(source.kinds, rng), source.share(rng), view.size, rng), source=source.name)


def _turns(knobs: Knobs, rng: np.random.Generator) -> list[_Turn]:
    """As many as there are to be requests, in time: whole sessions, but for the last one that began."""
    turns: list[_Turn] = []
    starts = _Arrivals(knobs, rng)
    for session in range(knobs.requests):
        at = starts.next()
        for number in range(min(int(rng.geometric(1 / knobs.turns)), knobs.requests - len(turns))):
            at += rng.exponential(knobs.think) if number else 0.0
            turns.append(_Turn(round(at, 6), session, number))
        if len(turns) == knobs.requests:
            break
    return sorted(turns, key=lambda turn: (turn.at, turn.session, turn.number))


class _Arrivals:
    """Of sessions: a Poisson process whose rate is one of two, a calm one and that of bursts, for exponential times each."""

    def __init__(self, knobs: Knobs, rng: np.random.Generator) -> None:
        self.rng, self.now, self.bursting = rng, 0.0, False
        share = knobs.burst_share if knobs.burst > 1 else 0.0
        calm = knobs.rate / knobs.turns / (1 + share * (knobs.burst - 1))
        self.rates = (calm, calm * knobs.burst)
        self.stays = (knobs.burst_seconds * (1 - share) / share if share else np.inf, knobs.burst_seconds)
        self.until = self._stay()

    def _stay(self) -> float:
        mean = self.stays[self.bursting]
        return self.now + (float(self.rng.exponential(mean)) if np.isfinite(mean) else np.inf)

    def next(self) -> float:
        while True:
            at = self.now + float(self.rng.exponential(1 / self.rates[self.bursting]))
            if at <= self.until:
                self.now = at
                return at
            self.now, self.bursting = self.until, not self.bursting
            self.until = self._stay()


def _views(knobs: Knobs, turns: list[_Turn], pictures: Pictures, rng: np.random.Generator) -> list[View]:
    """Of each session, its picture; all different where each session has a new one."""
    sessions = max(turn.session for turn in turns) + 1
    if knobs.documents:
        weights = np.cumsum(np.arange(1, knobs.documents + 1, dtype=float) ** -knobs.zipf)
        ranks = np.searchsorted(weights, rng.random(sessions) * weights[-1], side="right")
    else:
        ranks = np.arange(sessions)
    known: dict[int, View] = {}
    taken: set[View] = set()
    wanted = sorted(set(ranks.tolist()))
    for rank in wanted:
        for _ in range(100):
            view = pictures.view(rank, knobs.side[int(rng.integers(len(knobs.side)))], rng)
            if view not in taken:
                break
        else:
            raise InvalidOption(f"{pictures.folder} does not give {len(wanted):,} different documents; add pictures.")
        taken.add(view)
        known[rank] = view
    return [known[rank] for rank in ranks.tolist()]
