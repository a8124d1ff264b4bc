"""A large picture in overlapping tiles of one size, and back without a seam."""

from __future__ import annotations

import math

import numpy as np


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles along one side begin: as few as go, evenly spread, each sharing at least `overlap` with the next."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def weights(length: int, overlap: int, first: bool, last: bool) -> np.ndarray:
    """(length,) float32: what a tile counts for along one side. Full at the picture's own border.

    At a border inside the picture the outer quarter of the overlap counts for nothing, as there a filter saw the tile's end
    instead of its neighbour; over the middle half the tile fades in. So a filter that reaches no further than a quarter of the
    overlap gives the very picture that it gives of the whole.
    """
    distance = np.arange(length, dtype=np.float32) + 0.5
    fade = np.clip((distance - overlap / 4) / max(overlap / 2, 1e-6), 0, 1)
    weight = np.ones(length, np.float32)
    return weight * (1 if first else fade) * (1 if last else fade[::-1])


class Canvas:
    """Tiles (h, w, C) are added at their places, each weighted; `picture` is what they make."""

    def __init__(self, height: int, width: int, channels: int) -> None:
        self.sum = np.zeros((height, width, channels), np.float32)
        self.weight = np.zeros((height, width, 1), np.float32)

    def add(self, tile: np.ndarray, top: int, left: int, overlap: int) -> None:
        """What of a tile lies beyond the picture was padding, and is cut off."""
        height, width = (min(tile.shape[0], self.sum.shape[0] - top), min(tile.shape[1], self.sum.shape[1] - left))
        down = weights(height, overlap, top == 0, top + height == self.sum.shape[0])
        across = weights(width, overlap, left == 0, left + width == self.sum.shape[1])
        weight = (down[:, None] * across[None])[..., None]
        self.sum[top : top + height, left : left + width] += tile[:height, :width] * weight
        self.weight[top : top + height, left : left + width] += weight

    def picture(self) -> np.ndarray:
        """(height, width, C) float32; what was added is gone."""
        self.sum /= self.weight
        return self.sum
