"""Edits and answers made small, to be sent between the server and the worker's process, and to be kept: masks as bits, answers
as what they changed, and a picture sent once however many edits there are of it.

A picture of 512 px has 0.8 MB; to write it into the pipe and to read it takes 2 ms. The server's end alone says what the
process keeps: each message brings the pictures that are lacking there, and names those that may go. As messages arrive in their
order, both ends agree, and neither ever asks.
"""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from retouch.boxes import bounds
from retouch.edit import Edit, Edited, Usage

KEPT = 256 << 20
"""Bytes of pictures that the process keeps for edits to come."""

OTHERS = tuple(one.name for one in fields(Edit) if one.name not in ("image", "mask", "references"))


def changed_box(edit: Edit) -> tuple[int, int, int, int]:
    """What the answer can differ in from the picture that was sent."""
    return (0, 0, edit.image.shape[1], edit.image.shape[0]) if edit.mask is None else bounds(edit.mask)


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """An edit on its way: its pictures are numbers, its mask lies in `bits`, eight pixels a byte, `fields` are all the rest.

    `pictures` are those that the process has not got yet; `gone` are not to be kept there after this edit.
    """

    image: int
    references: tuple[int, ...]
    bits: np.ndarray | None
    fields: dict[str, Any]
    pictures: dict[int, np.ndarray]
    gone: tuple[int, ...]

    def opened(self, shelf: dict[int, np.ndarray]) -> Edit:
        """`shelf` holds the process's pictures, read-only as edits share them. For each message once, in their order."""
        for picture in self.pictures.values():
            picture.flags.writeable = False
        shelf |= self.pictures
        image, references = shelf[self.image], tuple(shelf[number] for number in self.references)
        for number in self.gone:
            del shelf[number]
        mask = None
        if self.bits is not None:
            height, width = image.shape[:2]
            mask = np.unpackbits(self.bits, count=height * width).reshape(height, width).view(bool)
        return Edit(image, mask=mask, references=references, **self.fields)


Place = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Where pixels lie in memory: address, shape, strides. While somebody has them, they are the same picture."""


@dataclass(frozen=True, slots=True, eq=False)
class _Sent:
    """A picture that the process has, and whose memory it lies in here."""

    number: int
    bytes: int
    owner: weakref.ref[np.ndarray]


class Packer:
    """The server's end of one process; a new process gets a new one. Not from two threads at once.

    The process keeps `budget` bytes of pictures, those that were used last, and only what somebody here still has: the next
    edit takes the others away. Pixels must not change any more once an edit of them was packed.
    """

    def __init__(self, budget: int = KEPT) -> None:
        self.budget, self.bytes = budget, 0
        self._sent: OrderedDict[Place, _Sent] = OrderedDict()
        self._to_go: list[int] = []
        self._numbers = itertools.count()

    def packed(self, edit: Edit) -> Asked:
        bits = None if edit.mask is None else np.packbits(edit.mask)
        gone = self._to_go + [self._forget(place) for place, sent in list(self._sent.items()) if sent.owner() is None]
        new: dict[int, np.ndarray] = {}
        image, *references = [self._number(picture, new) for picture in (edit.image, *edit.references)]
        while self.bytes > self.budget:
            gone.append(self._forget(next(iter(self._sent))))
        self._to_go = []
        return Asked(image, tuple(references), bits, {name: getattr(edit, name) for name in OTHERS}, new, tuple(gone))

    def unsent(self, asked: Asked) -> None:
        """`asked` never went: who edits its new pictures next sends them again, and says which may go."""
        for place in [place for place, sent in self._sent.items() if sent.number in asked.pictures]:
            self._forget(place)
        self._to_go += [number for number in asked.gone if number not in asked.pictures]

    def _number(self, picture: np.ndarray, new: dict[int, np.ndarray]) -> int:
        place = (picture.ctypes.data, picture.shape, picture.strides)
        sent = self._sent.get(place)
        if sent is None:
            owner = picture
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            sent = self._sent[place] = _Sent(next(self._numbers), picture.nbytes, weakref.ref(owner))
            self.bytes += sent.bytes
            new[sent.number] = picture
        self._sent.move_to_end(place)
        return sent.number

    def _forget(self, place: Place) -> int:
        sent = self._sent.pop(place)
        self.bytes -= sent.bytes
        return sent.number


@dataclass(frozen=True, slots=True, eq=False)
class Changed:
    """An answer's or a preview's pixels (h, w, 3 or 4) uint8 in the box that the edit may change, and the answer's usage.

    Without a mask they are the whole answer, which a filter may have given another size, or alpha.
    """

    pixels: np.ndarray
    usage: Usage = field(default_factory=Usage)

    @property
    def bytes(self) -> int:
        return self.pixels.nbytes

    @classmethod
    def of(cls, edit: Edit, image: np.ndarray, usage: Usage | None = None) -> Changed:
        if edit.mask is None:
            return cls(image.copy(), usage or Usage())
        x0, y0, x1, y1 = changed_box(edit)
        return cls(image[y0:y1, x0:x1].copy(), usage or Usage())

    def image(self, edit: Edit) -> np.ndarray:
        if edit.mask is None:
            return self.pixels.copy()
        x0, y0, x1, y1 = changed_box(edit)
        image = edit.image.copy()
        image[y0:y1, x0:x1] = self.pixels
        return image

    def edited(self, edit: Edit) -> Edited:
        return Edited(self.image(edit), edit.seed, self.usage)
