"""A picture of latents without the decoder: one matrix from a token to the pixels of its cell, for looks at a running edit.

The matrix is fitted once a model, by least squares, to what its own encoder makes of pictures drawn here from a seed: no
further weights are needed, and nothing of any document is in it. Source of the idea: the latent-to-RGB factors that user
interfaces of Stable Diffusion preview by; here whole cells instead of single latents.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

SIDE, PICTURES, RIDGE = 256, 12, 1e-2


class Sketch:
    """`encode` takes (H, W, 3) uint8 to tokens (h, w, C), of cells of `side` pixels."""

    def __init__(self, encode: Callable[[np.ndarray], Tensor], side: int) -> None:
        pairs = [(encode(picture).flatten(0, 1).cpu(), _cells(picture, side)) for picture in drawn(PICTURES)]
        tokens = _with_one(torch.cat([t for t, _ in pairs]).double())
        pixels = torch.cat([p for _, p in pairs]).double()
        ridge = RIDGE * torch.eye(tokens.shape[1], dtype=torch.float64)
        self.side = side
        self.matrix = torch.linalg.solve(tokens.T @ tokens + ridge, tokens.T @ pixels).float()

    def __call__(self, tokens: Tensor) -> np.ndarray:
        """(h, w, C) -> (side h, side w, 3) uint8."""
        height, width = tokens.shape[:2]
        pixels = _with_one(tokens.flatten(0, 1).float().cpu()) @ self.matrix
        cells = pixels.view(height, width, self.side, self.side, 3).permute(0, 2, 1, 3, 4)
        return cells.reshape(height * self.side, width * self.side, 3).clamp(0, 255).round().byte().numpy()


def drawn(count: int, seed: int = 0) -> list[np.ndarray]:
    """Pictures (SIDE, SIDE, 3) uint8 with slopes, edges and some grain, as photos have."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ground = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(ground).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
        for _ in range(24):
            x, y = (int(v) for v in rng.integers(-40, SIDE, 2))
            w, h = (int(v) for v in rng.integers(6, 110, 2))
            colour = tuple(int(v) for v in rng.integers(0, 256, 3))
            (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((x, y, x + w, y + h), fill=colour)
        grain = rng.normal(0, rng.uniform(0, 12), (SIDE, SIDE, 1))
        made.append(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
    return made


def _cells(picture: np.ndarray, side: int) -> Tensor:
    """(H, W, 3) uint8 -> (cells, side * side * 3) float32."""
    height, width = (length // side for length in picture.shape[:2])
    cells = torch.from_numpy(picture).view(height, side, width, side, 3).permute(0, 2, 1, 3, 4)
    return cells.reshape(height * width, -1).float()


def _with_one(tokens: Tensor) -> Tensor:
    return torch.cat([tokens, torch.ones_like(tokens[:, :1])], 1)
