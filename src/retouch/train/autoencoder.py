"""The small `AutoencoderKLFlux2` of `retouch-mini`: an encoder in closed form, and a decoder trained on pixels.

The latents are there before anything is trained, so the decoder may go on learning without any edit having to be learned anew.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from PIL import Image

from retouch.models.latents import patchify, pictures_of, pixels_of
from retouch.train import kept
from retouch.train.data import Source
from retouch.train.linear import solve_encoder
from retouch.train.loop import Stage, train

SIZES = ((64, 8), (128, 3), (256, 1))
"""(side in pixels, pictures a step): many small steps learn faster than few large ones; the norms must see large ones too."""
SHARES = (0.7, 0.25, 0.05)
LATENT_CHANNELS = 16
TILT = 0.75
"""Power of its share of the picture's variance that a latent keeps after the batch norm. At 0 noise would drown coarse and
fine alike; at 1 it drowns them as it does pixels, fine first, which is what makes denoising go from coarse to fine."""


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
    """Start where a picture passes through the decoder: unit gain, no biases, quiet residual branches.

    PyTorch's default shrinks the signal by 1.7 a convolution, under the biases, and loses hundreds of steps to it.
    """
    for part in (vae.decoder, vae.post_quant_conv):
        for name, module in part.named_modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.orthogonal_(module.weight, gain=0.1 if name.endswith("conv2") else 1.0)
                assert module.bias is not None
                module.bias.zero_()


@torch.no_grad()
def prepare_encoder(vae: AutoencoderKLFlux2, source: Source, path: Path, seed: int, pictures: int) -> None:
    """Solve the encoder from random pictures of 128 px and set the batch norm of its latents; both are kept in `path`.

    Raises InvalidOption where those are of another seed.
    """
    made_with = {"seed": seed, "pictures": pictures}
    parts = kept.load(path, made_with)
    if parts is None:
        rng = np.random.default_rng([seed, 77])
        drawn = np.stack([source.picture(128, 128, rng) for _ in range(pictures)])
        pixels = pixels_of(drawn, torch.device("cpu"), torch.float32)
        wanted = solve_encoder(vae, pixels) ** TILT
        tokens = torch.cat([patchify(vae.encode(part).latent_dist.mode()).flatten(0, 2) for part in pixels.split(8)])
        vae.bn.running_mean.copy_(tokens.mean(0))
        vae.bn.running_var.copy_((wanted.mean() / wanted).repeat_interleave(4))
        parts = {name: getattr(vae, name).state_dict() for name in ("encoder", "quant_conv", "bn")}
        kept.save(path, parts, made_with)
    for name, state in parts.items():
        getattr(vae, name).load_state_dict(state)


def train_decoder(
    vae: AutoencoderKLFlux2, source: Source, stage: Stage, folder: Path, device: torch.device, seed: int = 0
) -> None:
    """Train the decoder in place; the encoder, and with it every latent, stays as it is."""
    vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    trained = torch.nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}).requires_grad_(True)

    def batch_at(rng: np.random.Generator, done: float) -> torch.Tensor:
        side, count = SIZES[rng.choice(len(SIZES), p=SHARES)]
        return pixels_of(np.stack([source.picture(side, side, rng) for _ in range(count)]), torch.device("cpu"), torch.float32)

    def loss_of(pixels: torch.Tensor, noise: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        pixels = pixels.to(device)
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=noise).to(device)
        error = vae.decode(latents).sample - pixels
        mse = error.square().mean()
        return 0.25 * error.abs().mean() + 2 * mse, {"psnr": float(10 * torch.log10(4 / mse.detach()))}

    rng = np.random.default_rng(1)
    fixed = np.stack([source.picture(128, 128, rng) for _ in range(8)])

    def sheet(path: Path) -> None:
        decoded = vae.decode(vae.encode(pixels_of(fixed, device, torch.float32)).latent_dist.mode()).sample
        rows = [np.concatenate(list(row), 1) for row in (fixed, pictures_of(decoded))]
        Image.fromarray(np.concatenate(rows, 0)).save(path)

    train(stage, trained, batch_at, loss_of, folder, sheet, seed)
