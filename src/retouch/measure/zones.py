"""The three zones that an edit is judged in, and the crops of them that metrics of whole pictures look at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retouch.boxes import Box, around
from retouch.edit import InvalidMask

SEAM = 4
"""Pixels on each side of the mask's border that are its seam. So wide does an edit fade in (`Options.feather`), and beyond it a
joint is not seen as one; half of SSIM's window (5) reaches as far."""

SMALLEST = 225
"""Pixels of the shorter side that all metrics of whole pictures work with. MS-SSIM asks for 161. SSIMULACRA2 halves a picture
five times and looks at no fewer than 8 pixels: of a smaller one it leaves scales out, and its weights fall on wrong ones."""


@dataclass(frozen=True, slots=True, eq=False)
class Zones:
    """(H, W) bool each. `inside` is the mask, `outside` the rest, and the `seam` lies across both. A mask of the whole picture
    has neither outside nor seam.
    """

    inside: np.ndarray
    outside: np.ndarray
    seam: np.ndarray

    def named(self) -> dict[str, np.ndarray]:
        """Those that have pixels."""
        zones = {"inside": self.inside, "seam": self.seam, "outside": self.outside}
        return {name: zone for name, zone in zones.items() if zone.any()}


def zones_of(mask: np.ndarray, width: int = SEAM) -> Zones:
    """Of a mask (H, W) bool, with a seam of `width` pixels on each side. Raises InvalidMask where it is empty."""
    if not mask.any():
        raise InvalidMask("the mask is empty: there is nothing inside to judge.")
    return Zones(mask, ~mask, grown(mask, width) & grown(~mask, width))


def grown(mask: np.ndarray, by: int) -> np.ndarray:
    """`mask` (H, W) bool and every pixel of the square of `by` pixels around each of it."""
    for axis in (0, 1):
        padded = np.pad(mask, [(by, by) if side == axis else (0, 0) for side in (0, 1)])
        length = mask.shape[axis]
        mask = np.logical_or.reduce([padded.take(range(shift, shift + length), axis) for shift in range(2 * by + 1)])
    return mask


def box_of(mask: np.ndarray, context: int) -> Box:
    """The mask's box (x0, y0, x1, y1), half open, with `context` pixels around it as far as the picture goes."""
    height, width = mask.shape
    return around(mask, (0, 0, width, height), context, 1)


def cut(pixels: np.ndarray, box: Box) -> np.ndarray:
    return pixels[box[1] : box[3], box[0] : box[2]]


def mirrored(pixels: np.ndarray, smallest: int = SMALLEST) -> np.ndarray:
    """`pixels` (H, W, C) continued by its mirror images until both sides have `smallest`.

    Whole images of it, so that each pixel counts as often as any other, and a mean over all is one over the picture itself; a
    picture scaled up would be judged as from nearer by.
    """
    further = [(0, (-(-smallest // side) - 1) * side) for side in pixels.shape[:2]]
    return np.pad(pixels, [*(max(one, (0, 0)) for one in further), (0, 0)], mode="symmetric")
