"""PNG files written fast: one filter for all rows, a deflate made for speed, and of an edit only the rows that it changed.

A photo of 512 px takes an eighth of the time that Pillow's writer takes at level 2, for 3 % more bytes; an edit's answer is a
PNG by default, so this is on every request's path. Rows are coded in bands: the filter looks at no other row, each band's
deflate begins anew and ends on a whole byte (a full flush), and the checksum of the whole follows from theirs. So a picture
that differs from another in a few rows takes the other bands from it. Format: https://www.w3.org/TR/png-3/.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np
from isal import isal_zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {3: 2, 4: 6}
SUB = 1
"""The filter that keeps of each byte its difference to the pixel on its left."""

BAND = 1 << 16
"""Bytes of rows in a band, about: twice what deflate looks back on, so that its starting anew costs less than 0.1 %."""

STREAM, LAST_BLOCK = b"\x78\x01", b"\x03\x00"
"""What a zlib stream begins with, and a last block of deflate with nothing in it."""

ADLER = 65_521


@dataclass(frozen=True, slots=True)
class _Band:
    """Rows as a chunk of the file. `length` bytes, with the rows' filters, have the checksum `adler` (Adler-32)."""

    chunk: bytes
    length: int
    adler: int


class Rows:
    """A picture's rows, each band coded when a file first needs it. `pixels` (H, W, 3 or 4) uint8 must not change any more.

    From any thread; two that need the same band at once both code it.
    """

    def __init__(self, pixels: np.ndarray) -> None:
        height, width, channels = pixels.shape
        self.pixels, self.band = pixels, max(1, BAND // (1 + width * channels))
        self._bands: list[_Band | None] = [None] * -(-height // self.band)

    def file(
        self, icc: bytes | None = None, exif: bytes | None = None, part: np.ndarray | None = None, at: tuple[int, int] = (0, 0)
    ) -> bytes:
        """The picture's file, with a colour profile and EXIF (with or without its `Exif` prefix).

        With `part` (h, w, the picture's channels) in its place: `at` (x, y) is its upper left corner.
        """
        height, width, channels = self.pixels.shape
        chunks = [SIGNATURE, _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, COLOUR_TYPES[channels], 0, 0, 0))]
        if icc is not None:
            chunks.append(_chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc)))
        if exif is not None:
            chunks.append(_chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")))
        chunks.append(_chunk(b"IDAT", STREAM))
        adler = 1
        for index in range(len(self._bands)):
            band = self._own(index) if part is None else self._with(index, part, at)
            chunks.append(band.chunk)
            adler = _joined(adler, band)
        chunks.append(_chunk(b"IDAT", LAST_BLOCK + struct.pack(">I", adler)))
        chunks.append(_chunk(b"IEND", b""))
        return b"".join(chunks)

    def _own(self, index: int) -> _Band:
        band = self._bands[index]
        if band is None:
            band = self._bands[index] = _coded(self.pixels[index * self.band : (index + 1) * self.band])
        return band

    def _with(self, index: int, part: np.ndarray, at: tuple[int, int]) -> _Band:
        """The band with what lies in it of `part`."""
        (x, y), (height, width) = at, part.shape[:2]
        top = index * self.band
        first, last = max(top, y), min(top + self.band, y + height)
        if first >= last:
            return self._own(index)
        rows = self.pixels[top : top + self.band].copy()
        rows[first - top : last - top, x : x + width] = part[first - y : last - y]
        return _coded(rows)


def encode(pixels: np.ndarray, icc: bytes | None = None, exif: bytes | None = None) -> bytes:
    """(H, W, 3 or 4) uint8 as a file's bytes, with a colour profile and EXIF."""
    return Rows(pixels).file(icc, exif)


def _coded(rows: np.ndarray) -> _Band:
    filtered, coder = _filtered(rows), isal_zlib.compressobj(1, isal_zlib.DEFLATED, -isal_zlib.MAX_WBITS)
    data = coder.compress(filtered) + coder.flush(isal_zlib.Z_FULL_FLUSH)
    return _Band(_chunk(b"IDAT", data), filtered.nbytes, isal_zlib.adler32(filtered))


def _joined(adler: int, band: _Band) -> int:
    """The checksum of what `adler` is that of, followed by the band: RFC 1950's two sums, each of which is linear in the bytes.

    The idea is zlib's `adler32_combine`.
    """
    low, high = adler & 0xFFFF, adler >> 16
    high = (high + (band.adler >> 16) + band.length * (low - 1)) % ADLER
    return high << 16 | (low + (band.adler & 0xFFFF) - 1) % ADLER


def _filtered(pixels: np.ndarray) -> np.ndarray:
    """(H, 1 + W * channels): each row behind the number of its filter."""
    height, _, channels = pixels.shape
    rows = pixels.reshape(height, -1)
    filtered = np.empty((height, rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = SUB
    filtered[:, 1 : 1 + channels] = rows[:, :channels]
    np.subtract(rows[:, channels:], rows[:, :-channels], out=filtered[:, 1 + channels :])
    return filtered


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = isal_zlib.crc32(content, isal_zlib.crc32(kind))
    return b"".join((struct.pack(">I", len(content)), kind, content, struct.pack(">I", checksum)))
