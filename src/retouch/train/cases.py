"""Edits with known answers that no training has seen: what `retouch train judge` asks a checkpoint to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from retouch.boxes import bounds
from retouch.edit import Edit
from retouch.train.concepts import CODEPOINTS, COLOURABLE, HELD_OUT, HUES, SEEN, Sticker, caption
from retouch.train.data import Source, mask_around

REMOVALS = ("remove on photos", "remove on flat")
KINDS = (*REMOVALS, "insert", "replace", "recolour")
"""Removals take away stickers of held-out concepts, the others ask for seen ones; no scene was trained on."""

SIZES = ((128, 128), (128, 128), (256, 256), (128, 192), (128, 128), (192, 128), (256, 256), (192, 192))
"""(height, width) of the scenes, in turn: as trained, and one between."""

VIVID = 90
"""Saturation and value, of 255, above which a pixel has a hue worth naming."""


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One edit and its answer: `truth` (H, W, 3) uint8. `cover` (H, W) bool is where the stickers before and after lie."""

    edit: Edit
    truth: np.ndarray
    before: Sticker | None
    after: Sticker | None
    cover: np.ndarray


def source_of(data: Path, photos: list[np.ndarray]) -> Source:
    """All stickers, held-out ones too, over the held-out photos (H, W, 3) uint8."""
    return Source(data, tuple(CODEPOINTS), photos)


def cases(source: Source, kind: str, n: int, seed: int = 0, sizes: Sequence[tuple[int, int]] = SIZES) -> list[Case]:
    """`n` cases of one of KINDS. Case i depends on (seed, kind, i) and `sizes` alone; concepts come in turn, so that each has
    its share.
    """
    start = 1000 * KINDS.index(kind)
    order = np.random.default_rng([seed, start]).permutation(len(_concepts(kind)))
    made = []
    for index in range(n):
        rng = np.random.default_rng([seed, start, index])
        concept = _concepts(kind)[order[index % len(order)]]
        before, after, prompt = _ask(source, kind, concept, rng)
        photo = float((index + index // len(order)) % 2)  # a concept that comes again comes on the other ground
        share = {"remove on photos": 1.0, "remove on flat": 0.0}.get(kind, photo)
        size = sizes[(index // 2) % len(sizes)]
        made.append(_build(source, before, after, prompt, size, share, rng, boxed=kind == "insert"))
    return made


def _concepts(kind: str) -> list[str]:
    if kind.startswith("remove"):
        return sorted(HELD_OUT)
    return sorted(COLOURABLE - HELD_OUT) if kind == "recolour" else list(SEEN)


def _ask(source: Source, kind: str, concept: str, rng: np.random.Generator) -> tuple[Sticker | None, Sticker | None, str]:
    """What is there before and after, and the prompt."""
    plain = Sticker(concept)
    if kind.startswith("remove"):
        return plain, None, "remove the object"
    if kind == "insert":
        return None, plain, plain.name
    if kind == "replace":
        others = [name for name in SEEN if name != concept]
        old = Sticker(others[rng.integers(len(others))])
        return old, plain, caption(old, plain, rng)
    sprite = source.sprite(plain)
    own = main_hue(sprite[..., :3], sprite[..., 3] > 128)
    colours = [colour for colour in HUES if colour != own]
    asked = Sticker(concept, colours[rng.integers(len(colours))])
    return plain, asked, caption(plain, asked, rng)


def _build(
    source: Source, before: Sticker | None, after: Sticker | None, prompt: str, size: tuple[int, int], share: float,
    rng: np.random.Generator, boxed: bool,
) -> Case:  # fmt: skip
    """`share` 1 for a photo as ground, 0 for a flat or graded one; `boxed` fills the mask up to its box."""
    height, width = size
    ground = source.background(height, width, rng, share)
    x, y, side = source.place(height, width, rng)
    turn = int(rng.integers(2**31))  # before and after lie at one angle, so that a recoloured sticker has not moved
    states = [
        ground if sticker is None else source.paste(ground, sticker, x, y, side, np.random.default_rng(turn))
        for sticker in (before, after)
    ]
    cover = np.logical_or.reduce([(state != ground).any(2) for state in states])
    mask = mask_around(cover, rng)
    if boxed:
        x0, y0, x1, y1 = bounds(mask)
        mask[y0:y1, x0:x1] = True
    return Case(Edit(states[0], prompt, mask, seed=int(rng.integers(2**31))), states[1], before, after, cover)


def hue_shares(picture: np.ndarray, where: np.ndarray) -> dict[str, float]:
    """Of the vivid pixels of `picture` (H, W, 3) uint8 inside `where` (H, W) bool, the share nearest to each of HUES.

    All shares are 0 where nothing is vivid. Same names as `concepts.hue_name`, for many pixels at once.
    """
    hsv = np.asarray(Image.fromarray(picture).convert("HSV"))[where]
    hue = hsv[(hsv[:, 1] > VIVID) & (hsv[:, 2] > VIVID // 2), 0] / 255
    distance = np.abs((np.array(list(HUES.values())) - hue[:, None] + 0.5) % 1 - 0.5)
    counts = np.bincount(distance.argmin(1), minlength=len(HUES)) if len(hue) else np.zeros(len(HUES))
    return dict(zip(HUES, (counts / max(1, len(hue))).tolist(), strict=True))


def main_hue(picture: np.ndarray, where: np.ndarray) -> str:
    """The name most vivid pixels have; empty where nothing is vivid."""
    shares = hue_shares(picture, where)
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] > 0 else ""


def surround_mean(picture: np.ndarray, mask: np.ndarray, reach: int = 8) -> np.ndarray:
    """The cheapest removal: `picture` (H, W, 3) with the mask in the mean colour of the `reach` pixels around it."""
    grown = np.pad(mask, reach)
    for axis in (0, 1):
        grown = np.logical_or.reduce([np.roll(grown, shift, axis) for shift in range(-reach, reach + 1)])
    ring = grown[reach:-reach, reach:-reach] & ~mask
    filled = picture.copy()
    filled[mask] = picture[ring].mean(0).round().astype(np.uint8) if ring.any() else 128
    return filled
