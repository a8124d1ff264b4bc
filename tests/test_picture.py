"""Pictures and masks in and out of files: what holds for all of them, and every bad input."""

import contextlib
import io
import logging
import os
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from retouch import picture
from retouch.edit import ImageTooLarge, InvalidImage, InvalidMask, InvalidOption, OutputFailed


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


# read


@pytest.mark.parametrize("suffix", [".png", ".webp", ".PNG"])
@pytest.mark.parametrize("channels", [3, 4])
def test_exact_formats_keep_every_pixel(tmp_path, suffix, channels):
    pixels = noise(37, 53, channels)
    if channels == 4:
        pixels[:20, :, 3] = 0  # the colour under transparency must survive too
    picture.write(tmp_path / f"a{suffix}", pixels)
    assert np.array_equal(picture.read(tmp_path / f"a{suffix}").pixels, pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path, orientation):
    image = Image.fromarray(noise(6, 9))
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a camera"
    data = encoded(image, exif=exif.tobytes())
    got = picture.read(data)
    assert np.array_equal(got.pixels, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))
    picture.write(tmp_path / "a.png", got.pixels, like=got)
    again = picture.read(tmp_path / "a.png")
    assert np.array_equal(again.pixels, got.pixels)
    written = Image.open(tmp_path / "a.png").getexif()
    assert 0x0112 not in written
    assert written[0x010F] == "a camera"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_cost_the_picture():
    data = encoded(Image.fromarray(noise(8, 8)), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
    assert picture.read(data).size == (8, 8)


def test_colour_profile_is_kept_only_where_it_still_fits(tmp_path):
    profile = bytes(16) + b"RGB " + bytes(108)
    photo = picture.read(encoded(Image.fromarray(noise(8, 8)), icc_profile=profile))
    picture.write(tmp_path / "a.webp", photo.pixels, like=photo)
    assert picture.read(tmp_path / "a.webp").icc == profile
    gray = encoded(Image.new("L", (8, 8)), icc_profile=bytes(16) + b"GRAY" + bytes(108))
    assert picture.read(gray).icc is None


@pytest.mark.parametrize(
    "form",
    "1:PNG L:PNG LA:PNG P:PNG P:GIF CMYK:JPEG CMYK:TIFF LAB:TIFF YCbCr:JPEG I;16:PNG I;16B:TIFF I:TIFF F:TIFF "
    "RGBA:TIFF RGBX:TIFF RGB:BMP RGB:AVIF L:PPM".split(),
)
def test_every_colour_mode_becomes_8_bit_rgb(form):
    mode, kind = form.split(":")
    pixels = picture.read(encoded(Image.new(mode, (5, 4)), kind)).pixels
    assert pixels.shape == (4, 5, 4 if mode in ("LA", "RGBA") else 3)
    assert pixels.dtype == np.uint8


def test_sixteen_bit_gray_is_scaled_not_cut(caplog):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    with caplog.at_level(logging.WARNING):
        pixels = picture.read(encoded(Image.fromarray(values))).pixels
    assert pixels[0, :, 0].tolist() == [0, 1, 128, 255]
    assert "8 bits" in caplog.text


def test_palette_transparency_becomes_alpha():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    pixels = picture.read(encoded(image, transparency=1)).pixels
    assert pixels[0, 0].tolist() == [10, 20, 30, 255]
    assert pixels[0, 1].tolist() == [40, 50, 60, 0]


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert picture.read(data).pixels[0, 0].tolist()[:3] == [255, 0, 0]


def test_reads_open_files():
    assert picture.read(io.BytesIO(encoded(Image.new("RGB", (3, 2))))).size == (3, 2)


def test_missing_folder_empty_and_text_are_refused(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    for name, words in (
        ("none.png", "no file"),
        (".", "folder"),
        ("empty.png", "empty"),
        ("text.png", "not a picture"),
    ):
        with pytest.raises(InvalidImage, match=words):
            picture.read(tmp_path / name)
    with pytest.raises(InvalidImage, match="cannot be read"):
        picture.read("a\0b.png")


def test_unreadable_file_is_refused(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(InvalidImage, match="permissions"):
        picture.read(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_refused(kind):
    data = encoded(Image.fromarray(noise(64, 64)), kind)
    for share in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(InvalidImage):
            picture.read(data[: int(len(data) * share)])


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"II*\0", b"BM"]),
)
def test_hostile_bytes_are_refused_or_read(body, magic):
    with contextlib.suppress(InvalidImage):
        picture.read(magic + body)


@given(st.data())
def test_damaged_pictures_are_refused_or_read(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF"]))
    raw = bytearray(encoded(Image.fromarray(noise(16, 16)), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidImage):
        assert picture.read(bytes(raw), max_pixels=10**6).pixels.dtype == np.uint8


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [13_400, 60_000])
def test_bombs_are_refused_before_decoding(side):
    start = time.perf_counter()
    with pytest.raises(ImageTooLarge, match="scale it down"):
        picture.read(png_header(side, side))
    assert time.perf_counter() - start < 1
    with pytest.raises(ImageTooLarge):
        picture.read(encoded(Image.new("RGB", (20, 20))), max_pixels=399)


# masks


def test_mask_by_alpha_and_by_white():
    alpha = np.full((4, 6, 4), 255, np.uint8)
    alpha[1, 2, 3] = 0
    data = encoded(Image.fromarray(alpha))
    for mode in ("auto", "alpha"):
        assert np.argwhere(picture.read_mask(data, (6, 4), mode)).tolist() == [[1, 2]]
    assert picture.read_mask(data, (6, 4), "white").all()
    white = np.zeros((4, 6), np.uint8)
    white[2, 3], white[0, 0] = 128, 127
    for mode in ("auto", "white"):
        assert np.argwhere(picture.read_mask(encoded(Image.fromarray(white)), (6, 4), mode)).tolist() == [[2, 3]]


def test_an_opaque_alpha_channel_means_white():
    pixels = np.full((2, 2, 4), 255, np.uint8)
    pixels[0, 0, :3] = 0
    assert picture.read_mask(encoded(Image.fromarray(pixels)), (2, 2)).tolist() == [[False, True], [True, True]]


def test_bad_masks_are_refused():
    black = encoded(Image.new("L", (6, 4)))
    with pytest.raises(InvalidMask, match="6 x 4 but the picture is 4 x 6"):
        picture.read_mask(black, (4, 6))
    with pytest.raises(InvalidMask, match="empty"):
        picture.read_mask(black, (6, 4))
    with pytest.raises(InvalidMask, match="no alpha channel"):
        picture.read_mask(black, (6, 4), "alpha")
    with pytest.raises(InvalidMask, match="empty"):
        picture.read_mask(encoded(Image.new("RGBA", (6, 4), (0, 0, 0, 90))), (6, 4))
    with pytest.raises(InvalidOption, match="auto, alpha, white"):
        picture.read_mask(black, (6, 4), "black")


@pytest.mark.parametrize(
    "box", [(0, 0, 0, 0), (1, 1, 0, 2), (1, 1, 2, -1), (-1, 0, 2, 2), (5, 0, 2, 1), (0, 3, 1, 2), (9, 9, 1, 1)]
)
def test_bad_boxes_are_refused(box):
    with pytest.raises(InvalidMask, match=r"no area|6 x 4"):
        picture.box_mask(box, (6, 4))


def test_boxes_unite():
    mask = picture.union([picture.box_mask((0, 0, 2, 1), (6, 4)), picture.box_mask((5, 3, 1, 1), (6, 4))])
    assert np.argwhere(mask).tolist() == [[0, 0], [0, 1], [3, 5]]
    with pytest.raises(InvalidMask, match="at least one"):
        picture.union([])
    with pytest.raises(InvalidMask, match="different sizes"):
        picture.union([np.ones((2, 3), bool), np.ones((3, 2), bool)])


# write


def test_output_names_are_checked(tmp_path):
    pixels = noise(4, 4)
    for name in ("a", "a.gif", "a.png.txt"):
        with pytest.raises(InvalidOption, match=r"\.png, \.webp"):
            picture.check_output(tmp_path / name, pixels)
    with pytest.raises(InvalidOption, match=r"a\.png instead"):
        picture.check_output(tmp_path / "a.jpg", noise(4, 4, 4))
    with pytest.raises(InvalidOption, match="16,383"):
        picture.check_output(tmp_path / "a.webp", np.zeros((1, 16_384, 3), np.uint8))
    with pytest.raises(OutputFailed, match="no folder"):
        picture.check_output(tmp_path / "none" / "a.png", pixels)
    (tmp_path / "b.png").mkdir()
    with pytest.raises(OutputFailed, match="is a folder"):
        picture.check_output(tmp_path / "b.png", pixels)
    picture.check_output(tmp_path / "a.jpg", np.dstack([pixels, np.full((4, 4), 255, np.uint8)]))


def test_jpeg_says_that_it_is_lossy(tmp_path, caplog):
    picture.write(tmp_path / "a.jpg", noise(16, 16))
    assert "lossy" in caplog.text
    assert picture.read(tmp_path / "a.jpg").size == (16, 16)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputFailed, match="No space left"):
        picture.write(tmp_path / "a.png", noise(4, 4))
    assert list(tmp_path.iterdir()) == []


def test_of_several_outputs_all_or_none_appear(tmp_path):
    (tmp_path / "b.png").mkdir()
    with pytest.raises(OutputFailed):
        picture.write_all([(tmp_path / "a.png", noise(4, 4)), (tmp_path / "b.png", noise(4, 4))])
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    old = noise(4, 4)
    picture.write(tmp_path / "a.png", old)
    monkeypatch.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    with pytest.raises(OutputFailed, match="Read-only"):
        picture.write(tmp_path / "a.png", noise(4, 4, seed=1))
    assert np.array_equal(picture.read(tmp_path / "a.png").pixels, old)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_later_output_leaves_the_older_pictures(tmp_path):
    old = noise(4, 4)
    picture.write(tmp_path / "a.png", old)
    (tmp_path / "c.png").mkdir()
    outputs = [(tmp_path / name, noise(4, 4, seed=1)) for name in ("a.png", "b.png", "c.png")]
    with pytest.raises(OutputFailed, match=r"c\.png could not be written"):
        picture.write_all(outputs)
    assert np.array_equal(picture.read(tmp_path / "a.png").pixels, old)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "c.png"]
    picture.write_all(outputs[:2])
    assert np.array_equal(picture.read(tmp_path / "a.png").pixels, outputs[0][1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]


def test_an_interrupted_write_leaves_the_older_pictures(tmp_path, monkeypatch):
    old, replace, calls = noise(4, 4), os.replace, []
    for name in ("a.png", "b.png"):
        picture.write(tmp_path / name, old)

    def interrupted(a, b):
        calls.append(b)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(a, b)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        picture.write_all([(tmp_path / name, noise(4, 4, seed=1)) for name in ("a.png", "b.png")])
    assert all(np.array_equal(picture.read(tmp_path / name).pixels, old) for name in ("a.png", "b.png"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_an_output_whose_name_is_too_long_is_refused(tmp_path):
    with pytest.raises(OutputFailed, match="too long"):
        picture.check_output(tmp_path / f"{'x' * 300}.png", noise(4, 4))
    with pytest.raises(OutputFailed, match="too long"):
        picture.check_output(tmp_path / ("x" * 300) / "a.png", noise(4, 4))
