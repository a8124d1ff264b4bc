"""Models of random weights: speed depends on shapes alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinKVPipeline, Flux2Transformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM

from retouch.edit import InvalidOption
from retouch.models import checkpoint
from retouch.models.checkpoint import Family
from retouch.models.families import adapter_of
from retouch.models.flux2 import Flux2
from retouch.train.text import build_tokenizer


@dataclass(frozen=True, slots=True)
class Shape:
    """`side` is that of its documents in pixels; `note` goes into every row."""

    transformer: dict[str, Any]
    text_encoder: dict[str, Any]
    side: int
    note: str
    vae: dict[str, Any] = field(default_factory=dict)
    pad_prompts: bool = False
    needs_cuda: bool = False


SHAPES = {
    "tiny": Shape(
        transformer={
            "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 48, "timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4),
        },
        text_encoder={
            "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
        },
        vae={
            "block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2,
            "mid_block_add_attention": False,
        },
        side=128,
        note="random weights, a smoke test",
    ),
    "klein-4b": Shape(
        transformer={
            "in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128, "num_attention_heads": 24,
            "joint_attention_dim": 7680, "mlp_ratio": 3.0, "axes_dims_rope": (32, 32, 32, 32),
        },
        text_encoder={
            "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128,
        },
        side=1024,
        note="FLUX.2-klein-4B shape, random weights; prompts of 512 tokens from a random Qwen3 of 3 layers instead of 36",
        pad_prompts=True,
        needs_cuda=True,
    ),
}  # fmt: skip


def of_checkpoint(name: str, device: torch.device, dtype: torch.dtype) -> Flux2:
    """A checkpoint's modules as diffusers reads them, with nothing done to them. Raises UnknownCheckpoint, CheckpointMismatch,
    InvalidOption.
    """
    path = checkpoint.find(name)
    pipeline, family = checkpoint.read(path, dtype)
    made = adapter_of(family)(pipeline.to(device), family, path.name)
    if not isinstance(made, Flux2):
        raise InvalidOption(f"{name} is no FLUX.2 checkpoint, as this bench wants; python bench/families.py has the others.")
    return made


def build(name: str, device: torch.device, dtype: torch.dtype) -> Flux2:
    """Raises InvalidOption where the shape needs a GPU that is not there."""
    shape = SHAPES[name]
    if shape.needs_cuda and device.type != "cuda":
        raise InvalidOption(f"--shape {name} needs a CUDA device and this is {device}; run it on a GPU, or leave --shape out.")
    tokenizer = build_tokenizer()
    usual = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with device:
            transformer = Flux2Transformer2DModel(guidance_embeds=False, **shape.transformer)
            vae = AutoencoderKLFlux2(**shape.vae)
            config = Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=3, tie_word_embeddings=True, **shape.text_encoder)
            text_encoder = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(usual)
    pipeline = Flux2KleinKVPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), transformer=transformer, vae=vae,
        text_encoder=text_encoder, tokenizer=tokenizer,
    )  # fmt: skip
    family = Family(
        cached=True, masked=True, out_layers=(1, 2, 3), pad_prompts=shape.pad_prompts, max_side=max(shape.side, 512)
    )
    return Flux2(pipeline.to(device), family, f"{name} of random weights")
