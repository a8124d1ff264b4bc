"""The demo's contact sheet: a row an edit, from the document over the plain pipelines to Retouch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from retouch.demo.session import PATHS, Result, about, totals

MARGIN, GAP, ROW_GAP = 48, 14, 30
TILE = 288
LABEL = 172
CAPTION = 28
HEADER = 272
COLUMNS = ("document", "mask", "diffusers inpaint", "diffusers KV", "Retouch")
WIDTH = 2 * MARGIN + LABEL + len(COLUMNS) * (TILE + GAP)

INK, GREY, FAINT, PLAIN, OURS, MARK = (
    "#1b1f24",
    "#6a737d",
    "#e4e7eb",
    "#b4bcc6",
    "#0b7a5c",
    np.array([232, 30, 120], np.float32),
)


def draw(results: Sequence[Result], setting: dict[str, Any]) -> np.ndarray:
    """(H, W, 3) uint8."""
    tops, y = [], HEADER
    for result in results:
        tops.append(y)
        y += _tile_height(result) + CAPTION + ROW_GAP
    sheet = Image.new("RGB", (WIDTH, y - ROW_GAP + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    _header(pen, results, setting)
    for index, (top, result) in enumerate(zip(tops, results, strict=True)):
        if index:
            _rule(pen, top - ROW_GAP // 2, FAINT)
        _row(sheet, pen, top, index + 1, result)
    return np.asarray(sheet)


def _header(pen: ImageDraw.ImageDraw, results: Sequence[Result], setting: dict[str, Any]) -> None:
    sums, speedup = totals(results)
    height, width = results[0].mask.shape
    count = f"{len(results)} edits" if len(results) > 1 else "one edit"
    _text(pen, (MARGIN, MARGIN - 10), f"A session of {count}, {speedup:.1f} times as fast", 34, INK)
    note = f"{about(setting)}; photos of {width} x {height} px; same weights, seeds and steps for all. Seconds of the session:"
    _text(pen, (MARGIN, MARGIN + 36), note, 16, GREY)
    # One bar a path, to one scale.
    left, longest = _left(0), max(sums.values())
    room = WIDTH - MARGIN - left - 90
    for line, path in enumerate(PATHS):
        y, ours = MARGIN + 74 + line * 30, path == "Retouch"
        name = path if ours else f"diffusers {path}"
        _text(pen, (MARGIN, y + 10), name, 17, OURS if ours else INK, "lm")
        end = left + max(3, round(room * sums[path] / longest))
        pen.rectangle((left, y, end, y + 19), fill=OURS if ours else PLAIN)
        _text(pen, (end + 10, y + 10), f"{sums[path]:.2f} s", 17, OURS if ours else INK, "lm")
    for column, name in enumerate(COLUMNS):
        _text(pen, (_left(column), HEADER - 34), name, 18, OURS if name == "Retouch" else INK)
    _rule(pen, HEADER - 8, INK)


def _row(sheet: Image.Image, pen: ImageDraw.ImageDraw, top: int, number: int, result: Result) -> None:
    turn, usage, seconds = result.turn, result.edited.usage, result.seconds
    _text(pen, (MARGIN, top - 2), f"{number}", 30, GREY)
    y = top + 40
    for line in _wrapped(pen, turn.prompt, 19, LABEL - 16):
        _text(pen, (MARGIN, y), line, 19, INK)
        y += 24
    _text(pen, (MARGIN, y + 6), f"{turn.kind}, seed {turn.seed}", 15, GREY)

    tiles = (result.edit.image, _marked(result.edit.image, result.mask), *(result.images[path] for path in PATHS))
    size = (TILE, _tile_height(result))
    share = usage.tokens_computed / usage.tokens_whole
    captions = (
        (f"the result of {result.source}" if result.source else "the photo") + (", cached" if result.cached else ", new"),
        f"{result.mask.mean():.1%} of the picture",
        f"{seconds['inpaint']:.2f} s",
        f"{seconds['KV']:.2f} s",
        f"{seconds['Retouch']:.2f} s, {result.speedup:.1f}x, {share:.0%} of the tokens",
    )
    for column, (pixels, caption) in enumerate(zip(tiles, captions, strict=True)):
        tile = Image.fromarray(pixels[..., :3]).resize(size, Image.Resampling.LANCZOS)
        sheet.paste(tile, (_left(column), top))
        colour = OURS if COLUMNS[column] == "Retouch" else INK if column > 1 else GREY
        _text(pen, (_left(column), top + size[1] + 7), caption, 16, colour)


def _marked(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture with the mask tinted and outlined, the rest paler."""
    shown = pixels[..., :3].astype(np.float32)
    shown = np.where(mask[..., None], (shown + MARK) / 2, shown * 0.6 + 255 * 0.4)
    wide = np.pad(mask, 2)
    height, width = mask.shape
    inner = np.logical_and.reduce([wide[y : y + height, x : x + width] for y in (0, 2, 4) for x in (0, 2, 4)])
    shown[mask & ~inner] = MARK
    return shown.round().astype(np.uint8)


def _tile_height(result: Result) -> int:
    height, width = result.mask.shape
    return int(TILE * height / width + 0.5)


def _left(column: int) -> int:
    return MARGIN + LABEL + column * (TILE + GAP) + GAP


def _rule(pen: ImageDraw.ImageDraw, y: int, colour: str) -> None:
    pen.line((MARGIN, y, WIDTH - MARGIN, y), fill=colour, width=1)


def _text(pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, colour: str, anchor: str = "la") -> None:
    font = ImageFont.load_default(size)
    # Without FreeType, Pillow has one bitmap font, which knows no anchors.
    pen.text(at, text, colour, font, anchor=anchor if isinstance(font, ImageFont.FreeTypeFont) else None)


def _wrapped(pen: ImageDraw.ImageDraw, text: str, size: int, width: int) -> list[str]:
    """Lines no wider than `width` pixels, broken between words."""
    font, lines = ImageFont.load_default(size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
