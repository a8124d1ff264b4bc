"""Pixels to latent tokens and back, through an `AutoencoderKLFlux2`: one token is a cell of 16 x 16 pixels, 2 x 2 latents."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor


def cell_side(vae: AutoencoderKLFlux2) -> int:
    """Pixels along one side of a token's cell."""
    return int(2 ** (len(vae.config.block_out_channels) - 1) * vae.config.patch_size[0])


def pixels_of(pictures: np.ndarray, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in -1..1, channels last."""
    x = torch.from_numpy(np.array(pictures, order="C")).to(device).permute(0, 3, 1, 2)
    return (x.float() / 127.5 - 1).to(dtype, memory_format=torch.channels_last)


def pictures_of(pixels: Tensor) -> np.ndarray:
    """(B, 3, H, W) in -1..1 -> (B, H, W, 3) uint8."""
    scaled = (pixels.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def encode(vae: AutoencoderKLFlux2, pixels: Tensor) -> Tensor:
    """(B, 3, H, W), sides multiples of the cell -> normalized tokens (B, H / 16, W / 16, channels) float32."""
    return normalize(vae, patchify(vae.encode(pixels).latent_dist.mode().float()))


def decode(vae: AutoencoderKLFlux2, tokens: Tensor) -> Tensor:
    """(B, h, w, channels) -> (B, 3, 16 h, 16 w) in about -1..1."""
    return of_decoder(vae, of_tokens(vae, tokens))


def of_tokens(vae: AutoencoderKLFlux2, tokens: Tensor) -> Tensor:
    """(B, h, w, channels) -> latents in the decoder's own scale (B, C, 2 h, 2 w) float32."""
    return unpatchify(denormalize(vae, tokens.float()))


def of_decoder(vae: Any, latents: Tensor) -> Tensor:
    """(B, C, H, W), or a window of them, in the decoder's own scale -> (B, 3, 8 H, 8 W) in about -1..1."""
    dtype = next(vae.decoder.parameters()).dtype
    pixels: Tensor = vae.decode(latents.to(dtype, memory_format=torch.channels_last), return_dict=False)[0]
    return pixels


def patchify(latents: Tensor) -> Tensor:
    """(B, C, 2 h, 2 w) -> (B, h, w, 4 C), channel-major as FLUX.2 has it."""
    batch, channels, height, width = latents.shape
    x = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2, width // 2, channels * 4)


def unpatchify(tokens: Tensor) -> Tensor:
    """(B, h, w, 4 C) -> (B, C, 2 h, 2 w)."""
    batch, height, width, channels = tokens.shape
    x = tokens.reshape(batch, height, width, channels // 4, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height * 2, width * 2)


def normalize(vae: AutoencoderKLFlux2, tokens: Tensor) -> Tensor:
    """By the running statistics of the autoencoder's batch norm, as every FLUX.2 pipeline does."""
    return (tokens - vae.bn.running_mean.float()) / _spread(vae)


def denormalize(vae: AutoencoderKLFlux2, tokens: Tensor) -> Tensor:
    return tokens * _spread(vae) + vae.bn.running_mean.float()


def _spread(vae: AutoencoderKLFlux2) -> Tensor:
    return (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt()


def cells_of(mask: np.ndarray, side: int, dilate: int = 0) -> np.ndarray:
    """Which cells an edit computes: (H, W) bool -> (ceil(H / side), ceil(W / side)) bool.

    A cell is in when the mask touches it, or, with `dilate`, a cell that near.
    """
    height, width = (math.ceil(s / side) for s in mask.shape)
    padded = np.zeros((height * side, width * side), bool)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    cells = np.asarray(padded.reshape(height, side, width, side).any((1, 3)), bool)
    for _ in range(dilate):
        wide = np.pad(cells, 1)
        neighbours = [wide[y : y + height, x : x + width] for y in range(3) for x in range(3)]
        cells = np.asarray(np.stack(neighbours).any(0), bool)
    return cells
