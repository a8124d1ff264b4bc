"""FLOPs of the matrix products of an edit: what it would cost if the machine did nothing else, at its measured rate.

The transformer's are computed from config and token counts (`tests/test_bench.py` holds them against a counter), those of the
autoencoder and the text encoder are counted once for each shape. A product of (m, k) and (k, n) is 2 m k n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from retouch.models.base import Job


def flops(config: Any, image: int, text: int, pairs: int, out: int | None = None, jobs: int = 1) -> int:
    """One forward of a `Flux2Transformer2DModel`.

    image, text: tokens through the two streams. pairs: (query, key) pairs of a layer's attention, over all segments.
    out: image tokens that are projected back (all). jobs: rows for which the modulation is computed.
    """
    dim = config.num_attention_heads * config.attention_head_dim
    hidden = int(dim * config.mlp_ratio)
    layers = config.num_layers + config.num_single_layers
    token = 4 * dim * dim + 3 * dim * hidden  # q, k, v and out; the gated feed-forward: alike in both kinds of block
    linear = layers * token * (image + text)
    embed = image * config.in_channels * dim + text * config.joint_attention_dim * dim
    project = (image if out is None else out) * dim * (config.out_channels or config.in_channels)
    attention = layers * 2 * pairs * dim
    return 2 * (linear + embed + project + attention + jobs * _modulation(config, doubles=2, out=True))


def _modulation(config: Any, doubles: int, out: bool) -> int:
    """Multiplications of the timestep embedding and of what turns it into shifts, scales and gates, for one job."""
    dim = config.num_attention_heads * config.attention_head_dim
    timestep = config.timestep_guidance_channels * dim + dim * dim
    return timestep + (6 * doubles + 3 + 2 * out) * dim * dim


def plain_steps(config: Any, cells: int, text: int, steps: int) -> int:
    """`Flux2KleinPipeline`: the reference runs along in every step, and is projected with the rest."""
    return steps * flops(config, 2 * cells, text, (2 * cells + text) ** 2)


def kv_steps(config: Any, cells: int, text: int, steps: int) -> int:
    """`Flux2KleinKVPipeline`: the first step extracts the reference's keys and values, the others read them."""
    pairs = (cells + text) * (2 * cells + text)
    extract = flops(config, 2 * cells, text, pairs + cells**2, out=cells) + 2 * _modulation(config, doubles=1, out=False)
    return extract + (steps - 1) * flops(config, cells, text, pairs)


def packed_step(config: Any, jobs: Sequence[Job]) -> int:
    """Retouch: cells inside the masks, each job against itself and its document's keys."""
    image, text, pairs = 0, 0, 0
    for job in jobs:
        own, words = len(job.cells) + len(job.document.reference), len(job.prompt.embedded)
        keys = len(job.document.keys[0][0]) if job.document.keys else 0
        image, text, pairs = image + own, text + words, pairs + (own + words) * (own + words + keys)
    return flops(config, image, text, pairs, jobs=len(jobs))


def document(config: Any, cells: int) -> int:
    """Retouch: reference keys and values of a document, through all layers."""
    return flops(config, cells, 0, cells**2, out=0)


def counted(call: Callable[[], Any]) -> int:
    """FLOPs of the products and convolutions that a call runs."""
    own = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=own) as counter:
        call()
    return int(counter.get_total_flops())


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """The counter knows the attention kernels of CUDA, not that of the CPU."""
    return int(sdpa_flop_count(q, k, v))


@lru_cache
def encoder(vae: AutoencoderKLFlux2, height: int, width: int) -> int:
    """Of pixels."""
    return counted(lambda: vae.encode(torch.zeros(1, 3, height, width, device=vae.device, dtype=vae.dtype)))


@lru_cache
def decoder(vae: AutoencoderKLFlux2, height: int, width: int) -> int:
    """Of latents, an eighth of the pixels on each side."""
    shape = (1, vae.config.latent_channels, height, width)
    return counted(lambda: vae.decode(torch.zeros(shape, device=vae.device, dtype=vae.dtype)))


@lru_cache
def prompt(text_encoder: torch.nn.Module, tokens: int) -> int:
    device = next(text_encoder.parameters()).device
    return counted(lambda: text_encoder(torch.zeros(1, tokens, dtype=torch.int64, device=device)))
