"""Pictures of every mode that files have, as the few that are worked on: upright, of 8 bits, in colour or as a mask."""

from __future__ import annotations

import numpy as np
from PIL import Image

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


def turned(image: Image.Image) -> tuple[Image.Image, bytes | None]:
    """The image turned as its EXIF says, and that EXIF without the turn. Broken EXIF is dropped, not refused."""
    try:
        exif = image.getexif()
        turn = UPRIGHT.get(exif.pop(ORIENTATION, 1))
        # A TIFF's own tags (strips, compression) also count as EXIF; they say nothing about another file.
        kept = exif.tobytes() if len(exif) and "exif" in image.info else None
    except Exception:
        return image, None
    return (image if turn is None else image.transpose(turn)), kept


def eight_bit(image: Image.Image) -> np.ndarray:
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


def mask_form(image: Image.Image) -> Image.Image:
    """RGBA where it has transparency, else L: what a mask is read of, without three bytes for each of a gray one's."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(eight_bit(image)).convert("L")
    if image.has_transparency_data:
        return image if image.mode == "RGBA" else image.convert("RGBA")
    return image if image.mode == "L" else image.convert("L" if image.mode == "1" else "RGB").convert("L")
