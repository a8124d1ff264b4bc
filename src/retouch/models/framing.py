"""Between a picture and the frame of it that a model works on: pixels and mask on the way in, what was made on the way out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from retouch.boxes import Box, around, bounds, working_crop
from retouch.composite import MAX_FEATHER, composite
from retouch.edit import Edit
from retouch.models import latents
from retouch.models.base import Frame

Region = tuple[int, int, int, int]
"""Rows and columns, of pixels or of what a window counts in: (top, bottom, left, right), half open."""


def place(edit: Edit, side: int, context: int | None, cell: int) -> tuple[Box, float]:
    """The box that is worked on, and its scale: the whole picture; where that is longer than `side` of the model's pixels, or a
    `context` of so many of them is wanted, a crop around the mask.
    """
    height, width = edit.image.shape[:2]
    mask = np.ones((height, width), bool) if edit.mask is None else edit.mask
    box, scale = working_crop(mask, (width, height), side)
    if context is not None and edit.mask is not None:
        box = around(mask, box, context / scale, cell / scale)
    return box, scale


def fitted(pixels: np.ndarray, scale: float, cell: int) -> np.ndarray:
    """Scaled, and padded to whole cells by repeating the last row and column."""
    if scale < 1:
        size = [max(1, round(side * scale)) for side in pixels.shape[1::-1]]
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    missing = [-side % cell for side in pixels.shape[:2]]
    return np.pad(pixels, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge") if any(missing) else pixels


def framed_mask(edit: Edit, frame: Frame) -> np.ndarray:
    """(height, width) bool in the frame's pixels, without what pads it to whole cells."""
    if edit.mask is None:
        return np.ones(frame.inner[::-1], bool)
    x0, y0, x1, y1 = frame.box
    mask = edit.mask[y0:y1, x0:x1]
    if frame.scale < 1:
        grey = Image.fromarray(mask.astype(np.uint8) * 255).resize(frame.inner, Image.Resampling.BOX, reducing_gap=None)
        mask = np.asarray(grey) > 0
    return mask


def masked_cells(edit: Edit, frame: Frame, grid: tuple[int, int], cell: int, dilate: int) -> Tensor:
    """(rows * columns,) bool: the cells an edit may change. A grid may have whole cells that only pad it; none of these."""
    if edit.mask is None:
        return torch.ones(grid[0] * grid[1], dtype=torch.bool)
    cells = latents.cells_of(framed_mask(edit, frame), cell, dilate)
    more = [(0, whole - shown) for whole, shown in zip(grid, cells.shape, strict=True)]
    return torch.from_numpy(np.pad(cells, more).ravel())


def region_of(edit: Edit, frame: Frame) -> Region:
    """Of the frame's pixels, where its mask lies."""
    left, top, right, bottom = bounds(framed_mask(edit, frame))
    return top, bottom, left, right


def window(region: Region, halo: int, unit: int, size: Sequence[int]) -> Region:
    """What holds the region and `halo` pixels around it, in units of so many pixels, of which there are `size` (h, w)."""
    top, bottom, left, right = region
    rows = max(0, (top - halo) // unit), min(size[0], -(-(bottom + halo) // unit))
    return *rows, max(0, (left - halo) // unit), min(size[1], -(-(right + halo) // unit))


def put_back(edit: Edit, frame: Frame, made: np.ndarray, top: int, left: int, feather: int) -> np.ndarray:
    """The edit's picture with `made` (h, w, 3) uint8 in it, which lies at `top` and `left` in the frame's pixels, and holds at
    least the mask's bounds.

    What pads the frame to whole cells is left out. `feather` is in the frame's pixels too.
    """
    box = frame.box
    width, height = frame.inner
    made = made[: height - top, : width - left]
    if frame.scale < 1:
        full = frame.pixels[:height, :width].copy()
        full[top : top + made.shape[0], left : left + made.shape[1]] = made
        size = (box[2] - box[0], box[3] - box[1])
        made, top, left = np.asarray(Image.fromarray(full).resize(size, Image.Resampling.BICUBIC)), 0, 0
    x, y = box[0] + left, box[1] + top
    where = (x, y, x + made.shape[1], y + made.shape[0])
    mask = np.ones(edit.image.shape[:2], bool) if edit.mask is None else edit.mask
    return composite(edit.image, made, mask, where, min(MAX_FEATHER, round(feather / frame.scale)))
