"""Scenes as latents in memory: encoded once, cut into batches of edits of about the same number of masked cells."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from rich.progress import track
from torch import Tensor

from retouch.models.latents import cells_of, normalize, patchify, pixels_of
from retouch.train import kept
from retouch.train.concepts import Sticker, caption
from retouch.train.data import Scene, Source
from retouch.train.linear import as_convolution
from retouch.train.text import drop

log = logging.getLogger(__name__)
CELL = 16


@dataclass(frozen=True, slots=True)
class Encoded:
    """`latents` (S, h * w, C) float16, one row a state; `cells` (K,) int64, flat indices of the masked cells."""

    latents: Tensor
    stickers: tuple[Sticker | None, ...]
    cells: Tensor
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Batch:
    """D documents with M edits each, padded.

    document (D, R, C) and target (D, M, R, C) float32; prompts D * M; cells (D, K) int64 with inside (D, K) bool;
    grid = (h, w) in cells; shift (4,) int64 is added to every image position: only differences of positions are to matter.
    """

    document: Tensor
    target: Tensor
    prompts: list[str]
    cells: Tensor
    inside: Tensor
    grid: tuple[int, int]
    shift: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.int64))


class Scenes:
    """All encoded scenes of a run, by size; made once from a seed and kept on disk in chunks, so that a kill costs little.

    `after` is what the encoder depends on. Raises InvalidOption where scenes of another encoder or seed lie there.
    """

    def __init__(
        self, vae: AutoencoderKLFlux2, source: Source, sizes: dict[tuple[int, int], int], folder: Path, device: torch.device,
        seed: int = 0, chunk: int = 500, after: kept.Settings | None = None,
    ) -> None:  # fmt: skip
        convolution = as_convolution(vae.to(device))
        self.by_size: dict[tuple[int, int], list[Encoded]] = {}
        made_with = {"seed": seed, **(after or {})}
        for (height, width), count in sizes.items():
            found: list[Encoded] = []
            for first in range(0, count, chunk):
                made_now = min(chunk, count - first)
                path = folder / f"scenes-{height}x{width}-{first:06d}-{made_now}.pt"
                made = kept.load(path, made_with, trusted=True)
                if made is None:
                    rng = np.random.default_rng([seed, height, width, first])
                    made = [
                        encode_scene(vae, convolution, source.scene(height, width, rng, share=0.65), device)
                        for _ in track(range(made_now), f"scenes {height} x {width} from {first}")
                    ]
                    kept.save(path, made, made_with)
                found += made
            self.by_size[height, width] = sorted(found, key=lambda scene: len(scene.cells))
            log.info("%d scenes of %d x %d", len(found), height, width)

    def batch(
        self, size: tuple[int, int], documents: int, rng: np.random.Generator, edits: int = 4, inserts: float = 0.5
    ) -> Batch:
        """`documents` scenes of similar mask, each with `edits` edits of one of its states."""
        scenes = self.by_size[size]
        start = int(rng.integers(max(1, len(scenes) - 8 * documents)))
        window = scenes[start : start + 8 * documents]
        picked = [window[i] for i in rng.choice(len(window), min(documents, len(window)), replace=False)]
        longest = max(len(scene.cells) for scene in picked)
        before_all, after_all, prompts, cells, inside = [], [], [], [], []
        for scene in picked:
            states = len(scene.stickers)
            before = 0 if rng.random() < inserts else int(rng.integers(1, states))
            others = [s for s in range(states) if s != before]
            targets = rng.permutation(others * (edits // len(others) + 1))[:edits]
            before_all.append(scene.latents[before])
            after_all.append(scene.latents[targets])
            prompts += [drop(caption(scene.stickers[before], scene.stickers[t], rng), rng) for t in targets]
            missing = longest - len(scene.cells)
            cells.append(torch.nn.functional.pad(scene.cells, (0, missing)))
            inside.append(torch.arange(longest) < len(scene.cells))
        return Batch(
            torch.stack(before_all).float(), torch.stack(after_all).float(), prompts, torch.stack(cells),
            torch.stack(inside), (picked[0].height, picked[0].width),
        )  # fmt: skip


@torch.no_grad()
def encode_scene(vae: AutoencoderKLFlux2, convolution: torch.nn.Conv2d, scene: Scene, device: torch.device) -> Encoded:
    tokens = normalize(vae, patchify(convolution(pixels_of(scene.pictures, device, torch.float32))))
    height, width = tokens.shape[1:3]
    cells = torch.from_numpy(np.flatnonzero(cells_of(scene.mask, CELL)))
    return Encoded(tokens.flatten(1, 2).half().cpu(), scene.stickers, cells, height, width)
