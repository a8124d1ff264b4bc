"""From the keys of Black Forest Labs' FLUX.1 files to those of `diffusers.FluxTransformer2DModel`.

diffusers' own conversion copies every fused matrix, knows one width alone, and lets keys that it does not know fall away. A
fused matrix holds its parts row after row, so that they are views of it here, and stay in the mapped file.

Source of the names: https://github.com/black-forest-labs/flux (model.py) and diffusers 0.42 (single_file_utils.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

OUTSIDE = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear", "time_in": "time_text_embed.timestep_embedder",
    "vector_in": "time_text_embed.text_embedder", "guidance_in": "time_text_embed.guidance_embedder",
}  # fmt: skip

DOUBLE = {
    "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear", "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out", "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj", "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k", "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k", "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
}  # fmt: skip
"""Of a double block; several names are parts of one fused matrix, in its order."""

SINGLE = {
    "modulation.lin": "norm.linear", "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp", "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k",
}  # fmt: skip

BLOCKS = {"double_blocks": ("transformer_blocks", DOUBLE), "single_blocks": ("single_transformer_blocks", SINGLE)}


def renamed(stored: dict[str, Tensor], module: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by the names of `module`, and the keys that name nothing in it."""
    wanted, made, extra = module.state_dict(), dict[str, Tensor](), list[str]()
    for key, tensor in stored.items():
        names = _names(key)
        rows = [wanted[name].shape[0] for name in names if name in wanted]
        if not names or len(rows) < len(names):
            extra.append(key)
        elif len(names) == 1:
            made[names[0]] = _swapped(tensor) if names[0].startswith("norm_out.") else tensor
        elif sum(rows) == len(tensor):
            made |= zip(names, tensor.split(rows), strict=True)
        else:  # of another width: the shape that is found is said
            made |= zip(names, tensor.chunk(len(names)), strict=False)
    return made, extra


def _names(key: str) -> list[str]:
    """What one tensor of a file is called in diffusers; several names where it is fused, none where the key is unknown."""
    inside, _, kind = key.rpartition(".")
    kind = "weight" if kind == "scale" else kind
    stack, _, rest = inside.partition(".")
    if stack in BLOCKS:
        number, _, layer = rest.partition(".")
        blocks, layers = BLOCKS[stack]
        return [f"{blocks}.{number}.{name}.{kind}" for name in layers.get(layer, "").split()]
    if rest in ("in_layer", "out_layer"):
        return [f"{OUTSIDE[stack]}.linear_{1 if rest == 'in_layer' else 2}.{kind}"] if stack in OUTSIDE else []
    return [f"{OUTSIDE[inside]}.{kind}"] if inside in OUTSIDE else []


def _swapped(tensor: Tensor) -> Tensor:
    """Shift and scale of the last normalization are scale and shift in diffusers."""
    return torch.cat(tensor.chunk(2)[::-1])
