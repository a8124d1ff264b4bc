"""Pictures in and out of files, masks, the crop that a model works on, and the composite back into the original.

Sizes and boxes are (width, height) and (x0, y0, x1, y1) in document pixels, half open; arrays are (height, width, ...).
"""

from __future__ import annotations

import io
import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageFile

from retouch import png
from retouch.edit import ImageTooLarge, InvalidImage, InvalidMask, InvalidOption, OutputFailed

log = logging.getLogger(__name__)

Source = str | os.PathLike[str] | bytes | IO[bytes]
Size = tuple[int, int]
Box = tuple[int, int, int, int]

MAX_PIXELS = 178_000_000
"""Just under where Pillow refuses by itself; a 24 megapixel photo takes a seventh of it."""

READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MASK_MODES = ("auto", "alpha", "white")
WRITABLE = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
MAX_SIDE = {"PNG": 2**31 - 1, "WEBP": 16_383, "JPEG": 65_500}

ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A decoded picture: `pixels` (H, W, 3 or 4) uint8, upright. `exif` has no orientation, as the pixels carry it."""

    pixels: np.ndarray
    icc: bytes | None = None
    exif: bytes | None = None

    @property
    def size(self) -> Size:
        return self.pixels.shape[1], self.pixels.shape[0]


def read(source: Source, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode a picture from a path, bytes or an open file; of an animation, the first frame.

    Gray, palette, CMYK and 16-bit pictures become 8-bit RGB, or RGBA where they have transparency. The size is checked
    before anything is unfolded. Raises InvalidImage or ImageTooLarge.
    """
    data, name = _bytes(source)
    image = _opened(data, name, max_pixels)
    deep = image.mode.startswith(("I", "F")) or any(";16" in str(tile) for tile in image.tile)
    try:
        image.load()
        upright, exif = _upright(image)
        pixels = _eight_bit(upright)
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"{name} unfolds to too many pixels; scale it down.") from error
    except Exception as error:
        raise InvalidImage(f"{name} is damaged or cut off ({_line(error)}); give a whole file.") from error
    if deep:
        log.warning("%s has more than 8 bits a channel; it is read, edited and written with 8.", name)
    icc = image.info.get("icc_profile")
    return Picture(pixels, icc if isinstance(icc, bytes) and icc[16:20] == b"RGB " else None, exif)


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
        known = ", ".join(READABLE)
        raise InvalidImage(f"{name} is not a picture, or its start is damaged; give one of {known}.") from error
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


def _upright(image: Image.Image) -> tuple[Image.Image, bytes | None]:
    """The image turned as its EXIF says, and that EXIF without the turn. Broken EXIF is dropped, not refused."""
    try:
        exif = image.getexif()
        turn = UPRIGHT.get(exif.pop(ORIENTATION, 1))
        # A TIFF's own tags (strips, compression) also count as EXIF; they say nothing about another file.
        kept = exif.tobytes() if len(exif) and "exif" in image.info else None
    except Exception:
        return image, None
    return (image if turn is None else image.transpose(turn)), kept


def _eight_bit(image: Image.Image) -> np.ndarray:
    """(H, W, 3 or 4) uint8. Wide integers run to 65535 unless none is above 255, floats to 1 unless one is above it."""
    if image.mode.startswith(("I", "F")):
        values: np.ndarray = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0)
        high = float(values.max())
        if image.mode.startswith("I;16"):
            values = values / 257
        elif image.mode == "I" and high > 255:
            values = values * (255 / max(high, 65535.0))
        elif image.mode == "F" and high <= 1:
            values = values * 255
        gray = np.clip(np.rint(values), 0, 255).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return np.array(image if image.mode == mode else image.convert(mode))


def read_mask(source: Source, size: Size, mode: str = "auto") -> np.ndarray:
    """A mask picture as (H, W) bool, true = edit here. `size` is the document's (width, height).

    "alpha": edit where alpha is 0 (OpenAI's convention). "white": edit where the luma is 128 or more. "auto": alpha
    where the picture has any transparency, else white. Raises InvalidMask; InvalidImage where it is no picture at all.
    """
    if mode not in MASK_MODES:
        raise InvalidOption(f"mask mode is {mode!r}; give one of {', '.join(MASK_MODES)}.")
    name = "the mask" if not isinstance(source, str | os.PathLike) else f"the mask {os.fspath(source)}"
    picture = read(source)
    if picture.size != tuple(size):
        raise InvalidMask(
            f"{name} is {picture.size[0]} x {picture.size[1]} but the picture is {size[0]} x {size[1]}; "
            "give a mask of the picture's own size (after EXIF rotation)."
        )
    pixels = picture.pixels
    if mode == "alpha" and pixels.shape[2] == 3:
        raise InvalidMask(f"{name} has no alpha channel; save it with one, or use mask mode white.")
    if mode == "alpha" or (mode == "auto" and pixels.shape[2] == 4 and bool((pixels[..., 3] < 255).any())):
        mask: np.ndarray = pixels[..., 3] == 0
        mend = "make the part to edit fully transparent, or use mask mode white"
    else:
        mask = np.asarray(Image.fromarray(np.ascontiguousarray(pixels[..., :3])).convert("L")) >= 128
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
    if target.is_dir():
        raise OutputFailed(f"{target} is a folder; give a file name in it.")
    if not target.parent.is_dir():
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
    """Write several pictures so that all appear, or none. Every one is on the disk before the first takes its name."""
    staged: list[tuple[Path, Path]] = []
    placed: list[Path] = []
    try:
        for path, pixels in outputs:
            target = Path(path)
            data = _encode(target, pixels, like)
            temporary = target.parent / f".retouch-{secrets.token_hex(8)}.tmp"
            staged.append((temporary, target))
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for temporary, target in staged:
            os.replace(temporary, target)
            placed.append(target)
    except BaseException as error:
        for leftover in [temporary for temporary, _ in staged] + placed:
            leftover.unlink(missing_ok=True)
        if isinstance(error, OSError):
            text = f"{target} could not be written ({_line(error)}); free space, or write elsewhere."
            raise OutputFailed(text) from error
        raise


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
    assert 0 <= feather < 255, feather
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


def _line(error: BaseException) -> str:
    """An error's text on one line; an OSError's without the path, which the caller names."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
