"""The encoder in closed form: the best linear one, written into the convolutions of an `AutoencoderKLFlux2`.

Under a pixel loss a small encoder spends its training on finding the principal components of 8 x 8 blocks. Here they are
solved for instead: each strided convolution keeps the leading components of its 2 x 2 neighbours, the residual branches are
silent, and the last activation cancels out, since silu(x) - silu(-x) = x. The group norm before it would divide by the
contrast of the picture; constant channels, far larger than the signal, hold its divisor still.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor, nn

STILL = 16.0
"""Of the constant channels, where the signal has variance 1."""

LOG_VARIANCE = -6.0
"""Of the posterior: the noise that the decoder is trained to bear."""


@torch.no_grad()
def solve_encoder(vae: AutoencoderKLFlux2, pixels: Tensor) -> Tensor:
    """Set every weight of `vae`'s encoder from sample pictures (B, 3, H, W) in -1..1, sides multiples of 8.

    Latents come out uncorrelated over the samples, with variance 1, the first one strongest. Returns the variance (L,) that
    each stands for in the picture.
    """
    encoder, kept = vae.encoder, vae.config.latent_channels
    for module in (*encoder.modules(), vae.quant_conv):
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    encoder.conv_in.weight[:3, :, 1, 1] = torch.eye(3)
    width, seen = 3, pixels.double()
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                resnet.conv_shortcut.weight[:width, :width, 0, 0] = torch.eye(width)
        for downsampler in block.downsamplers or ():
            basis = _leading(seen, downsampler.conv.out_channels)
            downsampler.conv.weight[: len(basis), :width, :2, :2] = basis.float()  # padded below and right: taps 0 and 1
            seen = nn.functional.conv2d(seen, basis, stride=2)
            width = len(basis)
    variances = _read_out(encoder, seen, kept)
    vae.quant_conv.weight[:kept, :kept, 0, 0] = torch.eye(kept)
    vae.quant_conv.bias[kept:] = LOG_VARIANCE
    return variances


@torch.no_grad()
def as_convolution(vae: AutoencoderKLFlux2) -> nn.Conv2d:
    """What a solved encoder computes, as the one strided convolution that it is: (B, 3, H, W) -> (B, L, H / 8, W / 8).

    A fiftieth of the work, for the many thousand pictures of training. Found by asking the encoder for each pixel's answer.
    """
    side = 2 ** (len(vae.config.block_out_channels) - 1)
    device = vae.quant_conv.weight.device
    asked = torch.eye(3 * side * side, device=device).view(-1, 3, side, side)
    answers = vae.encode(torch.cat([asked, torch.zeros_like(asked[:1])])).latent_dist.mode().flatten(1)
    convolution = nn.Conv2d(3, answers.shape[1], side, stride=side, device=device)
    convolution.weight.copy_((answers[:-1] - answers[-1]).T.view_as(convolution.weight))
    assert convolution.bias is not None
    convolution.bias.copy_(answers[-1])
    return convolution.requires_grad_(False)


def _leading(seen: Tensor, most: int) -> Tensor:
    """The leading principal components of 2 x 2 neighbours in `seen` (B, C, H, W), as a kernel (K, C, 2, 2), K <= most."""
    blocks = nn.functional.unfold(seen, 2, stride=2).transpose(1, 2).flatten(0, 1)
    vectors = torch.linalg.eigh(blocks.T @ blocks).eigenvectors.flip(1)[:, :most]
    return _signed(vectors.T).unflatten(1, (seen.shape[1], 2, 2))


def _signed(rows: Tensor) -> Tensor:
    """An eigenvector's sign is arbitrary: the largest entry is made positive, so that every machine solves the same."""
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * largest.sign()


def _read_out(encoder: Any, seen: Tensor, kept: int) -> Tensor:
    """The last block's widening and the output: component k rides on two channels as +x and -x, the rest stand still."""
    shortcut, norm, out = encoder.down_blocks[-1].resnets[0].conv_shortcut, encoder.conv_norm_out, encoder.conv_out
    features = seen.transpose(0, 1).flatten(1)
    mean = features.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(features))
    rows = _signed(vectors.flip(1)[:, :kept].T) / values.flip(0)[:kept, None].sqrt()
    group = norm.num_channels // norm.num_groups
    pairs = kept // norm.num_groups
    assert kept % norm.num_groups == 0, "each group of the norm holds as many latents"
    assert 2 * pairs < group, "the last width holds a pair for every latent and more"
    still = group - 2 * pairs
    divisor = ((2 * pairs + still * STILL**2) / group) ** 0.5
    nn.init.zeros_(shortcut.weight)
    for index in range(kept):
        plus = index // pairs * group + 2 * (index % pairs)
        for channel, sign in ((plus, 1.0), (plus + 1, -1.0)):
            shortcut.weight[channel, : rows.shape[1], 0, 0] = sign * rows[index].float()
            shortcut.bias[channel] = -sign * float(rows[index] @ mean)
            out.weight[index, channel, 1, 1] = sign * divisor
    for start in range(0, norm.num_channels, group):
        constant = torch.arange(still) % 2 * 2.0 - 1
        shortcut.bias[start + 2 * pairs : start + group] = STILL * constant
    return values.flip(0)[:kept].float()
