"""The contact sheet of the worst edits: document, mask, truth, plain and fast, and where they differ from the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from retouch.measure.cases import Case
from retouch.measure.gate import Key, Verdict
from retouch.measure.zones import grown

TILE, GAP, MARGIN, LABEL = 192, 10, 24, 236
INK, GREY, MARK = "#1b1f24", "#6a737d", np.array([232, 30, 120], np.float32)
CLEARER = 4
"""Times which an error is drawn larger than it is."""

PATHS = ("plain", "fast")


def sheet(
    cases: Sequence[Case], plain: Mapping[Key, np.ndarray], fast: Mapping[Key, np.ndarray], verdict: Verdict, count: int = 12,
    names: tuple[str, str] = PATHS, losses: Mapping[Key, Mapping[str, float]] | None = None,
) -> np.ndarray:  # fmt: skip
    """(H, W, 3) uint8: the `count` worst pairs of a verdict, a row each. `names` are those of the two paths, `losses` what each
    pair loses, to stand beside it (`gate.pair_losses`).
    """
    by_name = {case.name: case for case in cases}
    shown = [key for key in verdict.worst if key in plain and key in fast][:count]
    columns = ("document", "mask", "truth", *names, *(f"{name}, error x{CLEARER}" for name in names))
    width = 2 * MARGIN + LABEL + len(columns) * (TILE + GAP) - GAP
    heights = [_height(by_name[key[0]]) for key in shown]
    top = MARGIN + 66
    page = Image.new("RGB", (width, top + sum(heights) + GAP * len(shown) + MARGIN), "white")
    pen = ImageDraw.Draw(page)
    _text(pen, (MARGIN, MARGIN - 6), f"{verdict.verdict}: the {len(shown)} worst of {len(verdict.worst)} edits", 22, INK)
    for column, title in enumerate(columns):
        _text(pen, (_left(column), top - 22), title, 14, GREY)
    for key, height in zip(shown, heights, strict=True):
        case = by_name[key[0]]
        tiles = [case.edit.image[..., :3], _marked(case), case.truth, plain[key], fast[key]]
        tiles += [_error(picture, case.truth) for picture in tiles[3:5]]
        for column, pixels in enumerate(tiles):
            scaled = Image.fromarray(pixels).resize((TILE, height), Image.Resampling.NEAREST)
            page.paste(scaled, (_left(column), top))
        lines = [case.name, f"seed {key[1]}", *_wrapped(pen, f"“{case.edit.prompt}”")]
        for at, line in enumerate([*lines, *_lost((losses or {}).get(key, {}))]):
            _text(pen, (MARGIN, top + 18 * at), line, 14, INK if not at else GREY)
        top += height + GAP
    return np.asarray(page)


def _lost(losses: Mapping[str, float]) -> list[str]:
    return [f"{name.removeprefix('inside ')} loses {lost:+.2f}" for name, lost in losses.items()]


def _height(case: Case) -> int:
    height, width = case.mask.shape
    return max(96, round(TILE * height / width))


def _left(column: int) -> int:
    return MARGIN + LABEL + column * (TILE + GAP)


def _marked(case: Case) -> np.ndarray:
    """The document paler, the mask tinted and outlined."""
    pixels = case.edit.image[..., :3].astype(np.float32)
    shown = np.where(case.mask[..., None], (pixels + MARK) / 2, pixels * 0.6 + 255 * 0.4)
    shown[case.mask & grown(~case.mask, 1)] = MARK
    return shown.round().astype(np.uint8)


def _error(pixels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Grey where there is none."""
    return np.clip(128 + CLEARER / 2 * (pixels.astype(np.float32) - truth), 0, 255).round().astype(np.uint8)


def _text(pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, colour: str) -> None:
    pen.text(at, text, colour, ImageFont.load_default(size))


def _wrapped(pen: ImageDraw.ImageDraw, text: str) -> list[str]:
    """Lines that go into the label's column."""
    font, lines = ImageFont.load_default(14), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font) > LABEL - GAP and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
