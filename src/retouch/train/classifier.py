"""An independent judge of what was drawn: a small convolutional network over renders of the stickers, never over edits.

It learns from pixels that are blurred, noisy and compressed as well as clean ones, so that it names what an autoencoder has
softened. It shares no weights and no data path with the model it judges.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn

from retouch.boxes import bounds
from retouch.train.concepts import COLOURABLE, HUES, SEEN, Sticker
from retouch.train.data import Source, mask_around
from retouch.train.loop import Stage, train

log = logging.getLogger(__name__)

SIDE = 64
STEPS, BATCH = 400, 64
SAME_GROUND = 4
"""Renders that share a background: cropping a photo costs more than pasting a sticker."""


class Classifier(nn.Module):
    """0.85 M parameters. (B, 3, 64, 64) in -1..1 -> scores (B, classes)."""

    def __init__(self, names: Sequence[str] = SEEN) -> None:
        super().__init__()
        self.names = tuple(names)
        widths, layers, inside = (32, 64, 128, 192), [], 3
        for width in widths:
            layers += [_convolution(inside, width, stride=2), _convolution(width, width, stride=1)]
            inside = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(inside, len(self.names))

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.body(pixels.contiguous(memory_format=torch.channels_last))
        return self.head(features.mean((2, 3)))

    @torch.inference_mode()
    def ranked(self, tiles: np.ndarray) -> np.ndarray:
        """Tiles (N, 64, 64, 3) uint8 -> indices of `names`, best first, (N, classes)."""
        device = self.head.weight.device
        scores = [self(_pixels(tiles[i : i + 256]).to(device)) for i in range(0, len(tiles), 256)]
        return torch.cat(scores).argsort(1, descending=True).cpu().numpy()


def _convolution(inside: int, outside: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(8, outside), nn.SiLU())


def _pixels(tiles: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(tiles)).permute(0, 3, 1, 2).float() / 127.5 - 1


def tile(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mask's box of `picture` (H, W, 3) uint8, at (64, 64, 3)."""
    x0, y0, x1, y1 = bounds(mask)
    crop = Image.fromarray(np.ascontiguousarray(picture[y0:y1, x0:x1]))
    return np.asarray(crop.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def renders(
    source: Source, names: Sequence[str], rng: np.random.Generator, count: int, rough: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Tiles (count, 64, 64, 3) uint8 and which of `names` each shows, (count,) int64. `rough`: as a decoder may leave them.

    Stickers are as large as in the scenes and lie under masks of the same make.
    """
    tiles: list[np.ndarray] = []
    labels: list[int] = []
    while len(tiles) < count:
        side = int(rng.uniform(0.28, 0.62) * rng.choice((128, 128, 192, 256)))
        canvas = side + 2 * (side // 4 + 8)
        ground = source.background(canvas, canvas, rng)
        for _ in range(min(SAME_GROUND, count - len(tiles))):
            sticker = _pick(names, rng)
            shift = [int(v) for v in rng.integers(-6, 7, 2)]
            start = (canvas - side) // 2
            picture = source.paste(ground, sticker, start + shift[0], start + shift[1], side, rng)
            drawn = tile(picture, mask_around((picture != ground).any(2), rng))
            tiles.append(roughen(drawn, rng) if rough else drawn)
            labels.append(names.index(sticker.concept))
    return np.stack(tiles), np.array(labels)


def _pick(names: Sequence[str], rng: np.random.Generator) -> Sticker:
    concept = names[int(rng.integers(len(names)))]
    coloured = concept in COLOURABLE and rng.random() < 0.5
    return Sticker(concept, str(rng.choice(list(HUES))) if coloured else "")


def roughen(drawn: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light changes that leave the thing what it is: blur, gain, noise and JPEG, each in some of the tiles."""
    picture = Image.fromarray(drawn)
    if rng.random() < 0.6:
        picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.8))))
    values = np.asarray(picture, np.float32) * rng.uniform(0.85, 1.15) + rng.uniform(-12, 12)
    if rng.random() < 0.6:
        values = values + rng.normal(0, rng.uniform(1, 12), values.shape)
    rough: np.ndarray = np.clip(values, 0, 255).round().astype(np.uint8)
    if rng.random() < 0.4:
        buffer = io.BytesIO()
        Image.fromarray(rough).save(buffer, "JPEG", quality=int(rng.integers(30, 95)))
        rough = np.asarray(Image.open(buffer))
    return rough


def train_classifier(
    open_source: Callable[[], Source], folder: Path, device: torch.device, steps: int = STEPS, seed: int = 0, batch: int = BATCH
) -> Classifier:
    """The classifier of the seen concepts, from `folder` where it is finished, else trained (on) there.

    `open_source` is called only to train: a finished one needs no training photos.
    """
    torch.manual_seed(seed)
    classifier = Classifier()
    classifier.to(device)
    stamp = hashlib.sha256(repr((SEEN, steps, seed, batch)).encode()).hexdigest()[:8]
    finished = folder / f"classifier-{stamp}-finished.pt"
    if finished.exists():
        classifier.load_state_dict(torch.load(finished, map_location=device, weights_only=True))
        classifier.eval()
        return classifier
    source = cache(open_source)
    stage = Stage(f"classifier-{stamp}", steps, lr=2e-3, samples=batch, warmup=max(1, steps // 10), ema=0.99)

    def batch_at(rng: np.random.Generator, done: float) -> tuple[Tensor, Tensor]:
        tiles, labels = renders(source(), classifier.names, rng, batch, rough=True)
        return _pixels(tiles), torch.from_numpy(labels)

    def loss_of(drawn: tuple[Tensor, Tensor], _noise: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        pixels, labels = (part.to(device) for part in drawn)
        scores = classifier(pixels)
        right = (scores.detach().argmax(1) == labels).float().mean()
        return F.cross_entropy(scores, labels, label_smoothing=0.05), {"top-1": float(right)}

    train(stage, nn.ModuleDict({"classifier": classifier.train()}), batch_at, loss_of, folder, seed=seed)
    torch.save(classifier.state_dict(), finished.with_suffix(".part"))
    os.replace(finished.with_suffix(".part"), finished)
    classifier.eval()
    return classifier
