"""The PNG writer against Pillow's reader."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from retouch import png


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([3, 4]), st.integers(0, 9))
def test_pillow_reads_the_very_pixels(height: int, width: int, channels: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    image = Image.open(io.BytesIO(png.encode(pixels)))
    image.verify()
    assert (np.array(Image.open(io.BytesIO(png.encode(pixels)))) == pixels).all()


def test_profile_and_exif_are_read_back() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010E] = "a meadow"
    pixels = np.zeros((4, 5, 3), np.uint8)
    image = Image.open(io.BytesIO(png.encode(pixels, profile, exif.tobytes())))
    assert image.info["icc_profile"] == profile
    assert image.getexif()[0x010E] == "a meadow"


def test_rows_that_are_not_contiguous() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)[::2, ::-3]
    assert (np.array(Image.open(io.BytesIO(png.encode(pixels)))) == pixels).all()


def test_a_damaged_file_is_noticed() -> None:
    data = bytearray(png.encode(np.full((64, 64, 3), 7, np.uint8)))
    data[60] ^= 0xFF
    with pytest.raises((OSError, SyntaxError)):
        Image.open(io.BytesIO(bytes(data))).load()
