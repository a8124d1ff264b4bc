"""What every peer speaks: `POST /v1/images/edits` (multipart) and `GET /healthz`, masks, crops, and the paste at the end.

No retouch and no torch in here: the environments of the peers have neither the one, nor, at the server's end, need of the
other. Boxes are (x0, y0, x1, y1) in document pixels, half open; pictures are (H, W, 3) uint8, masks (H, W) bool, true = edit.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]

CELL = 16
"""Sides of what a pipeline is given are multiples of this; it would cut off the rest without a word."""
PADDING = 32
"""Pixels around the mask that a crop shows: what the documentation of diffusers takes for `padding_mask_crop`."""
FEATHER = 4
"""Pixels over which an answer fades in, inside the mask: Retouch's own, so that seams are compared alike."""
MAX_SIDE, MAX_N, MAX_STEPS = 1024, 10, 100


class Refused(Exception):
    """The request is wrong; `status` is what HTTP says to that, `param` the field."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": "invalid_request_error", "param": self.param, "code": None}}


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """One request: its `n` pictures have the seeds seed, seed + 1, ... `steps` None: the checkpoint's own."""

    image: np.ndarray
    mask: np.ndarray
    prompt: str
    n: int = 1
    seed: int = 0
    steps: int | None = None


def ask_of(fields: dict[str, Any], files: dict[str, bytes]) -> Ask:
    """The request of a form's text fields and files. Raises Refused; fields that would change the picture are not ignored."""
    for name in ("image", "prompt"):
        if name not in (files if name == "image" else fields):
            raise Refused(f"{name} is missing; send it as a form field.", name)
    image = np.array(_open(files["image"], "image").convert("RGB"))
    height, width = image.shape[:2]
    if height % CELL or width % CELL or max(height, width) > MAX_SIDE:
        raise Refused(f"image is {width} x {height}; give sides that are multiples of {CELL}, up to {MAX_SIDE}.", "image")
    mask = np.ones((height, width), bool) if "mask" not in files else _mask(files["mask"], (width, height))
    if fields.get("size", "auto") not in ("auto", f"{width}x{height}"):
        raise Refused("size is not the image's; peers answer in the document's size.", "size")
    for name, only in (("response_format", "b64_json"), ("output_format", "png"), ("stream", "false")):
        if fields.get(name, only) != only:
            raise Refused(f"{name} is {fields[name]!r}; peers answer with {only}.", name)
    steps = _whole(fields, "num_inference_steps", 0, MAX_STEPS)
    n, seed = _whole(fields, "n", 1, MAX_N, least=1), _whole(fields, "seed", 0, 2**63 - 1 - MAX_N)
    return Ask(image, mask, fields["prompt"], n, seed, steps or None)


def _open(data: bytes, name: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:  # a decoder may raise anything on damaged bytes
        raise Refused(f"{name} is no picture, or it is damaged.", name) from error
    return image


def _mask(data: bytes, size: tuple[int, int]) -> np.ndarray:
    picture = _open(data, "mask")
    if picture.size != size:
        raise Refused(f"mask is {picture.width} x {picture.height}, the image {size[0]} x {size[1]}; they must agree.", "mask")
    if not picture.has_transparency_data:
        raise Refused("mask has no alpha channel; alpha 0 is where to edit.", "mask")
    mask: np.ndarray = np.array(picture.convert("RGBA"))[..., 3] == 0
    if not mask.any():
        raise Refused("mask is empty: its alpha is nowhere 0.", "mask")
    return mask


def _whole(fields: dict[str, Any], name: str, default: int, most: int, least: int = 0) -> int:
    try:
        value = int(fields.get(name, default))
    except ValueError as error:
        raise Refused(f"{name} is {fields[name]!r}; give a whole number.", name) from error
    if not least <= value <= most:
        raise Refused(f"{name} is {value}; give {least} to {most}.", name)
    return value


async def read(form: Any) -> Ask:
    """The request of a Starlette form."""
    files = {name.removesuffix("[]"): await part.read() for name, part in form.multi_items() if hasattr(part, "read")}
    return ask_of({name: part for name, part in form.multi_items() if not hasattr(part, "read")}, files)


def answer(pictures: Sequence[np.ndarray]) -> dict[str, Any]:
    """The body of an answer. PNG at its quickest: size is not what is measured."""
    data = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
        data.append({"b64_json": base64.b64encode(buffer.getvalue()).decode()})
    height, width = pictures[0].shape[:2]
    return {"created": int(time.time()), "data": data, "output_format": "png", "size": f"{width}x{height}"}


def bounds(mask: np.ndarray) -> Box:
    """The smallest box around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def crop_box(mask: np.ndarray, padding: int = PADDING, sides: Sequence[int] = ()) -> Box:
    """The crop around a mask that a pipeline edits: its bounds and the padding, sides whole cells, inside the picture.

    `sides`: those a crop may have, so that compiled code meets few shapes and batches find mates: the next above, or the
    picture's whole side where none of them fits into it.
    """
    height, width = mask.shape
    x0, y0, x1, y1 = bounds(mask)
    (left, right), (top, bottom) = (
        _span(low - padding, high + padding, most, sides) for low, high, most in ((x0, x1, width), (y0, y1, height))
    )
    return left, top, right, bottom


def _span(low: int, high: int, most: int, sides: Sequence[int]) -> tuple[int, int]:
    low, high = max(low, 0), min(high, most)
    side = -(-(high - low) // CELL) * CELL
    side = min([allowed for allowed in sides if allowed >= side], default=most if sides else side)
    side = min(side, most)
    start = min(max((low + high - side) // 2, 0), most - side)
    return start, start + side


def paste(original: np.ndarray, edited: np.ndarray, mask: np.ndarray, box: Box, feather: int = FEATHER) -> np.ndarray:
    """`edited` (the box's size) put into the original: inside the mask only, fading in over `feather` pixels from its edge.

    The box holds the whole mask.
    """
    x0, y0, x1, y1 = bounds(mask)
    rim = [slice(max(low - 1, 0), high + 1) for low, high in ((y0, y1), (x0, x1))]  # lets the fade see what borders on the mask
    weight = _fade(mask[rim[0], rim[1]], feather)[..., None]
    weight = weight[y0 - rim[0].start :, x0 - rim[1].start :][: y1 - y0, : x1 - x0]
    result = original.copy()
    region, after = result[y0:y1, x0:x1], edited[y0 - box[1] : y1 - box[1], x0 - box[0] : x1 - box[0]]
    np.copyto(region, np.rint(region * (1 - weight) + after * weight).astype(np.uint8), where=weight > 0)
    return result


def _fade(mask: np.ndarray, feather: int) -> np.ndarray:
    """(H, W) float32: 0 outside; inside d over the largest d within reach, d the octagonal distance, at most feather + 1.

    The array's own border is no border of the mask, and in the middle of a thin mask the weight is 1.
    """
    distance, inner = mask.astype(np.uint8), mask
    for step in range(1, feather + 1):
        rows = _along(inner, 0, 1, np.minimum)
        inner = rows & _along(inner, 1, 1, np.minimum) if step % 2 else _along(rows, 1, 1, np.minimum)
        distance += inner
    highest = _along(_along(distance, 0, feather + 1, np.maximum), 1, feather + 1, np.maximum)
    weights: np.ndarray = distance / np.maximum(highest, 1).astype(np.float32)
    return weights


def _along(values: np.ndarray, axis: int, reach: int, extreme: np.ufunc) -> np.ndarray:
    """The extreme of the values up to `reach` away along an axis."""
    lanes = np.moveaxis(np.pad(values, [(reach, reach) if a == axis else (0, 0) for a in (0, 1)], mode="edge"), axis, 0)
    found: np.ndarray = extreme.reduce([lanes[at : at + values.shape[axis]] for at in range(2 * reach + 1)])
    return np.moveaxis(found, 0, axis)
