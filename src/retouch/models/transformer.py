"""FLUX.2's transformer over any subset of positions, written against the modules of `diffusers.Flux2Transformer2DModel`.

The functions are agnostic of layout: tokens lie on axis -2 of (tokens, dim) when packed and of (edits, tokens, dim) when
padded, modulation broadcasts against them, and attention is a callable that knows which tokens see which. Serving packs
(`packing.py`), training pads (`train/flow.py`); the arithmetic is this one file.

Source: Flux2Transformer2DModel in diffusers 0.42, after https://github.com/black-forest-labs/flux2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import Flux2Transformer2DModel
from torch import Tensor

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q, k, v) -> attention output; all (..., text + image tokens, heads, head_dim), rotated. Layers count double first."""

Rope = tuple[Tensor, Tensor]
"""cos and sin, (..., tokens, 1, head_dim // 2) each, over text + image tokens, float32."""


class Modulation(NamedTuple):
    """Shift, scale and gate of every normalization of a step; each tensor broadcasts against (..., tokens, dim)."""

    image: tuple[Tensor, ...]
    text: tuple[Tensor, ...]
    single: tuple[Tensor, ...]
    out: tuple[Tensor, ...]

    def gather(self, image: Tensor, text: Tensor) -> Modulation:
        """From one row a job to one row a token: `image`, `text` are the job of each token, (tokens,) int64."""
        joined = torch.cat([text, image])
        return Modulation(
            tuple(m[image] for m in self.image),
            tuple(m[text] for m in self.text),
            tuple(m[joined] for m in self.single),
            tuple(m[image] for m in self.out),
        )


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


def rope_of(model: Flux2Transformer2DModel, positions: Tensor) -> Rope:
    """Rotary angles of (..., tokens, 4) integer coordinates (time, row, column, sequence)."""
    angles = []
    for axis, dim in enumerate(model.pos_embed.axes_dim):
        rates = model.pos_embed.theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
        angles.append(positions[..., axis, None].double() * rates)
    angle = torch.cat(angles, -1).unsqueeze(-2)
    return angle.cos().float(), angle.sin().float()


def denoise(
    model: Flux2Transformer2DModel, image: Tensor, text: Tensor, modulation: Modulation, rope: Rope, attend: Attend
) -> Tensor:
    """Velocity of the image tokens.

    image: (..., N, in_channels), text: (..., T, joint_attention_dim), rope and attention over T + N tokens, text first.
    """
    image, text = model.x_embedder(image), model.context_embedder(text)
    image, text = _blocks(model, image, text, modulation, rope, attend)
    shift, scale = modulation.out
    return model.proj_out(_normalize(image, shift, scale, model.norm_out.norm.eps))


def encode_reference(
    model: Flux2Transformer2DModel, image: Tensor, modulation: Modulation, rope: Rope, attend: Attend
) -> None:
    """Run reference tokens through all layers. They see only each other, so `attend` has all it needs to keep their k and v."""
    image = model.x_embedder(image)
    _blocks(model, image, None, modulation, rope, attend)


def _blocks(
    model: Flux2Transformer2DModel, image: Tensor, text: Tensor | None, modulation: Modulation, rope: Rope, attend: Attend
) -> tuple[Tensor, Tensor | None]:
    layer, eps = 0, model.config.eps
    for block in model.transformer_blocks:
        image, text = _double(block, layer, image, text, modulation, rope, attend, eps)
        layer += 1
    joined = image if text is None else torch.cat([text, image], -2)
    for block in model.single_transformer_blocks:
        joined = _single(block, layer, joined, modulation.single, rope, attend, eps)
        layer += 1
    return joined[..., joined.shape[-2] - image.shape[-2] :, :], text


def _double(
    block: torch.nn.Module, layer: int, image: Tensor, text: Tensor | None, modulation: Modulation, rope: Rope,
    attend: Attend, eps: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    attn = block.attn
    shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation.image
    x = _normalize(image, shift, scale, eps)
    q, k, v = (_heads(attn, x, part) for part in ("q", "k", "v"))
    q, k = attn.norm_q(q), attn.norm_k(k)
    if text is not None:
        t_shift, t_scale, t_gate, t_shift_ff, t_scale_ff, t_gate_ff = modulation.text
        c = _normalize(text, t_shift, t_scale, eps)
        tq, tk, tv = (_heads(attn, c, f"add_{part}_proj") for part in ("q", "k", "v"))
        q = torch.cat([attn.norm_added_q(tq), q], -3)
        k = torch.cat([attn.norm_added_k(tk), k], -3)
        v = torch.cat([tv, v], -3)
    out = attend(layer, _rotate(q, rope), _rotate(k, rope), v).flatten(-2)
    count = out.shape[-2] - image.shape[-2]
    image = torch.addcmul(image, gate, attn.to_out[0](out[..., count:, :]))
    image = torch.addcmul(image, gate_ff, _feed(block.ff, _normalize(image, shift_ff, scale_ff, eps)))
    if text is not None:
        text = torch.addcmul(text, t_gate, attn.to_add_out(out[..., :count, :]))
        text = torch.addcmul(text, t_gate_ff, _feed(block.ff_context, _normalize(text, t_shift_ff, t_scale_ff, eps)))
    return image, text


def _single(
    block: torch.nn.Module, layer: int, x: Tensor, modulation: tuple[Tensor, ...], rope: Rope, attend: Attend, eps: float
) -> Tensor:
    attn = block.attn
    shift, scale, gate = modulation
    wide = attn.to_qkv_mlp_proj(_normalize(x, shift, scale, eps))
    q, k, v, gated, linear = wide.split([attn.inner_dim] * 3 + [attn.mlp_hidden_dim] * 2, -1)
    q, k, v = (part.unflatten(-1, (attn.heads, attn.head_dim)) for part in (q, k, v))
    out = attend(layer, _rotate(attn.norm_q(q), rope), _rotate(attn.norm_k(k), rope), v).flatten(-2)
    return torch.addcmul(x, gate, attn.to_out(torch.cat([out, F.silu(gated) * linear], -1)))


def _heads(attn: torch.nn.Module, x: Tensor, projection: str) -> Tensor:
    linear = getattr(attn, projection if projection.startswith("add") else f"to_{projection}")
    return linear(x).unflatten(-1, (attn.heads, attn.head_dim))


def _feed(ff: torch.nn.Module, x: Tensor) -> Tensor:
    gated, linear = ff.linear_in(x).chunk(2, -1)
    return ff.linear_out(F.silu(gated) * linear)


def _normalize(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)
