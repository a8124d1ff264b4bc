"""Pictures and masks in and out of files. Arrays are (height, width, ...), sizes (width, height)."""

from __future__ import annotations

import io
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from PIL import Image, ImageFile

from retouch import png
from retouch.boxes import Size
from retouch.edit import ImageTooLarge, InvalidImage, InvalidMask, InvalidOption, OutputFailed
from retouch.pixels import eight_bit, mask_form, turned

log = logging.getLogger(__name__)

T = TypeVar("T")
Source = str | os.PathLike[str] | bytes | IO[bytes]

MAX_PIXELS = 178_000_000
"""Just under where Pillow refuses by itself; a 24 megapixel photo takes a seventh of it."""

READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MASK_MODES = ("auto", "alpha", "white")
WRITABLE = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
MAX_SIDE = {"PNG": 2**31 - 1, "WEBP": 16_383, "JPEG": 65_500}


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Picture:
    """A decoded picture: `pixels` (H, W, 3 or 4) uint8, upright. `exif` has no orientation, as the pixels carry it.

    `rows` keeps what of them was coded as PNG, for whoever edits the picture again.
    """

    pixels: np.ndarray
    icc: bytes | None = None
    exif: bytes | None = None
    rows: png.Rows = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", png.Rows(self.pixels))

    @property
    def size(self) -> Size:
        return self.pixels.shape[1], self.pixels.shape[0]


def read(source: Source, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode a picture from a path, bytes or an open file; of an animation, the first frame.

    Gray, palette, CMYK and 16-bit pictures become 8-bit RGB, or RGBA where they have transparency. The size is checked
    before anything is unfolded. Raises InvalidImage or ImageTooLarge.
    """
    pixels, image, exif = _unfolded(source, max_pixels, eight_bit)
    icc = image.info.get("icc_profile")
    return Picture(pixels, icc if isinstance(icc, bytes) and icc[16:20] == b"RGB " else None, exif)


def _unfolded(source: Source, max_pixels: int, into: Callable[[Image.Image], T]) -> tuple[T, ImageFile.ImageFile, bytes | None]:
    """What `into` makes of the upright picture, the picture as it lies in the file, and its EXIF without the turn."""
    data, name = _bytes(source)
    image = _opened(data, name, max_pixels)
    deep = image.mode.startswith(("I", "F")) or any(";16" in str(tile) for tile in image.tile)
    try:
        image.load()
        upright, exif = turned(image)
        made = into(upright)
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"{name} unfolds to too many pixels; scale it down.") from error
    except Exception as error:
        raise InvalidImage(f"{name} is damaged or cut off ({_line(error)}); give a whole file.") from error
    if deep:
        log.warning("%s has more than 8 bits a channel; it is read, edited and written with 8.", name)
    return made, image, exif


def measured(source: Source, max_pixels: int = MAX_PIXELS) -> Size:
    """Width and height as they lie in the file, of which nothing is unfolded. Raises as `read` does."""
    return _opened(*_bytes(source), max_pixels).size


def _opened(data: bytes, name: str, max_pixels: int) -> ImageFile.ImageFile:
    if not data:
        raise InvalidImage(f"{name} is empty; give a picture.")
    try:
        image = Image.open(io.BytesIO(data), formats=READABLE)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(f"{name} has more than {max_pixels / 1e6:,.0f} megapixels; scale it down.") from error
    except Exception as error:  # a decoder may raise anything on hostile bytes
        raise InvalidImage(f"{name} is not a picture, or its start is damaged; give one of {', '.join(READABLE)}.") from error
    if image.width * image.height > max_pixels:
        raise ImageTooLarge(
            f"{name} is {image.width} x {image.height}, more than {max_pixels / 1e6:,.0f} megapixels; scale it down."
        )
    return image


def _bytes(source: Source) -> tuple[bytes, str]:
    if isinstance(source, bytes):
        return source, "the picture"
    if not isinstance(source, str | os.PathLike):
        name = str(getattr(source, "name", "the picture"))
        try:
            return source.read(), name
        except (OSError, ValueError) as error:
            raise InvalidImage(f"{name} cannot be read ({_line(error)}).") from error
    name = os.fspath(source)
    try:
        return Path(source).read_bytes(), name
    except FileNotFoundError as error:
        raise InvalidImage(f"there is no file {name}; check the path.") from error
    except IsADirectoryError as error:
        raise InvalidImage(f"{name} is a folder; give a picture in it.") from error
    except PermissionError as error:
        raise InvalidImage(f"{name} may not be read; check its permissions.") from error
    except (OSError, ValueError) as error:
        raise InvalidImage(f"{name} cannot be read ({_line(error)}).") from error


def read_mask(source: Source, size: Size, mode: str = "auto") -> np.ndarray:
    """A mask picture as (H, W) bool, true = edit here. `size` is the document's (width, height).

    "alpha": edit where alpha is 0 (OpenAI's convention). "white": edit where the luma is 128 or more. "auto": alpha
    where the picture has any transparency, else white. Raises InvalidMask; InvalidImage where it is no picture at all.
    """
    if mode not in MASK_MODES:
        raise InvalidOption(f"mask mode is {mode!r}; give one of {', '.join(MASK_MODES)}.")
    name = "the mask" if not isinstance(source, str | os.PathLike) else f"the mask {os.fspath(source)}"
    image, _, _ = _unfolded(source, MAX_PIXELS, mask_form)
    if image.size != tuple(size):
        raise InvalidMask(
            f"{name} is {image.size[0]} x {image.size[1]} but the picture is {size[0]} x {size[1]}; "
            "give a mask of the picture's own size (after EXIF rotation)."
        )
    alpha = np.asarray(image.getchannel("A")) if image.mode == "RGBA" else None
    if mode == "alpha" and alpha is None:
        raise InvalidMask(f"{name} has no alpha channel; save it with one, or use mask mode white.")
    if alpha is not None and (mode == "alpha" or (mode == "auto" and bool((alpha < 255).any()))):
        mask: np.ndarray = alpha == 0
        mend = "make the part to edit fully transparent, or use mask mode white"
    else:
        mask = np.asarray(image.convert("L")) >= 128
        mend = "paint the part to edit white, or use mask mode alpha"
    if not mask.any():
        raise InvalidMask(f"{name} is empty: {mend}.")
    return mask


def box_mask(box: tuple[int, int, int, int], size: Size) -> np.ndarray:
    """The mask of one rectangle. `box` is (x, y, width, height); it must lie within the picture wholly."""
    x, y, w, h = box
    if w <= 0 or h <= 0:
        raise InvalidMask(f"box {x},{y},{w},{h} has no area; give x,y,width,height with both sides above 0.")
    if x < 0 or y < 0 or x + w > size[0] or y + h > size[1]:
        raise InvalidMask(f"box {x},{y},{w},{h} reaches outside the picture, which is {size[0]} x {size[1]}.")
    mask = np.zeros((size[1], size[0]), dtype=bool)
    mask[y : y + h, x : x + w] = True
    return mask


def union(masks: Sequence[np.ndarray]) -> np.ndarray:
    """One mask that is true wherever any of them is."""
    if not masks:
        raise InvalidMask("there is no mask to unite; give at least one.")
    if len({mask.shape for mask in masks}) > 1:
        raise InvalidMask(f"the masks have different sizes ({', '.join(str(m.shape[::-1]) for m in masks)}).")
    result = masks[0].copy()
    for mask in masks[1:]:
        result |= mask
    return result


def check_output(path: str | os.PathLike[str], pixels: np.ndarray) -> None:
    """Refuse what `write` could never write here, before time is spent on an edit.

    `pixels` is any array of the output's size and alpha, such as the original's. Raises InvalidOption or OutputFailed.
    """
    target = Path(path)
    _format(target, pixels)
    try:  # in Python 3.11 these raise for a name that is too long, or in a folder that may not be read
        folder, inside = target.is_dir(), target.parent.is_dir()
    except OSError as error:
        raise OutputFailed(f"{target} cannot be written ({_line(error)}); give another name or folder.") from error
    if folder:
        raise OutputFailed(f"{target} is a folder; give a file name in it.")
    if not inside:
        raise OutputFailed(f"there is no folder {target.parent}; make it first, or write elsewhere.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputFailed(f"the folder {target.parent} may not be written to; check its permissions.")


def write(path: str | os.PathLike[str], pixels: np.ndarray, like: Picture | None = None) -> None:
    """Write (H, W, 3 or 4) uint8 by suffix: PNG and WebP are exact, JPEG is lossy.

    Colour profile and EXIF come from `like`. The file appears whole or not at all.
    Raises InvalidOption or OutputFailed.
    """
    write_all([(path, pixels)], like)


def write_all(outputs: Sequence[tuple[str | os.PathLike[str], np.ndarray]], like: Picture | None = None) -> None:
    """Write several pictures so that all appear, or none, and older ones are there again. Every one is on the disk before the
    first takes its name. Raises InvalidOption or OutputFailed.
    """
    staged: list[tuple[Path, Path]] = []
    placed: list[tuple[Path, Path | None]] = []
    try:
        for path, pixels in outputs:
            target = Path(path)
            data = _encode(target, pixels, like)
            temporary = _beside(target)
            staged.append((temporary, target))
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for temporary, target in staged:
            placed.append((target, _replaced(temporary, target, keep=len(staged) > 1)))
    except BaseException as error:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)
        for place, older in reversed(placed):
            if older is None:
                place.unlink(missing_ok=True)
            else:
                os.replace(older, place)
        if isinstance(error, OSError):
            text = f"{target} could not be written ({_line(error)}); free space, or write elsewhere."
            raise OutputFailed(text) from error
        raise
    for older in (older for _, older in placed if older is not None):
        older.unlink(missing_ok=True)


def _beside(target: Path) -> Path:
    return target.parent / f".retouch-{secrets.token_hex(8)}.tmp"


def _replaced(temporary: Path, target: Path, keep: bool) -> Path | None:
    """Give a file its name. A copy of what had it before is returned where that is to be kept."""
    older = _beside(target) if keep and target.is_file() else None
    try:
        if older is not None:
            shutil.copy2(target, older, follow_symlinks=False)
        os.replace(temporary, target)
    except BaseException:
        if older is not None:
            older.unlink(missing_ok=True)
        raise
    return older


def _format(target: Path, pixels: np.ndarray) -> str:
    kind = WRITABLE.get(target.suffix.lower())
    if kind is None:
        raise InvalidOption(f"{target} has no known picture suffix; give one of {', '.join(WRITABLE)}.")
    if max(pixels.shape[:2]) > MAX_SIDE[kind]:
        raise InvalidOption(f"{kind} holds at most {MAX_SIDE[kind]:,} pixels a side; give a .png name.")
    if kind == "JPEG" and pixels.shape[2] == 4 and bool((pixels[..., 3] < 255).any()):
        raise InvalidOption(f"the picture has transparency, which JPEG cannot keep; give {target.stem}.png instead.")
    return kind


def _encode(target: Path, pixels: np.ndarray, like: Picture | None) -> bytes:
    kind = _format(target, pixels)
    if kind == "JPEG":
        log.warning("%s is JPEG, which is lossy: pixels outside the mask change a little; .png keeps them.", target)
    try:
        return encode(pixels, kind, like)
    except Exception as error:
        raise OutputFailed(f"{target} could not be encoded as {kind} ({_line(error)}); try a .png name.") from error


def encode(pixels: np.ndarray, kind: str, like: Picture | None = None, quality: int = 95) -> bytes:
    """(H, W, 3 or 4) uint8 as a file's bytes. `kind` is PNG or WEBP, both exact, or JPEG at `quality`, without alpha.

    Colour profile and EXIF come from `like`.
    """
    icc, exif = (None, None) if like is None else (like.icc, like.exif)
    if kind == "PNG":
        return png.encode(pixels, icc, exif)
    options: dict[str, object] = {k: v for k, v in (("icc_profile", icc), ("exif", exif)) if v is not None}
    if kind == "JPEG":
        pixels = pixels[..., :3]
        options |= {"quality": quality, "subsampling": 0}
    else:
        # exact keeps the colour under transparent pixels; this effort is six times quicker for 5 % more bytes.
        options |= {"lossless": True, "exact": True, "method": 1, "quality": 20}
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, kind, **options)
    return buffer.getvalue()


def _line(error: BaseException) -> str:
    """An error's text on one line; an OSError's without the path, which the caller names."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
