"""Edits and answers made small, to be sent between the server and the worker's process, and to be kept: masks as bits, answers
as what they changed.

A picture of 512 px has 0.8 MB, and a pipe takes 2 ms for that.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from retouch.edit import Edit, Edited, Usage
from retouch.picture import bounds


def changed_box(edit: Edit) -> tuple[int, int, int, int]:
    """What the answer can differ in from the picture that was sent."""
    return (0, 0, edit.image.shape[1], edit.image.shape[0]) if edit.mask is None else bounds(edit.mask)


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """An edit whose mask lies in `bits`, eight pixels a byte."""

    edit: Edit
    bits: np.ndarray | None

    @classmethod
    def of(cls, edit: Edit) -> Asked:
        return cls(edit, None) if edit.mask is None else cls(replace(edit, mask=None), np.packbits(edit.mask))

    def opened(self) -> Edit:
        if self.bits is None:
            return self.edit
        height, width = self.edit.image.shape[:2]
        mask = np.unpackbits(self.bits, count=height * width).reshape(height, width).view(bool)
        return replace(self.edit, mask=mask)


@dataclass(frozen=True, slots=True, eq=False)
class Changed:
    """An answer's or a preview's pixels (h, w, 3 or 4) uint8 in the box that the edit may change, and the answer's usage."""

    pixels: np.ndarray
    usage: Usage = field(default_factory=Usage)

    @property
    def bytes(self) -> int:
        return self.pixels.nbytes

    @classmethod
    def of(cls, edit: Edit, image: np.ndarray, usage: Usage | None = None) -> Changed:
        x0, y0, x1, y1 = changed_box(edit)
        return cls(image[y0:y1, x0:x1].copy(), usage or Usage())

    def image(self, edit: Edit) -> np.ndarray:
        x0, y0, x1, y1 = changed_box(edit)
        image = edit.image.copy()
        image[y0:y1, x0:x1] = self.pixels
        return image

    def edited(self, edit: Edit) -> Edited:
        return Edited(self.image(edit), edit.seed, self.usage)
