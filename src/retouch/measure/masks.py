"""The masks of a made trace: shapes of a wanted area, at random."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from retouch.boxes import Size
from retouch.trace.shape import Shape

Outline = Callable[[np.random.Generator], np.ndarray]
"""Corners (N, 2) around the origin, of any size."""

SUBJECTS = {
    "person": (
        (50, 2), (58, 5), (61, 13), (58, 20), (56, 23), (68, 27), (74, 36), (78, 56), (72, 58), (66, 42), (65, 58), (67, 98),
        (56, 98), (51, 64), (46, 98), (35, 98), (36, 58), (35, 42), (28, 58), (22, 56), (26, 36), (32, 27), (44, 23), (42, 20),
        (39, 13), (42, 5),
    ),
    "car": (
        (2, 60), (6, 48), (24, 44), (36, 30), (66, 29), (80, 44), (95, 49), (98, 64), (94, 70), (86, 70), (82, 77), (74, 77),
        (70, 70), (32, 70), (28, 77), (20, 77), (16, 70), (4, 70),
    ),
    "cat": (
        (30, 8), (38, 18), (50, 18), (58, 8), (61, 24), (59, 36), (66, 46), (72, 62), (73, 80), (82, 74), (85, 58), (92, 60),
        (91, 80), (80, 92), (64, 95), (28, 95), (24, 84), (28, 62), (32, 46), (29, 36), (27, 24),
    ),
    "tree": (
        (44, 98), (45, 68), (30, 70), (16, 62), (12, 48), (18, 36), (16, 24), (28, 12), (42, 10), (52, 3), (66, 8), (78, 18),
        (84, 32), (82, 44), (88, 54), (80, 66), (66, 70), (55, 67), (57, 98),
    ),
    "bottle": (
        (44, 2), (56, 2), (56, 26), (66, 40), (68, 50), (68, 94), (64, 98), (36, 98), (32, 94), (32, 50), (34, 40), (44, 26),
    ),
    "bird": (
        (4, 40), (18, 32), (28, 30), (40, 36), (56, 18), (72, 10), (68, 26), (60, 40), (74, 48), (97, 46), (90, 56), (74, 62),
        (58, 66), (50, 80), (46, 66), (30, 58), (20, 46),
    ),
}  # fmt: skip
"""Silhouettes on a field of 100 x 100."""


def _subject(rng: np.random.Generator) -> np.ndarray:
    names = sorted(SUBJECTS)
    corners = np.array(SUBJECTS[names[int(rng.integers(len(names)))]], float) - 50
    mirrored = corners * (1 if rng.random() < 0.5 else -1, 1)
    return _turned(mirrored, rng.uniform(-0.2, 0.2))


def _blob(rng: np.random.Generator) -> np.ndarray:
    """A round thing with bays."""
    angles = np.linspace(0, 2 * math.pi, 32, endpoint=False)
    radii = np.ones_like(angles)
    for wave in (2, 3, 4, 5):
        radii += rng.uniform(0, 0.5 / wave) * np.cos(wave * angles + rng.uniform(0, 2 * math.pi))
    stretched = np.stack([np.cos(angles), np.sin(angles) * rng.uniform(0.6, 1)], 1) * radii[:, None]
    return _turned(stretched, rng.uniform(0, math.pi))


def _stroke(rng: np.random.Generator) -> np.ndarray:
    """A brush drawn along an arc, as wide as a hand leaves it."""
    along = np.linspace(-0.5, 0.5, 12)
    angles = rng.uniform(-1.5, 1.5) * along
    steps = np.stack([np.cos(angles), np.sin(angles)], 1) / len(along)
    spine, normal = np.cumsum(steps, 0), np.stack([-np.sin(angles), np.cos(angles)], 1)
    half = rng.uniform(0.08, 0.2) * rng.uniform(0.85, 1.15, (2, len(along)))
    half *= np.sqrt(np.clip(1 - (2 * along) ** 6, 0.15, 1))
    outline = np.concatenate([spine + normal * half[0, :, None], (spine - normal * half[1, :, None])[::-1]])
    return _turned(outline - outline.mean(0), rng.uniform(0, 2 * math.pi))


def _ellipse(rng: np.random.Generator) -> np.ndarray:
    """A face: higher than wide, a little aslant."""
    angles = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    return _turned(np.stack([np.cos(angles) * rng.uniform(0.65, 0.85), np.sin(angles)], 1), rng.uniform(-0.3, 0.3))


def _turned(corners: np.ndarray, angle: float) -> np.ndarray:
    cos, sin = math.cos(angle), math.sin(angle)
    return corners @ np.array([[cos, sin], [-sin, cos]])


OUTLINES: dict[str, Outline] = {"blob": _blob, "stroke": _stroke, "subject": _subject, "ellipse": _ellipse}
KINDS = ("box", *OUTLINES)


def random_shape(kind: str, share: float, size: Size, rng: np.random.Generator) -> Shape:
    """A shape whose area is `share` of the picture, to the rounding of its corners, at a place where it fits.

    Above a half it is what lies around such a shape, as where a background is replaced. Where no scale of an outline gives
    that area within the picture, a box does.
    """
    if share > 0.5:
        return replace(random_shape(kind, 1 - share, size, rng), outside=True)
    wanted = share * size[0] * size[1]
    if kind == "box":
        return _random_box(wanted, size, rng)
    corners = OUTLINES[kind](rng)
    corners = corners - (corners.max(0) + corners.min(0)) / 2
    x, y = corners.T
    corners = corners * math.sqrt(wanted / (abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2))
    room = np.array(size) - np.ptp(corners, 0)
    if (room >= 0).all():
        return Shape(polygon=_whole(corners + np.array(size) / 2 + (rng.random(2) - 0.5) * room), kind=kind)
    return _clipped(corners, wanted, size, kind) or _random_box(wanted, size, rng)


def _random_box(wanted: float, size: Size, rng: np.random.Generator) -> Shape:
    shape = math.exp(rng.normal(0, 0.35))
    width = min(size[0], max(1, round(math.sqrt(wanted * shape))))
    height = min(size[1], max(1, round(wanted / width)))
    width = min(size[0], max(1, round(wanted / height)))
    x, y = int(rng.integers(size[0] - width + 1)), int(rng.integers(size[1] - height + 1))
    return Shape(box=(x, y, x + width, y + height), kind="box")


def _clipped(corners: np.ndarray, wanted: float, size: Size, kind: str) -> Shape | None:
    """In the middle, so much larger that what the picture's border leaves of it has the area; None where none does."""
    low, high = 1.0, 4.0
    for _ in range(12):
        scale = (low + high) / 2
        shape = Shape(polygon=_whole(corners * scale + np.array(size) / 2), kind=kind)
        area = int(shape.drawn(size).sum())
        if abs(area - wanted) < 0.01 * wanted:
            return shape
        low, high = (scale, high) if area < wanted else (low, scale)
    return None


def _whole(corners: np.ndarray) -> tuple[int, ...]:
    return tuple(np.rint(corners).astype(int).ravel().tolist())


def share_of(shape: Shape | None, size: Size) -> float:
    """Of the picture's pixels; a request without a mask edits all of them."""
    return 1.0 if shape is None else float(shape.drawn(size).mean())
