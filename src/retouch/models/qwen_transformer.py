"""Qwen-Image's transformer over any subset of positions, written against the modules of `QwenImageTransformer2DModel`.

`transformer.py` says what a `Layout` is. Here all blocks are double ones, each with modulation weights of its own. What goes in
are embedded timesteps, and which of them each token has: where a checkpoint has `zero_cond_t`, reference tokens are at 0.

Source: QwenImageTransformer2DModel in diffusers 0.42, after https://github.com/QwenLM/Qwen-Image.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from retouch.models.transformer import Layout, Rope, after_attention, joint_attention, normalize


class Times(NamedTuple):
    """`embedded` (times, dim), and which of its rows each token has: `image` (..., N) and `text` (..., T), int64."""

    embedded: Tensor
    image: Tensor
    text: Tensor


def embed_times(model: QwenImageTransformer2DModel, sigma: Tensor) -> Tensor:
    """`sigma` (times,) in 0..1 -> (times, dim)."""
    like = model.img_in.weight
    return model.time_text_embed((sigma * 1000).to(like.dtype) / 1000, like)


def cell_positions(cells: Tensor, grid: tuple[int, int], time: int) -> Tensor:
    """Flat indices (N,) into a grid (h, w) -> coordinates (N, 4): time, row and column from the grid's middle, and 0."""
    height, width = grid
    row, column = cells // width - (height - height // 2), cells % width - (width - width // 2)
    return torch.stack([torch.full_like(cells, time), row, column, torch.zeros_like(cells)], -1)


def text_positions(count: int, grid: tuple[int, int], references: Tensor) -> Tensor:
    """Coordinates (count, 4) of a text beside a picture of this grid and references at (R, 4): the same on each axis, from the
    end of the longest side of them all.
    """
    text = torch.arange(count, device=references.device) + max(grid) // 2
    if len(references):
        text = text + (references[:, 1:3].max() + 1 - max(grid) // 2).clamp_min(0)
    return text[:, None].expand(-1, 4)


def denoise(
    model: QwenImageTransformer2DModel, image: Tensor, text: Tensor, times: Times, rope: Rope, layout: Layout
) -> Tensor:
    """Velocity (..., N, out_channels) of the image tokens.

    image: (..., N, in_channels), text: (..., T, joint_attention_dim); rope over the joined tokens.
    """
    image, text = model.img_in(image), model.txt_in(model.txt_norm(text))
    for layer, block in enumerate(model.transformer_blocks):
        image, text = _block(block, layer, image, text, times, rope, layout)
    scale, shift = _each(model.norm_out.linear(F.silu(times.embedded)), times.image).chunk(2, -1)
    return model.proj_out(normalize(image, shift, scale, model.norm_out.norm.eps))


def _block(
    block: Any, layer: int, image: Tensor, text: Tensor, times: Times, rope: Rope, layout: Layout
) -> tuple[Tensor, Tensor]:
    of_image = _each(block.img_mod(times.embedded), times.image).chunk(6, -1)
    of_text = _each(block.txt_mod(times.embedded), times.text).chunk(6, -1)
    seen_image = normalize(image, of_image[0], of_image[1], block.img_norm1.eps)
    seen_text = normalize(text, of_text[0], of_text[1], block.txt_norm1.eps)
    out_text, out_image = joint_attention(block.attn, layer, seen_text, seen_image, rope, layout)
    image = after_attention(image, block.attn.to_out[0](out_image), block.img_mlp, of_image, block.img_norm2.eps)
    text = after_attention(text, block.attn.to_add_out(out_text), block.txt_mlp, of_text, block.txt_norm2.eps)
    return image, text


def _each(modulation: Tensor, row: Tensor) -> Tensor:
    """From a row for each timestep to one for each token, or to one that broadcasts where there is one timestep."""
    return modulation if len(modulation) == 1 else modulation[row]
