"""Boxes in a picture: where a mask lies, and which part of the picture a model works on for it.

Sizes and boxes are (width, height) and (x0, y0, x1, y1) in document pixels, half open; masks are (height, width) bool.
"""

from __future__ import annotations

import numpy as np

Size = tuple[int, int]
Box = tuple[int, int, int, int]


def bounds(mask: np.ndarray) -> Box:
    """The smallest box around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def working_crop(mask: np.ndarray, size: Size, target: int) -> tuple[Box, float]:
    """The box of a large picture that the model works on, and the scale from it to the model's pixels.

    A picture whose longer side is at most `target` is worked on whole, scale 1. Else, w x h being the mask's bounds:
      margin = max(64, ceil(max(w, h) / 2)); the crop is (w + 2 margin) x (h + 2 margin);
      if its longer side is below `target`, both sides grow by the same factor until it is `target`;
      both sides are cut to the picture's; if the longer is now below `target`, the crop's side along the picture's
      longer side becomes `target`; the crop is centred on the bounds and shifted into the picture;
      scale = min(1, target / longer side): never above 1.
    """
    width, height = size
    assert mask.shape == (height, width), (mask.shape, size)
    if max(size) <= target:
        return (0, 0, width, height), 1.0
    x0, y0, x1, y1 = bounds(mask)
    w, h = x1 - x0, y1 - y0
    margin = max(64, -(-max(w, h) // 2))
    crop_w, crop_h = w + 2 * margin, h + 2 * margin
    grow = max(1.0, target / max(crop_w, crop_h))
    crop_w, crop_h = min(round(crop_w * grow), width), min(round(crop_h * grow), height)
    if max(crop_w, crop_h) < target:
        crop_w, crop_h = (target, crop_h) if width >= height else (crop_w, target)
    left = min(max(x0 - (crop_w - w) // 2, 0), width - crop_w)
    top = min(max(y0 - (crop_h - h) // 2, 0), height - crop_h)
    return (left, top, left + crop_w, top + crop_h), min(1.0, target / max(crop_w, crop_h))


def around(mask: np.ndarray, box: Box, context: float, cell: float) -> Box:
    """The part of `box` that lies within `context` of the mask's bounds, in whole cells from the box's corner, so that masks
    that differ a little get the same part. All in the picture's pixels.
    """
    x0, y0, x1, y1 = bounds(mask)
    low = [int(max(0.0, (at - start - context) // cell * cell)) for at, start in ((x0, box[0]), (y0, box[1]))]
    high = [int(-((start - at - context) // cell) * cell) for at, start in ((x1, box[0]), (y1, box[1]))]
    right, bottom = min(box[2], box[0] + high[0]), min(box[3], box[1] + high[1])
    return box[0] + low[0], box[1] + low[1], right, bottom
