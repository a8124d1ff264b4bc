"""What people ask for, in the words that the bundled model knows (its model card lists them; a test holds the two together)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CONCEPTS = (
    "red apple", "strawberry", "watermelon", "pumpkin", "mushroom", "doughnut", "cat", "panda", "frog", "penguin", "fish",
    "butterfly", "ladybug", "car", "rocket", "sailboat", "house", "cactus", "sunflower", "star", "heart", "balloon", "ball",
    "snowman",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
COLOURABLE = ("balloon", "butterfly", "car", "fish", "heart", "mushroom")

FIRST = {"insert": 0.55, "remove": 0.25, "replace": 0.10, "recolour": 0.10}
"""What is asked of a place in a picture as it came, and how often: our guess."""

AFTER = {"remove": 0.2, "replace": 0.4, "recolour": 0.4}
"""And of a thing that an edit has put there."""


@dataclass(frozen=True, slots=True)
class Wish:
    """`leaves`: the thing that is there when it has come true."""

    prompt: str
    leaves: str = ""


def wish(there: str, rng: np.random.Generator) -> Wish:
    """Something to ask of a place where `there` is; empty: nothing that we know of."""
    odds = {
        kind: weight for kind, weight in (AFTER if there else FIRST).items() if kind != "recolour" or there in ("", *COLOURABLE)
    }
    kind = chosen(odds, rng)
    old = there or _one(COLOURABLE if kind == "recolour" else CONCEPTS, rng)
    if kind == "remove":
        return Wish("remove the object")
    if kind == "recolour":
        return Wish(f"make the {old} {_one(COLOURS, rng)}", old)
    new = _one([concept for concept in CONCEPTS if concept != old], rng)
    if kind == "replace":
        return Wish(f"replace the {old} with a {new}", new)
    colour = f"{_one(COLOURS, rng)} " if new in COLOURABLE and rng.random() < 0.5 else ""
    name = f"{colour}{new}"
    return Wish(f"{'an' if name[0] in 'aeiou' else 'a'} {name}", new)


def chosen(odds: dict[str, float], rng: np.random.Generator) -> str:
    """One of the names, by their weights."""
    ends = np.cumsum(list(odds.values()))
    return list(odds)[int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))]


def _one(names: list[str] | tuple[str, ...], rng: np.random.Generator) -> str:
    return names[int(rng.integers(len(names)))]
