"""The pictures of a trace: files of a folder, whole or in views, each held to the hash that the trace names it by."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from retouch import picture
from retouch.boxes import Size
from retouch.edit import InvalidImage, InvalidOption
from retouch.trace import InvalidTrace, Trace, View, hash_of

PHOTOS = Path(__file__).resolve().parents[3] / "photos"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif", ".ppm")
CELL = 16
"""Views have sides in multiples of this many pixels, which every pipeline takes."""


class Pictures:
    """A folder's pictures; without a folder, those that are bundled. Raises InvalidOption where there are none.

    `stand_ins`: a picture that the trace knows by its hash alone, and that is not here, is replaced by a view of one that is.
    """

    def __init__(self, folder: Path | None = None, stand_ins: bool = False) -> None:
        self.folder, self.stand_ins = folder or PHOTOS, stand_ins
        try:
            files = [path for path in self.folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()]
        except OSError as error:
            reason = "the bundled photos are in the folder photos/ of the clone" if folder is None else f"{error.strerror}"
            raise InvalidOption(f"{self.folder} cannot be read ({reason}); give a folder with --pictures.") from error
        self.names = sorted(path.name for path in files)
        if not self.names:
            raise InvalidOption(f"there is no picture in {self.folder}; give a folder of pictures with --pictures.")
        self._hashes: dict[str, str] = {}
        self._sizes: dict[str, Size] = {}
        self._whole = lru_cache(32)(self._read)

    def view(self, number: int, side: int, rng: np.random.Generator) -> View:
        """The folder's pictures one after the other, and then crops of them, half of them mirrored.

        `side` is the longer one; the other keeps the picture's proportions, to a cell.
        """
        name = self.names[number % len(self.names)]
        width, height = self._size(name)
        if number < len(self.names):
            return View(self._hash(name), _fitted((width, height), side), name)
        scale = rng.uniform(0.5, 0.9)
        w, h = max(1, round(width * scale)), max(1, round(height * scale))
        x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        return View(self._hash(name), _fitted((w, h), side), name, (x, y, x + w, y + h), bool(rng.random() < 0.5))

    def check(self, trace: Trace, path: Path) -> None:
        """Raises InvalidTrace for the first line whose picture is missing or another than it was."""
        seen: set[View] = set()
        for number, request in enumerate(trace.requests, 2):
            view = request.document
            if isinstance(view, View) and view not in seen:
                seen.add(view)
                try:
                    self._found(view)
                except InvalidTrace as error:
                    raise InvalidTrace(f"{path}, line {number}: {error}") from error

    def pixels(self, view: View) -> np.ndarray:
        """(H, W, 3 or 4) uint8. Raises InvalidTrace, InvalidImage."""
        found = self._found(view)
        image = self._whole(found.file)
        if found.crop is not None:
            x0, y0, x1, y1 = found.crop
            image = image[y0:y1, x0:x1]
        if found.flip:
            image = image[:, ::-1]
        image = np.ascontiguousarray(image)
        if image.shape[1::-1] == found.size:
            return image
        return np.array(Image.fromarray(image).resize(found.size, Image.Resampling.LANCZOS))

    def _found(self, view: View) -> View:
        """The view with a file that is there, and a crop that lies in it. Raises InvalidTrace."""
        found = self._by_name(view) if view.file else self._by_hash(view)
        if found.crop is not None:
            size, crop = self._size(found.file), list(found.crop)
            if crop[2] > size[0] or crop[3] > size[1]:
                raise InvalidTrace(f"the crop {crop} leaves {found.file}, which is {size[0]} x {size[1]}; mend the line.")
        return found

    def _by_name(self, view: View) -> View:
        if view.file not in self.names:
            raise InvalidTrace(f"{view.file} is not in {self.folder}; give the folder that has it with --pictures.")
        if self._hash(view.file) != view.hash:
            raise InvalidTrace(
                f"{self.folder / view.file} has changed since the trace was made (its hash is {self._hash(view.file)}, not "
                f"{view.hash}); bring that file back, or make the trace again."
            )
        return view

    def _by_hash(self, view: View) -> View:
        for name in self.names:
            if self._hash(name) == view.hash:
                return View(view.hash, view.size, name, view.crop, view.flip)
        if not self.stand_ins:
            raise InvalidTrace(
                f"no picture in {self.folder} has the hash {view.hash}; give the folder that has it with --pictures, or "
                "replay with --stand-ins in the place of pictures that were not recorded."
            )
        rng = np.random.default_rng(list(view.hash.encode()))
        other = self.view(len(self.names) + int(rng.integers(len(self.names))), max(view.size), rng)
        return View(other.hash, view.size, other.file, other.crop, other.flip)

    def _read(self, name: str) -> np.ndarray:
        return picture.read(self.folder / name).pixels

    def _size(self, name: str) -> Size:
        if name not in self._sizes:
            height, width = self._whole(name).shape[:2]
            self._sizes[name] = width, height
        return self._sizes[name]

    def _hash(self, name: str) -> str:
        if name not in self._hashes:
            try:
                self._hashes[name] = hash_of((self.folder / name).read_bytes())
            except OSError as error:
                raise InvalidImage(f"{self.folder / name} cannot be read ({error.strerror}).") from error
        return self._hashes[name]


def _fitted(size: Size, side: int) -> Size:
    scale = side / max(size)
    width, height = (max(CELL, round(length * scale / CELL) * CELL) for length in size)
    return width, height


def another(image: np.ndarray, number: int) -> np.ndarray:
    """The same picture but for one pixel: a document that no cache knows, as a cache would be wrong to."""
    changed = image.copy()
    changed[0, 0, :3] = number // 65536 % 256, number // 256 % 256, number % 256
    return changed
