"""From what was sent to what the worker does: an `Order`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from retouch import picture
from retouch.edit import Edit, InvalidOption
from retouch.picture import Picture
from retouch.serve.budget import Claim
from retouch.serve.forms import Fields
from retouch.serve.settings import Tenant

KINDS = {"png": "PNG", "webp": "WEBP", "jpeg": "JPEG"}

JPEG_EXIF = 65_533
"""Bytes that one marker of a JPEG file takes."""


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """What is to be done, ready for the worker: `edits`, of the crop at `box` of `photo`.

    `claim` is what it holds of the pixels that may be in flight. `source` is the picture's file, where that is recorded.
    """

    fields: Fields
    photo: Picture
    box: tuple[int, int, int, int]
    edits: tuple[Edit, ...]
    claim: Claim
    source: bytes = b""

    @property
    def size(self) -> str:
        return f"{self.photo.size[0]}x{self.photo.size[1]}"

    def whole(self, crop: np.ndarray) -> np.ndarray:
        """The picture with the worker's crop in its place."""
        x0, y0, x1, y1 = self.box
        if crop.shape[:2] == self.photo.pixels.shape[:2]:
            return crop
        image = self.photo.pixels.copy()
        image[y0:y1, x0:x1] = crop
        return image

    def encoded(self, image: np.ndarray) -> bytes:
        kind = KINDS[self.fields.output_format]
        quality = 95 if self.fields.output_compression is None else self.fields.output_compression
        return picture.encode(image, kind, self.photo, quality)


def order_of(
    fields: Fields, photo: Picture, mask: np.ndarray | None, references: tuple[np.ndarray, ...], tenant: Tenant, own_steps: int,
    max_side: int, seed: int, claim: Claim, blank: bool = False, source: bytes = b"",
) -> Order:  # fmt: skip
    """Whatever is wrong with a request is refused here, before anything is queued. Raises InvalidEdit's errors."""
    if fields.size not in ("auto", f"{photo.size[0]}x{photo.size[1]}"):
        raise InvalidOption(f"size is {fields.size}, but an edit keeps its picture's: leave it out, or say auto.")
    if fields.partial_images and not fields.stream:
        raise InvalidOption("partial_images need stream=true.")
    kind = KINDS[fields.output_format]
    if max(photo.size) > picture.MAX_SIDE[kind]:
        raise InvalidOption(f"{fields.output_format} holds at most {picture.MAX_SIDE[kind]:,} pixels a side; ask for png.")
    if kind == "JPEG" and len(photo.exif or b"") > JPEG_EXIF:
        raise InvalidOption(f"the picture's EXIF has more than the {JPEG_EXIF:,} bytes that jpeg holds; ask for png or webp.")
    see_through = photo.pixels.shape[2] == 4 and bool((photo.pixels[..., 3] < 255).any())
    if fields.output_format == "jpeg" and see_through:
        raise InvalidOption("the picture has transparency, which jpeg cannot keep; ask for png or webp.")
    if fields.output_compression is not None and fields.output_format != "jpeg":
        raise InvalidOption("output_compression is for jpeg; png and webp are exact here. Leave it out.")
    common: dict[str, Any] = {
        "prompt": fields.prompt, "steps": fields.steps(own_steps), "guidance": fields.guidance_scale,
        "priority": fields.priority, "deadline": None if fields.deadline_ms is None else fields.deadline_ms / 1000,
        "tenant": tenant.name, "reuse": fields.use_cache, "references": references, "blank": blank,
        "adapters": fields.worn(), "negative": fields.negative_prompt,
    }  # fmt: skip
    checked = Edit(photo.pixels, mask=mask, seed=seed, **common)
    area = np.ones(photo.pixels.shape[:2], bool) if checked.mask is None else checked.mask
    box, _ = picture.working_crop(area, photo.size, max_side)
    x0, y0, x1, y1 = box
    crop = np.ascontiguousarray(photo.pixels[y0:y1, x0:x1])
    inside = None if mask is None else np.ascontiguousarray(mask[y0:y1, x0:x1])
    edits = tuple(Edit(crop, mask=inside, seed=seed + i, **common) for i in range(fields.n))
    return Order(fields, photo, box, edits, claim, source)
