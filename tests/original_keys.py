"""Weights of diffusers' models by the keys of those who made the models: the way back from what diffusers converts."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from retouch.models import flux1_keys

Tensors = dict[str, Tensor]

IN_FLUX2 = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer", "modulation_img.linear": "modulation_img.lin",
    "modulation_txt.linear": "modulation_txt.lin", "stream_modulation.linear": "stream_modulation.lin",
    "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2", "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2", "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale", "attn.to_add_out": "txt_attn.proj",
    "attn.to_qkv_mlp_proj": "linear1",
}  # fmt: skip
IN_UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_out": "out.2",
    "conv_in": "input_blocks.0.0", "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
IN_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
IN_VAE = {
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_out.0": "proj_out", "to_q": "q",
    "to_k": "k", "to_v": "v", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
}  # fmt: skip
IN_OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight", "text_model.final_layer_norm": "ln_final",
    "text_model.embeddings.position_embedding.weight": "positional_embedding", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "text_model.encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn": "attn",
}  # fmt: skip


def _replaced(key: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        key = key.replace(ours, theirs)
    return key


def _fused(weights: Tensors, parts: str, kind: str) -> Tensor:
    """Taken out of `weights`."""
    return torch.cat([weights.pop(f"{name}.{kind}") for name in parts.split()])


def _swapped(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


def flux1(weights: Tensors) -> Tensors:
    """By the tables that are tested; that these say what diffusers says has a test of its own."""
    left, made = dict(weights), Tensors()
    for theirs, (ours, layers) in flux1_keys.BLOCKS.items():
        for number in sorted({key.split(".")[1] for key in weights if key.startswith(f"{ours}.")}):
            for layer, names in layers.items():
                whole = " ".join(f"{ours}.{number}.{name}" for name in names.split())
                for kind in ("weight", "bias"):
                    if f"{whole.split()[0]}.{kind}" in left:
                        said = "scale" if "norm." in layer else kind
                        made[f"{theirs}.{number}.{layer}.{said}"] = _fused(left, whole, kind)
    for key, tensor in left.items():
        inside = next(theirs for theirs, ours in flux1_keys.OUTSIDE.items() if key.startswith(f"{ours}."))
        rest = key.removeprefix(flux1_keys.OUTSIDE[inside]).replace("linear_1", "in_layer").replace("linear_2", "out_layer")
        made[inside + rest] = _swapped(tensor) if inside.endswith("adaLN_modulation.1") else tensor
    return made


def flux2(weights: Tensors) -> Tensors:
    left = dict(weights)
    made = {"final_layer.adaLN_modulation.1.weight": _swapped(left.pop("norm_out.linear.weight"))}
    made["final_layer.linear.weight"] = left.pop("proj_out.weight")
    for number in sorted({key.split(".")[1] for key in weights if key.startswith("transformer_blocks.")}):
        for theirs, ours in (("img", "to_q to_k to_v"), ("txt", "add_q_proj add_k_proj add_v_proj")):
            parts = " ".join(f"transformer_blocks.{number}.attn.{name}" for name in ours.split())
            made[f"double_blocks.{number}.{theirs}_attn.qkv.weight"] = _fused(left, parts, "weight")
    for key, tensor in left.items():
        single = key.startswith("single_transformer_blocks.")
        said = _replaced(key, IN_FLUX2).replace("single_transformer_blocks", "single_blocks")
        said = said.replace("transformer_blocks", "double_blocks").replace("attn.to_out.0", "img_attn.proj")
        said = said.replace("attn.to_out", "linear2")
        norms = "norm." if single else "img_attn.norm."
        for letter, name in (("q", "query"), ("k", "key")):
            said = said.replace(f"attn.norm_{letter}.weight", f"{norms}{name}_norm.scale")
        made[said] = tensor
    return made


def unet(weights: Tensors, layers: int) -> Tensors:
    """Of `layers` in a block."""
    crossed = {key.split(".attentions")[0] for key in weights if key.startswith("up_blocks.") and ".attentions." in key}
    made = Tensors()
    for key, tensor in weights.items():
        if found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key):
            way, block, kind, number, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
            if way == "down":
                index = 1 + block * (layers + 1) + (layers if kind == "downsamplers" else number)
            else:
                index = block * (layers + 1) + (layers if kind == "upsamplers" else number)
            place = {"resnets": "0", "attentions": "1", "downsamplers": "0", "upsamplers": "1"}[kind]
            if kind == "upsamplers" and f"up_blocks.{block}" in crossed:
                place = "2"
            rest = _replaced(rest, IN_RESNET) if kind == "resnets" else rest
            rest = rest.replace("conv.", "op.") if kind == "downsamplers" else rest
            said = f"{'input' if way == 'down' else 'output'}_blocks.{index}.{place}.{rest}"
        else:
            said = _replaced(key, IN_UNET)
            said = _replaced(said, IN_RESNET) if said.startswith(("middle_block.0", "middle_block.2")) else said
        made[said] = tensor
    return made


def autoencoder(weights: Tensors, blocks: int) -> Tensors:
    made = Tensors()
    for key, tensor in weights.items():
        said = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", _replaced(key, IN_VAE))
        said = re.sub(r"down_blocks\.(\d+)", r"down.\1", said)
        said = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{blocks - 1 - int(m[1])}", said).replace(".resnets.", ".block.")
        made[said] = tensor[..., None, None] if ".attn_1." in said and tensor.ndim == 2 else tensor
    return made


def open_clip(weights: Tensors) -> Tensors:
    left = dict(weights)
    made = {"text_projection": left.pop("text_projection.weight").T.contiguous()}
    for number in sorted({key.split(".")[3] for key in weights if ".layers." in key}):
        layer = f"text_model.encoder.layers.{number}.self_attn"
        for kind in ("weight", "bias"):
            parts = " ".join(f"{layer}.{name}_proj" for name in "qkv")
            made[f"transformer.resblocks.{number}.attn.in_proj_{kind}"] = _fused(left, parts, kind)
    return made | {_replaced(key, IN_OPEN_CLIP): tensor for key, tensor in left.items()}
