"""FLUX.2's transformer over any subset of positions, written against the modules of `diffusers.Flux2Transformer2DModel`.

The functions are agnostic of layout: tokens lie on axis -2 of (tokens, dim) when packed and of (edits, tokens, dim) when
padded, modulation broadcasts against them, and a `Layout` knows how text and image tokens join and which of them see which.
Serving packs (`packing.py`), training pads (`train/flow.py`); the arithmetic is this one file.

Source: Flux2Transformer2DModel in diffusers 0.42, after https://github.com/black-forest-labs/flux2.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from diffusers import Flux2Transformer2DModel
from torch import Tensor


class Layout(Protocol):
    """How the tokens of a step lie in memory. Heads and rotary embedding are on their own axes: (..., tokens, heads, dim)."""

    def join(self, text: Tensor, image: Tensor, axis: int = -2) -> Tensor:
        """Text and image tokens as one sequence along `axis`."""

    def split(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """(..., tokens, dim) -> text and image tokens."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over joined, rotated tokens; layers count from the first double block on."""


Rope = Tensor
"""exp(i angle), (..., tokens, 1, head_dim // 2) complex64, over the joined tokens."""


REACH = 8192
"""Coordinates of a token lie between this and its negative: cells of a picture, and tokens of a text, are far fewer."""


class Modulation(NamedTuple):
    """Shift, scale and gate of every normalization of a step; each tensor broadcasts against (..., tokens, dim)."""

    image: tuple[Tensor, ...]
    text: tuple[Tensor, ...]
    single: tuple[Tensor, ...]
    out: tuple[Tensor, ...]


def modulate_at(model: Flux2Transformer2DModel, sigma: Tensor, guidance: Tensor | None = None) -> Modulation:
    """`sigma` (jobs,) in 0..1 and `guidance` (jobs,) where the checkpoint embeds it -> tensors of (jobs, dim)."""
    dtype = model.x_embedder.weight.dtype
    scaled = None if guidance is None else guidance.to(dtype) * 1000
    embedding = model.time_guidance_embed(sigma.to(dtype) * 1000, scaled)
    scale, shift = model.norm_out.linear(F.silu(embedding)).chunk(2, -1)
    return Modulation(
        model.double_stream_modulation_img(embedding).chunk(6, -1),
        model.double_stream_modulation_txt(embedding).chunk(6, -1),
        model.single_stream_modulation(embedding).chunk(3, -1),
        (shift, scale),
    )


def rope_of(model: Any, positions: Tensor) -> Rope:
    """Rotary angles of (..., tokens, 4) integer coordinates (time, row, column, sequence), each less than REACH from 0.

    A model with fewer axes (FLUX.1 has no sequence) leaves the last ones out.
    """
    tables = _turns(float(model.pos_embed.theta), tuple(model.pos_embed.axes_dim), positions.device)
    turns = [table[positions[..., axis] + REACH] for axis, table in enumerate(tables)]
    return torch.cat(turns, -1).unsqueeze(-2)


@lru_cache(maxsize=16)
def _turns(theta: float, dims: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """For each axis exp(i angle) of the coordinates from -REACH on, (2 REACH, dim // 2) complex64: taken in float64, once, as
    sines for every token would be a few per cent of a step. On the CPU, as threads with streams of their own share them, and a
    copy from there is whole when it returns.
    """
    with torch.inference_mode(False):
        places = torch.arange(-REACH, REACH, dtype=torch.float64)
        rates = [theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim) for dim in dims]
        angles = [places[:, None] * rate for rate in rates]
        return tuple(torch.polar(torch.ones_like(angle), angle).to(torch.complex64).to(device) for angle in angles)


def denoise(
    model: Flux2Transformer2DModel, image: Tensor, text: Tensor, modulation: Modulation, rope: Rope, layout: Layout
) -> Tensor:
    """Velocity (..., N, out_channels) of the image tokens.

    image: (..., N, in_channels), text: (..., T, joint_attention_dim); rope and modulation.single over the joined tokens.
    """
    image, text = model.x_embedder(image), model.context_embedder(text)
    layer, eps = 0, model.config.eps
    for block in model.transformer_blocks:
        image, text = _double(block, layer, image, text, modulation, rope, layout, eps)
        layer += 1
    joined = layout.join(text, image)
    for block in model.single_transformer_blocks:
        joined = _single(block, layer, joined, modulation.single, rope, layout, eps)
        layer += 1
    shift, scale = modulation.out
    return model.proj_out(normalize(layout.split(joined)[1], shift, scale, model.norm_out.norm.eps))


def encode_reference(model: Flux2Transformer2DModel, image: Tensor, modulation: Modulation, rope: Rope, layout: Layout) -> None:
    """Run reference tokens (..., R, in_channels) through all layers.

    They see only each other, so nothing but them is needed; what is wanted, their keys and values, `layout.attend` keeps.
    """
    image, layer, eps = model.x_embedder(image), 0, model.config.eps
    for block in model.transformer_blocks:
        qk, v = image_heads(block.attn, normalize(image, modulation.image[0], modulation.image[1], eps))
        q, k = rotate(qk, rope).chunk(2, -2)
        out = layout.attend(layer, q, k, v).flatten(-2)
        image = after_attention(image, block.attn.to_out[0](out), block.ff, modulation.image, eps)
        layer += 1
    for block in model.single_transformer_blocks:
        image = _single(block, layer, image, modulation.single, rope, layout, eps)
        layer += 1


def _double(
    block: Any, layer: int, image: Tensor, text: Tensor, modulation: Modulation, rope: Rope, layout: Layout,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    attn = block.attn
    seen_image = normalize(image, modulation.image[0], modulation.image[1], eps)
    seen_text = normalize(text, modulation.text[0], modulation.text[1], eps)
    out_text, out_image = joint_attention(attn, layer, seen_text, seen_image, rope, layout)
    image = after_attention(image, attn.to_out[0](out_image), block.ff, modulation.image, eps)
    text = after_attention(text, attn.to_add_out(out_text), block.ff_context, modulation.text, eps)
    return image, text


def joint_attention(attn: Any, layer: int, text: Tensor, image: Tensor, rope: Rope, layout: Layout) -> tuple[Tensor, Tensor]:
    """Attention of a double block over both streams, each with its own projections; before the output's projections."""
    of_text, of_image = _text_heads(attn, text), image_heads(attn, image)
    qk, v = (layout.join(t, i, -3) for t, i in zip(of_text, of_image, strict=True))
    q, k = rotate(qk, rope).chunk(2, -2)
    return layout.split(layout.attend(layer, q, k, v).flatten(-2))


def _single(
    block: Any,
    layer: int,
    x: Tensor,
    modulation: tuple[Tensor, ...],
    rope: Rope,
    layout: Layout,
    eps: float,
) -> Tensor:
    attn = block.attn
    shift, scale, gate = modulation
    wide = attn.to_qkv_mlp_proj(normalize(x, shift, scale, eps))
    qk, v, gated, linear = wide.split([2 * attn.inner_dim, attn.inner_dim, attn.mlp_hidden_dim, attn.mlp_hidden_dim], -1)
    q, k = rotate(norm_heads(qk, attn.norm_q, attn.norm_k), rope).chunk(2, -2)
    out = layout.attend(layer, q, k, v.unflatten(-1, (attn.heads, -1))).flatten(-2)
    return torch.addcmul(x, gate, attn.to_out(torch.cat([out, F.silu(gated) * linear], -1)))


def image_heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Normalized queries and keys side by side, (..., tokens, 2 heads, head_dim), and values."""
    qk = torch.cat([attn.to_q(x), attn.to_k(x)], -1)
    return norm_heads(qk, attn.norm_q, attn.norm_k), attn.to_v(x).unflatten(-1, (attn.heads, -1))


def _text_heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    qk = torch.cat([attn.add_q_proj(x), attn.add_k_proj(x)], -1)
    return norm_heads(qk, attn.norm_added_q, attn.norm_added_k), attn.add_v_proj(x).unflatten(-1, (attn.heads, -1))


def norm_heads(qk: Tensor, of_q: Any, of_k: Any) -> Tensor:
    """RMS norm of queries and keys in one go: (..., 2 heads * head_dim) -> (..., 2 heads, head_dim)."""
    dim = len(of_q.weight)
    heads = qk.unflatten(-1, (2, -1, dim))
    weight = torch.stack([of_q.weight, of_k.weight]).unsqueeze(1)
    return (F.rms_norm(heads, (dim,), eps=of_q.eps) * weight).flatten(-3, -2)


def after_attention(x: Tensor, out: Tensor, ff: Any, modulation: tuple[Tensor, ...], eps: float) -> Tensor:
    """The gated residual of attention, then the feed-forward half of a double block, for either stream."""
    gate, shift_ff, scale_ff, gate_ff = modulation[2:]
    x = torch.addcmul(x, gate, out)
    return torch.addcmul(x, gate_ff, ff(normalize(x, shift_ff, scale_ff, eps)))


def normalize(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rope).flatten(-2).to(x.dtype)
