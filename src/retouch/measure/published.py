"""What is published of edit traffic, with where it is from: mask areas by source, and the few figures on reuse.

Nobody publishes requests a document, or how often a prompt or a mask is asked for again, for an editor that people use: those
are knobs (`traffic.Knobs`), to be swept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

QUANTILES = {"P10": 10, "P25": 25, "P50": 50, "P75": 75, "P90": 90, "P99": 99}
SMALLEST, LARGEST = 0.0005, 0.995


@dataclass(frozen=True, slots=True)
class Source:
    """Of mask areas, as shares of the picture. `figures` are what is published, `draw` what the traces are drawn from."""

    name: str
    about: str
    figures: dict[str, float]
    kinds: dict[str, float]
    draw: Callable[[np.random.Generator], float]

    def share(self, rng: np.random.Generator) -> float:
        """Never so small that no pixel is left, nor the whole picture."""
        return min(LARGEST, max(SMALLEST, self.draw(rng)))


KNOTS = ((0.0, 0.10, 0.25, 0.50, 0.75, 0.90, 0.99, 1.0), (0.010, 0.060, 0.164, 0.221, 0.612, 0.873, 0.964, 0.990))
"""The public inpainting set: (shares of its masks, their areas up to there). The first and the last area are ours."""

BEND = 2.67
"""Between a half and three quarters of the masks, where the areas leap, they follow a power: the one that gives the published
mean. Elsewhere they lie on lines."""


def inpainting_area(u: float) -> float:
    """The area below which a share `u` of the public inpainting set's masks is."""
    if 0.5 < u < 0.75:
        low, high = KNOTS[1][3:5]
        return low + (high - low) * ((u - 0.5) / 0.25) ** BEND
    return float(np.interp(u, *KNOTS))


# The kinds of shapes, by source, are our guess: nobody publishes them.
SOURCES = (
    Source(
        "production", "one production trace of 970 templates; drawn from Beta(2.5, 19.8)",
        {"mean": 0.112, "P10": 0.048, "P50": 0.095, "P90": 0.208, "P99": 0.320},
        {"blob": 0.35, "subject": 0.30, "stroke": 0.20, "box": 0.15}, lambda rng: float(rng.beta(2.5, 19.8)),
    ),
    Source(
        "inpainting", "a public inpainting set; drawn through its quantiles",
        {"mean": 0.354, "P10": 0.060, "P25": 0.164, "P50": 0.221, "P75": 0.612, "P90": 0.873, "P99": 0.964},
        {"box": 0.30, "subject": 0.30, "blob": 0.20, "stroke": 0.20}, lambda rng: inpainting_area(rng.random()),
    ),
    Source(
        "detailing", "automatic face detailing; drawn from lognormal(-3.84, 0.83)",
        {"mean": 0.029}, {"ellipse": 0.80, "box": 0.20}, lambda rng: float(rng.lognormal(-3.84, 0.83)),
    ),
)  # fmt: skip

IMAGES_A_PROMPT = 7.8
"""DiffusionDB 14M, text to image."""

TURNS_A_SESSION = 1.95
"""MagicBrush: a data set, no traffic."""

VARIATIONS = 3
"""What a well-known editor returns."""
