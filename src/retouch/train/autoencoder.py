"""The small `AutoencoderKLFlux2` of `retouch-mini`: a pixel loss and a light KL, since there is no perceptual backbone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from PIL import Image

from retouch.models.latents import pictures_of, pixels_of
from retouch.train.data import Source
from retouch.train.loop import Stage, train

SIZES = ((64, 8), (128, 3), (256, 1))
"""(side in pixels, pictures a step): many small steps learn faster than few large ones; the norms must see large ones too."""
SHARES = (0.7, 0.25, 0.05)
KL_WEIGHT = 1e-4
LATENT_CHANNELS = 16


def build() -> AutoencoderKLFlux2:
    """16 latent channels at an eighth of the size; no attention in the middle, so that a crop can be decoded alone."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(16, 32, 64, 96),
        decoder_block_out_channels=(16, 24, 48, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        sample_size=512,
        mid_block_add_attention=False,
    )
    _start_clear(vae)
    return vae


@torch.no_grad()
def _start_clear(vae: AutoencoderKLFlux2) -> None:
    """Start where a picture passes through: unit gain, no biases, quiet residual branches and little posterior noise.

    PyTorch's default shrinks the signal by 1.7 a convolution, under the biases, and loses hundreds of steps to it.
    """
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.orthogonal_(module.weight, gain=0.1 if name.endswith("conv2") else 1.0)
            assert module.bias is not None
            module.bias.zero_()
    vae.quant_conv.weight[LATENT_CHANNELS:].zero_()
    vae.quant_conv.bias[LATENT_CHANNELS:].fill_(-6)


def train_autoencoder(
    vae: AutoencoderKLFlux2, source: Source, stage: Stage, folder: Path, device: torch.device, decoder_only: bool = False,
    seed: int = 0,
) -> None:  # fmt: skip
    """Train in place. `decoder_only` keeps the encoder, and with it every latent, as it is."""
    vae.to(device, memory_format=torch.channels_last).train()
    for module in (vae.encoder, vae.quant_conv):
        module.requires_grad_(not decoder_only)
    vae.bn.eval()

    def batch_at(rng: np.random.Generator) -> torch.Tensor:
        side, count = SIZES[rng.choice(len(SIZES), p=SHARES)]
        return pixels_of(np.stack([source.picture(side, side, rng) for _ in range(count)]), torch.device("cpu"), torch.float32)

    def loss_of(pixels: torch.Tensor, noise: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        pixels = pixels.to(device)
        with torch.set_grad_enabled(not decoder_only):
            posterior = vae.encode(pixels).latent_dist
        spread = torch.randn(posterior.mean.shape, generator=noise).to(device)
        latents = posterior.mean + posterior.std * spread
        decoded = vae.decode(latents).sample
        error = decoded - pixels
        mse = error.square().mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = 0.25 * error.abs().mean() + 2 * mse + (0 if decoder_only else KL_WEIGHT * kl)
        return loss, {"psnr": float(10 * torch.log10(4 / mse.detach())), "kl": float(kl.detach())}

    rng = np.random.default_rng(1)
    fixed = np.stack([source.picture(128, 128, rng) for _ in range(8)])

    def sheet(path: Path) -> None:
        decoded = vae.decode(vae.encode(pixels_of(fixed, device, torch.float32)).latent_dist.mode()).sample
        rows = [np.concatenate(list(row), 1) for row in (fixed, pictures_of(decoded))]
        Image.fromarray(np.concatenate(rows, 0)).save(path)

    train(stage, torch.nn.ModuleDict({"vae": vae}), batch_at, loss_of, folder, sheet, seed)
    vae.eval()
