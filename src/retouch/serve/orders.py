"""From what was sent to what the worker does: an `Order`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from retouch import picture
from retouch.boxes import Box, Size, working_crop
from retouch.edit import DeadlinePassed, Edit, InvalidOption
from retouch.engine.parcels import changed_box
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
    `filter` names the one whose it is in the model's place; what that makes of the picture has `scale` times its sides.
    `further` pictures are held as long, for others who name the same documents.
    """

    fields: Fields
    photo: Picture
    box: Box
    edits: tuple[Edit, ...]
    claim: Claim
    source: bytes = b""
    filter: str = ""
    scale: int = 1
    further: tuple[Picture, ...] = ()

    @property
    def pixels(self) -> int:
        """Of all answers."""
        width, height = self.photo.size
        return len(self.edits) * width * height * self.scale**2

    @property
    def size(self) -> str:
        return f"{self.photo.size[0] * self.scale}x{self.photo.size[1] * self.scale}"

    def timed(self, seconds: float) -> Order:
        """The same when so many seconds of its deadline are over. Raises DeadlinePassed where nothing is left."""
        deadline = self.edits[0].deadline
        if deadline is None:
            return self
        left = deadline - seconds
        if left <= 0:
            raise DeadlinePassed(
                f"the {deadline:.3g} s of its deadline were over before the request was read and its pictures decoded; "
                "allow more, or come later."
            )
        return replace(self, edits=tuple(replace(edit, deadline=left) for edit in self.edits))

    def whole(self, crop: np.ndarray) -> np.ndarray:
        """The picture with the worker's crop in its place; what has another form than was sent is the whole answer."""
        x0, y0, x1, y1 = self.box
        if crop.shape != self.edits[0].image.shape or crop.shape == self.photo.pixels.shape:
            return crop
        image = self.photo.pixels.copy()
        image[y0:y1, x0:x1] = crop
        return image

    def file(self, crop: np.ndarray) -> bytes:
        """Of the same. As PNG, only the rows that the edit may have changed are coded, and the others with the first answer."""
        edit = self.edits[0]
        if self.fields.output_format != "png" or crop.shape != edit.image.shape:
            return self.encoded(self.whole(crop))
        x0, y0, x1, y1 = changed_box(edit)
        at = self.box[0] + x0, self.box[1] + y0
        return self.photo.rows.file(self.photo.icc, self.photo.exif, crop[y0:y1, x0:x1], at)

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
    check_file(fields, photo, photo.size)
    common: dict[str, Any] = {
        "prompt": fields.prompt, "steps": fields.steps(own_steps), "guidance": fields.guidance_scale,
        "priority": fields.priority, "deadline": None if fields.deadline_ms is None else fields.deadline_ms / 1000,
        "tenant": tenant.name, "reuse": fields.use_cache, "references": references, "blank": blank,
        "adapters": fields.worn(), "negative": fields.negative_prompt,
    }  # fmt: skip
    whole = Edit(photo.pixels, mask=mask, seed=seed, **common)
    area = np.ones(photo.pixels.shape[:2], bool) if mask is None else mask
    box, _ = working_crop(area, photo.size, max_side)
    x0, y0, x1, y1 = box
    inside = None if mask is None else mask[y0:y1, x0:x1]
    crop = replace(whole, image=photo.pixels[y0:y1, x0:x1], mask=inside)
    edits = (crop, *(replace(crop, seed=seed + i) for i in range(1, fields.n)))
    return Order(fields, photo, box, edits, claim, source)


def check_file(fields: Fields, photo: Picture, size: Size) -> None:
    """Whether the answer, of `size` and with what `photo` brings along, fits the file that is asked for. Raises
    InvalidOption.
    """
    kind = KINDS[fields.output_format]
    if max(size) > picture.MAX_SIDE[kind]:
        raise InvalidOption(f"{fields.output_format} holds at most {picture.MAX_SIDE[kind]:,} pixels a side; ask for png.")
    if kind == "JPEG" and len(photo.exif or b"") > JPEG_EXIF:
        raise InvalidOption(f"the picture's EXIF has more than the {JPEG_EXIF:,} bytes that jpeg holds; ask for png or webp.")
    if kind == "JPEG" and photo.pixels.shape[2] == 4 and bool((photo.pixels[..., 3] < 255).any()):
        raise InvalidOption("the picture has transparency, which jpeg cannot keep; ask for png or webp.")
    if fields.output_compression is not None and fields.output_format != "jpeg":
        raise InvalidOption("output_compression is for jpeg; png and webp are exact here. Leave it out.")
