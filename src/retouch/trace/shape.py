"""Where a picture is edited, as a trace says it: a shape of few whole numbers, drawn the same on every machine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retouch.boxes import Box, Size
from retouch.edit import InvalidMask

REACH = 1_000_000
"""Corners lie at most so far from the picture's origin, so that 64 bits hold all products below."""

CORNERS = 4096


@dataclass(frozen=True, slots=True)
class Shape:
    """Where a picture is edited: one of `box` (x0, y0, x1, y1), `polygon` (x0, y0, x1, y1, ...) and `runs`, in document pixels.

    `runs` are the lengths of the stretches outside and inside in turn, row after row, the first outside. A polygon may be
    any, also one that crosses itself (even-odd rule) or leaves the picture. `outside` turns it over. `kind` and `source` only
    say what it is (blob, stroke, ...) and which of the published distributions its area is from.
    """

    box: Box | None = None
    polygon: tuple[int, ...] = ()
    runs: tuple[int, ...] = ()
    outside: bool = False
    kind: str = ""
    source: str = ""

    @classmethod
    def of(cls, mask: np.ndarray, kind: str = "", source: str = "") -> Shape:
        """Any mask, (H, W) bool, exactly."""
        flat = mask.ravel()
        turns = np.flatnonzero(np.diff(flat)) + 1
        ends = np.concatenate(([0] * (1 + bool(flat[0])), turns, [flat.size]))
        return cls(runs=tuple(np.diff(ends).tolist()), kind=kind, source=source)

    def check(self, size: Size) -> None:
        """Raises InvalidMask where it cannot be a mask of a picture of `size`."""
        if (self.box is not None) + bool(self.polygon) + bool(self.runs) != 1:
            raise InvalidMask("a mask has one of box, polygon and runs.")
        if self.box is not None:
            x0, y0, x1, y1 = self.box
            if not (0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]):
                raise InvalidMask(f"the box {self.box} has no area or leaves the picture, which is {size[0]} x {size[1]}.")
        if self.polygon and (len(self.polygon) % 2 or not 6 <= len(self.polygon) <= 2 * CORNERS):
            raise InvalidMask(f"a polygon is x and y of 3 to {CORNERS:,} corners, not {len(self.polygon)} numbers.")
        if self.polygon and max(map(abs, self.polygon)) > REACH:
            raise InvalidMask(f"a corner of the polygon is more than {REACH:,} pixels away.")
        if self.runs and (min(self.runs) < 0 or sum(self.runs) != size[0] * size[1]):
            text = f"the runs count {sum(self.runs):,} pixels, but the picture has {size[0] * size[1]:,}"
            raise InvalidMask("a run is negative." if min(self.runs) < 0 else f"{text}.")

    def drawn(self, size: Size) -> np.ndarray:
        """(H, W) bool for a picture of `size` (width, height)."""
        width, height = size
        if self.box is not None:
            mask = np.zeros((height, width), bool)
            mask[self.box[1] : self.box[3], self.box[0] : self.box[2]] = True
        elif self.polygon:
            mask = _filled(np.array(self.polygon, np.int64).reshape(-1, 2), size)
        else:
            inside = np.arange(len(self.runs)) % 2 == 1
            mask = np.repeat(inside, self.runs).reshape(height, width)
        return ~mask if self.outside else mask


def _filled(corners: np.ndarray, size: Size) -> np.ndarray:
    """The pixels whose centres lie in a polygon (N, 2) of whole numbers, by the even-odd rule: no rounding anywhere.

    Each edge flips all pixels of a row behind where it crosses the row's middle.
    """
    width, height = size
    ends = np.roll(corners, -1, 0)
    down = corners[:, 1] < ends[:, 1]
    top, bottom = np.where(down[:, None], corners, ends), np.where(down[:, None], ends, corners)
    first, last = max(0, int(top[:, 1].min())), min(height, int(bottom[:, 1].max()))
    mask = np.zeros((height, width), bool)
    if first < last:
        rows = np.arange(first, last, dtype=np.int64)
        edge, row = np.nonzero((top[:, 1, None] <= rows) & (rows < bottom[:, 1, None]))
        (x0, y0), (x1, y1), y = top[edge].T, bottom[edge].T, rows[row]
        # Centre x + 1/2 is right of the crossing at y + 1/2 from this x on (a whole division, rounded up).
        x = -((-(2 * x0 - 1) * (y1 - y0) - (2 * (y - y0) + 1) * (x1 - x0)) // (2 * (y1 - y0)))
        flips = np.zeros((last - first, width + 1), np.uint8)
        np.bitwise_xor.at(flips, (row, np.clip(x, 0, width)), 1)
        mask[first:last] = np.bitwise_xor.accumulate(flips, axis=1)[:, :width]
    return mask
