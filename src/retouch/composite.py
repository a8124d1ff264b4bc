"""The composite: an edited crop put back into the original, inside the mask only and feathered inwards."""

from __future__ import annotations

import numpy as np

from retouch.boxes import Box, bounds

MAX_FEATHER = 254
"""Pixels; distances are counted in bytes."""


def composite(original: np.ndarray, edited: np.ndarray, mask: np.ndarray, box: Box, feather: int) -> np.ndarray:
    """Put an edited crop into the original: inside the mask only, its border feathered inwards.

    `original` is (H, W, 3 or 4) uint8, `edited` (y1 - y0, x1 - x0, 3) uint8, or float on the same 0 to 255 scale,
    `mask` (H, W) bool, `box` where the crop lies. Pixels outside mask and box, and alpha, are bit-identical.
    """
    x0, y0, x1, y1 = box
    assert edited.shape == (y1 - y0, x1 - x0, 3), (edited.shape, box)
    result = original.copy()
    inside = np.zeros_like(mask)
    inside[y0:y1, x0:x1] = mask[y0:y1, x0:x1]
    if not inside.any():
        return result
    # One more pixel on each side, where the picture has it, lets the feathering see what borders on the mask.
    mx0, my0, mx1, my1 = bounds(inside)
    rx0, ry0, rx1, ry1 = max(mx0 - 1, 0), max(my0 - 1, 0), min(mx1 + 1, mask.shape[1]), min(my1 + 1, mask.shape[0])
    weight = feather_weights(inside[ry0:ry1, rx0:rx1], feather)
    weight = weight[my0 - ry0 : my1 - ry0, mx0 - rx0 : mx1 - rx0]
    region = result[my0:my1, mx0:mx1, :3]
    after = edited[my0 - y0 : my1 - y0, mx0 - x0 : mx1 - x0]
    if after.dtype != np.uint8:
        after = np.clip(np.rint(after), 0, 255).astype(np.uint8)
    soft = (weight > 0) & (weight < 1)
    share = weight[soft][:, None]
    blend = np.rint(region[soft] * (1 - share) + after[soft] * share).astype(np.uint8)
    np.copyto(region, after, where=(weight == 1)[..., None])
    region[soft] = blend
    return result


def feather_weights(mask: np.ndarray, feather: int) -> np.ndarray:
    """(H, W) bool to (H, W) float32: 0 outside the mask, d / (feather + 1) inside, at most 1.

    d is the distance to the nearest pixel outside, 1 at the border, in octagonal steps (crosses and squares in turn).
    The array's own border is no border of the mask. Where a mask is thin, the divisor is the largest d within `feather`
    + 1 pixels instead, so that the middle of a thin mask has weight 1.
    """
    assert 0 <= feather <= MAX_FEATHER, feather
    levels = feather + 1
    distance = mask.astype(np.uint8)
    inner = mask
    for step in range(1, levels):
        inner = _erode(inner, square=step % 2 == 0)
        if not inner.any():
            break
        distance += inner
    weights: np.ndarray = distance / np.maximum(_window_max(distance, levels), 1).astype(np.float32)
    return weights


def _erode(mask: np.ndarray, square: bool) -> np.ndarray:
    """True where a pixel and its four (or eight, `square`) neighbours are; beyond the array counts as true."""
    result = mask.copy()
    result[:, 1:] &= mask[:, :-1]
    result[:, :-1] &= mask[:, 1:]
    rows = result.copy() if square else mask
    result[1:] &= rows[:-1]
    result[:-1] &= rows[1:]
    return result


def _window_max(values: np.ndarray, radius: int) -> np.ndarray:
    """The largest value in the square of 2 * radius + 1 around each pixel, by doubling the reach along each axis."""
    for axis in (0, 1):
        lanes = np.moveaxis(values, axis, 0)
        reach = 0
        while reach < radius:
            step = min(reach + 1, radius - reach)
            wider = lanes.copy()
            np.maximum(wider[step:], lanes[:-step], out=wider[step:])
            np.maximum(wider[:-step], lanes[step:], out=wider[:-step])
            lanes, reach = wider, reach + step
        values = np.moveaxis(lanes, 0, axis)
    return values
