"""Training pictures: stickers on photos, made lazily from a seed out of installable packages.

A `Scene` shows one place in several states (nothing there, one thing, another thing, the same in another colour), so that
every ordered pair of states is an edit with a known answer.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from retouch.edit import RetouchError
from retouch.train.concepts import CODEPOINTS, COLOURABLE, HUES, SEEN, Sticker, recolour

log = logging.getLogger(__name__)

EMOJI = "@lobehub/fluent-emoji-3d@1.1.0"
WALLPAPERS = ("plasma-workspace-wallpapers", "mate-backgrounds")
PHOTO_SIDE = 1280
SIDES = (40, 150)
"""Pixels of the smallest and the largest sticker."""


def fetch(folder: Path) -> None:
    """Bring the packages into `folder`: emoji by npm, wallpapers by apt. What is there already is not fetched again.

    Each is made under another name and renamed, so that what a kill has left is never taken for whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.glob("lobehub-fluent-emoji-3d-*.tgz")):
        _brought(["npm", "pack", "--silent", EMOJI], folder)
    for package in WALLPAPERS:
        if not any(folder.glob(f"{package}_*.deb")):
            _brought(["apt-get", "download", package], folder)
        if not (folder / package).is_dir():
            part = _empty(folder / f"{package}.part")
            _run(["dpkg-deb", "-x", next(folder.glob(f"{package}_*.deb")).name, part.name], folder)
            os.replace(part, folder / package)


def _brought(command: list[str], folder: Path) -> None:
    """The files that a command makes where it is run."""
    part = _empty(folder / "fetched.part")
    _run(command, part)
    for file in sorted(part.iterdir()):
        os.replace(file, folder / file.name)
    part.rmdir()


def _empty(folder: Path) -> Path:
    """A new folder in the place of what a kill has left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        raise RetouchError(
            f"training data: `{' '.join(command)}` failed in {folder}: {detail.strip()[-300:]}. "
            "Install npm and apt's tools, or put the package files there yourself."
        ) from error


@dataclass(frozen=True, slots=True)
class Scene:
    """`pictures` (S, H, W, 3) uint8: state 0 has nothing at the place, each other state one sticker. `mask` (H, W) bool."""

    pictures: np.ndarray
    stickers: tuple[Sticker | None, ...]
    mask: np.ndarray


class Source:
    """Sprites and backgrounds in memory, and the scenes made of them."""

    def __init__(self, folder: Path, concepts: tuple[str, ...] = SEEN, photos: list[np.ndarray] | None = None) -> None:
        fetch(folder)
        self.concepts = concepts
        self._archive = next(folder.glob("lobehub-fluent-emoji-3d-*.tgz"))
        self._sprites = self._load_sprites()
        self.photos = photos if photos is not None else load_photos(folder)

    def _load_sprites(self) -> dict[str, np.ndarray]:
        wanted = {f"package/assets/{CODEPOINTS[name]}.webp": name for name in self.concepts}
        sprites = {}
        with tarfile.open(self._archive) as archive:
            for member in archive:
                if member.name in wanted:
                    file = archive.extractfile(member)
                    assert file is not None
                    sprite = Image.open(io.BytesIO(file.read())).convert("RGBA")
                    box = sprite.getchannel("A").point(lambda a: 255 * (a > 32)).getbbox()
                    sprites[wanted[member.name]] = np.asarray(sprite.crop(box))
        missing = sorted(set(wanted.values()) - set(sprites))
        if missing:
            raise RetouchError(f"training data: {self._archive.name} has no picture of {', '.join(missing)}.")
        return sprites

    @lru_cache(maxsize=1024)  # noqa: B019  one Source lives as long as the run
    def sprite(self, sticker: Sticker) -> np.ndarray:
        """(h, w, 4) uint8, cropped to what is visible."""
        base = self._sprites[sticker.concept]
        return recolour(base, sticker.colour) if sticker.colour else base

    def background(self, height: int, width: int, rng: np.random.Generator, photo_share: float = 0.6) -> np.ndarray:
        """A photo crop, or a flat or graded colour, (height, width, 3) uint8."""
        if rng.random() < photo_share:
            return photo_crop(self.photos[rng.integers(len(self.photos))], height, width, rng)
        first, second = rng.uniform(20, 250, 3), rng.uniform(20, 250, 3)
        if rng.random() < 0.4:
            second = first
        angle = rng.uniform(0, 2 * np.pi)
        y, x = np.mgrid[0:height, 0:width]
        ramp = x / width * np.cos(angle) + y / height * np.sin(angle)
        ramp = (ramp - ramp.min()) / max(float(np.ptp(ramp)), 1e-6)
        return (first + (second - first) * ramp[..., None]).round().astype(np.uint8)

    def pick(self, rng: np.random.Generator) -> Sticker:
        concept = self.concepts[rng.integers(len(self.concepts))]
        coloured = concept in COLOURABLE and rng.random() < 0.5
        return Sticker(concept, str(rng.choice(list(HUES))) if coloured else "")

    def picture(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        """Any one picture, (height, width, 3) uint8: a background with none to two stickers."""
        picture = self.background(height, width, rng, photo_share=0.75)
        for _ in range(int(rng.integers(3))):
            picture = self.paste(picture, self.pick(rng), *self.place(height, width, rng), rng)
        return picture

    def scene(self, height: int, width: int, rng: np.random.Generator, states: int = 4, share: float = 0.6) -> Scene:
        """One place in `states` + 1 states. Extra stickers elsewhere in a third of the scenes, the same in every state."""
        base = self.background(height, width, rng, share)
        for _ in range(int(rng.random() < 0.3)):
            base = self.paste(base, self.pick(rng), *self.place(height, width, rng), rng)
        x, y, side = self.place(height, width, rng)
        stickers = [self.pick(rng) for _ in range(states)]
        if stickers[0].concept in COLOURABLE:
            stickers[1] = Sticker(stickers[0].concept, str(rng.choice([h for h in HUES if h != stickers[0].colour])))
        pictures, cover = [base], np.zeros((height, width), bool)
        for sticker in stickers:
            picture = self.paste(base, sticker, x, y, side, rng)
            cover |= (picture != base).any(2)
            pictures.append(picture)
        return Scene(np.stack(pictures), (None, *stickers), mask_around(cover, rng))

    def place(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int]:
        """A square (x, y, side) for a sticker: as large as documents of 128 px hold it, up to twice that in larger ones."""
        short = min(height, width)
        side = int(rng.uniform(min(0.32 * short, SIDES[0]), min(0.62 * short, SIDES[1])))
        return int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1)), side

    def paste(self, base: np.ndarray, sticker: Sticker, x: int, y: int, side: int, rng: np.random.Generator) -> np.ndarray:
        """`base` with the sticker fitted into the square at (x, y), turned by up to 5 degrees."""
        sprite = Image.fromarray(self.sprite(sticker))
        if 2 * side < max(sprite.size):
            sprite = sprite.reduce(max(sprite.size) // (2 * side) + 1)
        sprite = sprite.rotate(float(rng.uniform(-5, 5)), Image.Resampling.BICUBIC, expand=True)
        scale = side / max(sprite.size)
        sprite = sprite.resize([max(1, round(s * scale)) for s in sprite.size], Image.Resampling.BOX)
        picture = Image.fromarray(base)
        picture.paste(sprite, (x + (side - sprite.width) // 2, y + (side - sprite.height) // 2), sprite)
        return np.asarray(picture)


def mask_around(cover: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A person's mask of what `cover` (H, W) bool shows: its box, its ellipse, or itself, each a little larger."""
    ys, xs = np.nonzero(cover)
    height, width = cover.shape
    margin = int(rng.integers(2, max(3, min(height, width) // 20)))
    top, bottom = max(0, int(ys.min()) - margin), min(height, int(ys.max()) + margin + 1)
    left, right = max(0, int(xs.min()) - margin), min(width, int(xs.max()) + margin + 1)
    mask = np.zeros_like(cover)
    if rng.random() < 0.5:
        mask[top:bottom, left:right] = True
        return mask
    y, x = np.mgrid[0:height, 0:width]
    ry, rx = (bottom - top) * 0.6, (right - left) * 0.6
    mask = ((y - (top + bottom) / 2) / ry) ** 2 + ((x - (left + right) / 2) / rx) ** 2 <= 1
    return mask | cover


def photo_crop(photo: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A random crop of `photo` (H, W, 3), at a random scale, mirrored half the time, at (height, width)."""
    largest = min(photo.shape[0] / height, photo.shape[1] / width)
    scale = np.exp(rng.uniform(np.log(min(1.0, largest)), np.log(max(1.0, largest))))
    h, w = min(photo.shape[0], round(height * scale)), min(photo.shape[1], round(width * scale))
    top, left = rng.integers(photo.shape[0] - h + 1), rng.integers(photo.shape[1] - w + 1)
    crop = Image.fromarray(photo[top : top + h, left : left + w])
    picture = np.asarray(crop.resize((width, height), Image.Resampling.BOX if scale > 1 else Image.Resampling.BICUBIC))
    return picture[:, ::-1] if rng.random() < 0.5 else picture


def _wallpapers(folder: Path) -> list[list[Path]]:
    """One list for each wallpaper: its files at all sizes, landscape only."""
    plasma = sorted(folder.glob("plasma-workspace-wallpapers/usr/share/wallpapers/*/contents/images"))
    groups = [[p for p in images.iterdir() if p.name not in ("1080x1920.png", "720x1440.jpg")] for images in plasma]
    mate = sorted(folder.glob("mate-backgrounds/usr/share/backgrounds/mate/*/*"))
    skip = ("Elephants.", "Elephants_5640", "no-logo", "Float-into")
    groups += [[p] for p in mate if p.suffix in (".jpg", ".png") and not any(s in p.name for s in skip)]
    return groups


def load_photos(folder: Path) -> list[np.ndarray]:
    """The training photos, longer side at most `PHOTO_SIDE`; decoded once, kept beside the packages."""
    cache = folder / f"photos-{PHOTO_SIDE}.npz"
    if not cache.exists():
        paths = [max(images, key=lambda p: p.stat().st_size) for images in _wallpapers(folder)]
        photos: list[np.ndarray] = []
        for path in paths:
            with Image.open(path) as file:
                file.draft("RGB", (PHOTO_SIDE, PHOTO_SIDE))
                image = file.convert("RGB")
            image.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.BOX)
            photos.append(np.asarray(image))
        with cache.with_suffix(".part").open("wb") as part:
            np.savez(part, *photos)
        os.replace(cache.with_suffix(".part"), cache)
        log.info("decoded %d training photos", len(photos))
    with np.load(cache) as stored:
        return [stored[name] for name in stored.files]
