"""The PNG writer against Pillow's reader, and against the format's own rules."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from retouch import png


def pillows(data: bytes) -> np.ndarray:
    Image.open(io.BytesIO(data)).verify()
    return np.array(Image.open(io.BytesIO(data)))


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Each with its kind, once its length and checksum are found right and nothing stands behind the last."""
    assert data.startswith(png.SIGNATURE)
    at, found = len(png.SIGNATURE), []
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert len(content) == length
        assert struct.unpack_from(">I", data, at + 8 + length) == (zlib.crc32(kind + content),)
        found.append((kind, content))
        at += 12 + length
    return found


def strict(data: bytes) -> np.ndarray:
    """The pixels, read by the format's rules: order and checksums of the chunks, one whole zlib stream, only filter SUB."""
    parts = chunks(data)
    kinds = [kind for kind, _ in parts]
    first, count = kinds.index(b"IDAT"), kinds.count(b"IDAT")
    assert kinds[0] == b"IHDR"
    assert kinds[first:] == [b"IDAT"] * count + [b"IEND"]
    assert parts[-1][1] == b""
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", parts[0][1])
    assert (depth, rest) == (8, [0, 0, 0])
    channels = {2: 3, 6: 4}[colour]
    stream = zlib.decompressobj()  # looks at the checksum at the end
    rows = stream.decompress(b"".join(content for kind, content in parts if kind == b"IDAT"))
    assert stream.eof
    assert stream.unused_data == b""
    lines = np.frombuffer(rows, np.uint8).reshape(height, 1 + width * channels)
    assert (lines[:, 0] == png.SUB).all()
    return np.cumsum(lines[:, 1:].reshape(height, width, channels), axis=1, dtype=np.uint8)


def noise(height: int, width: int, channels: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([3, 4]), st.integers(0, 9), st.integers(1, 2000))
def test_readers_find_the_very_pixels(height: int, width: int, channels: int, seed: int, band: int) -> None:
    pixels = noise(height, width, channels, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(png, "BAND", band)
        data = png.encode(pixels)
    assert (pillows(data) == pixels).all()
    assert (strict(data) == pixels).all()


@given(st.data(), st.integers(1, 40), st.integers(1, 40), st.sampled_from([3, 4]), st.integers(1, 2000))
def test_a_part_in_its_place(draw: st.DataObject, height: int, width: int, channels: int, band: int) -> None:
    """The same file as of the whole picture, for one part after the other, whatever bands the earlier ones have left."""
    pixels = noise(height, width, channels, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(png, "BAND", band)
        rows = png.Rows(pixels)
        for seed in range(1, 4):
            x, y = draw.draw(st.integers(0, width - 1)), draw.draw(st.integers(0, height - 1))
            part = noise(draw.draw(st.integers(1, height - y)), draw.draw(st.integers(1, width - x)), channels, seed)
            whole = pixels.copy()
            whole[y : y + part.shape[0], x : x + part.shape[1]] = part
            data = rows.file(part=part, at=(x, y))
            assert data == png.encode(whole)
            assert (strict(data) == whole).all()
        assert rows.file() == png.encode(pixels)


def test_only_what_was_changed_is_coded(monkeypatch: pytest.MonkeyPatch) -> None:
    coded: list[int] = []
    monkeypatch.setattr(png, "_coded", lambda rows, code=png._coded: coded.append(len(rows)) or code(rows))
    rows = png.Rows(noise(512, 512, 3, 0))
    part = noise(60, 60, 3, 1)
    rows.file(part=part, at=(100, 100))
    assert sum(coded) == 512
    coded.clear()
    rows.file(part=part, at=(90, 110))
    assert 60 <= sum(coded) < 60 + 2 * rows.band
    assert len(coded) * rows.band == sum(coded)


def test_sizes_and_checksums_of_large_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that go round their modulus many times; bands of one row and one band of all; hardly any bytes more for bands."""
    pixels = np.full((700, 900, 4), 255, np.uint8)
    pixels[::2] = noise(350, 900, 4, 3) // 8
    sizes = []
    for band in (1, png.BAND, 1 << 30):
        monkeypatch.setattr(png, "BAND", band)
        data = png.encode(pixels)
        assert (strict(data) == pixels).all()
        sizes.append(len(data))
    assert sizes[1] < 1.01 * sizes[2]


def test_profile_and_exif_are_read_back() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010E] = "a meadow"
    pixels = np.zeros((4, 5, 3), np.uint8)
    data = png.encode(pixels, profile, exif.tobytes())
    image = Image.open(io.BytesIO(data))
    assert image.info["icc_profile"] == profile
    assert image.getexif()[0x010E] == "a meadow"
    assert [kind for kind, _ in chunks(data)][:4] == [b"IHDR", b"iCCP", b"eXIf", b"IDAT"]
    assert (strict(data) == 0).all()


def test_rows_that_are_not_contiguous() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)[::2, ::-3]
    assert (pillows(png.encode(pixels)) == pixels).all()


def test_a_damaged_file_is_noticed() -> None:
    data = bytearray(png.encode(np.full((64, 64, 3), 7, np.uint8)))
    data[60] ^= 0xFF
    with pytest.raises((OSError, SyntaxError)):
        Image.open(io.BytesIO(bytes(data))).load()
