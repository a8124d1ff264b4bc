"""FLUX.1's transformer over any subset of positions, written against the modules of `diffusers.FluxTransformer2DModel`.

It is FLUX.2's arithmetic (`transformer.py`, which says what a `Layout` is) with three differences: every block has a modulation
of its own, made as the block is reached, since those of all blocks together would be larger than the activations; the pooled
prompt joins time and guidance in the embedding that modulates; and a single block's feed-forward has weights of its own.

Source: FluxTransformer2DModel in diffusers 0.42, after https://github.com/black-forest-labs/flux.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor

from retouch.models.transformer import (
    Layout,
    Modulation,
    Rope,
    after_attention,
    image_heads,
    joint_attention,
    normalize,
    rotate,
)

Spread = Callable[[Modulation], Modulation]
"""From a row for each segment to what broadcasts against the tokens of a step."""


def embed(model: FluxTransformer2DModel, sigma: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
    """What every block's modulation is made of, (segments, dim).

    `sigma` (segments,) in 0..1, `pooled` (segments, pooled_projection_dim), `guidance` (segments,) where it is embedded.
    """
    dtype = model.x_embedder.weight.dtype
    scales = [sigma] if guidance is None else [sigma, guidance]
    return F.silu(model.time_text_embed(*(scale.to(dtype) * 1000 for scale in scales), pooled.to(dtype)))


def denoise(
    model: FluxTransformer2DModel, image: Tensor, text: Tensor, embedding: Tensor, rope: Rope, layout: Layout, spread: Spread
) -> Tensor:
    """Velocity (..., N, out_channels) of the image tokens.

    image: (..., N, in_channels), text: (..., T, joint_attention_dim); rope over the joined tokens.
    """
    image, text = model.x_embedder(image), model.context_embedder(text)
    layer = 0
    for block in model.transformer_blocks:
        of_image, of_text = (norm.linear(embedding).chunk(6, -1) for norm in (block.norm1, block.norm1_context))
        image, text = _double(block, layer, image, text, spread(Modulation(of_image, of_text, (), ())), rope, layout)
        layer += 1
    joined = layout.join(text, image)
    for block in model.single_transformer_blocks:
        modulation = spread(Modulation((), (), block.norm.linear(embedding).chunk(3, -1), ()))
        joined = _single(block, layer, joined, modulation.single, rope, layout)
        layer += 1
    scale, shift = spread(Modulation((), (), (), model.norm_out.linear(embedding).chunk(2, -1))).out
    return model.proj_out(normalize(layout.split(joined)[1], shift, scale, model.norm_out.norm.eps))


def _double(
    block: Any, layer: int, image: Tensor, text: Tensor, modulation: Modulation, rope: Rope, layout: Layout
) -> tuple[Tensor, Tensor]:
    seen_image = normalize(image, modulation.image[0], modulation.image[1], block.norm1.norm.eps)
    seen_text = normalize(text, modulation.text[0], modulation.text[1], block.norm1_context.norm.eps)
    out_text, out_image = joint_attention(block.attn, layer, seen_text, seen_image, rope, layout)
    image = after_attention(image, block.attn.to_out[0](out_image), block.ff, modulation.image, block.norm2.eps)
    text = after_attention(text, block.attn.to_add_out(out_text), block.ff_context, modulation.text, block.norm2_context.eps)
    return image, text


def _single(block: Any, layer: int, x: Tensor, modulation: tuple[Tensor, ...], rope: Rope, layout: Layout) -> Tensor:
    shift, scale, gate = modulation
    seen = normalize(x, shift, scale, block.norm.norm.eps)
    qk, v = image_heads(block.attn, seen)
    q, k = rotate(qk, rope).chunk(2, -2)
    out = layout.attend(layer, q, k, v).flatten(-2)
    return torch.addcmul(x, gate, block.proj_out(torch.cat([out, block.act_mlp(block.proj_mlp(seen))], -1)))
