"""Tiny FLUX.2 pipelines with random weights, made on the spot."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinInpaintPipeline,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen3Config, Qwen3ForCausalLM

from retouch.models.checkpoint import FAMILIES, Family
from retouch.models.flux2 import Flux2
from retouch.models.options import Options
from retouch.train.text import build_tokenizer

LAYERS = (1, 2, 3)
PIPELINES = {c.__name__: c for c in (Flux2KleinKVPipeline, Flux2KleinPipeline, Flux2KleinInpaintPipeline, Flux2Pipeline)}


@lru_cache
def parts(guidance_embeds: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    if guidance_embeds:  # dev's messages hold lists of typed parts
        tokenizer.chat_template = (
            "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
        )
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, initializer_range=0.5,
    )  # fmt: skip
    encoder = Qwen3ForCausalLM(config)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    for parameter in transformer.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return {
        "scheduler": scheduler, "vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "transformer": transformer,
    }  # fmt: skip


def pipeline(name: str, **extra: Any) -> Any:
    return assembled(name, parts(guidance_embeds=name == "Flux2Pipeline"), **extra)


def assembled(name: str, of: dict[str, Any], **extra: Any) -> Any:
    """The stock pipeline `name` of given parts, with the attention processors it needs."""
    made = PIPELINES[name](**of, **extra)
    made.set_progress_bar_config(disable=True)
    if not name.endswith("KVPipeline"):
        from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor

        for block in made.transformer.transformer_blocks:
            block.attn.set_processor(Flux2AttnProcessor())
        for block in made.transformer.single_transformer_blocks:
            block.attn.set_processor(Flux2ParallelSelfAttnProcessor())
    return made


def model(name: str, family: dict[str, Any] | None = None, options: Options | None = None, **extra: Any) -> Flux2:
    settings = {"cached": name.endswith("KVPipeline"), "out_layers": LAYERS, "pad_prompts": False, "max_side": 512}
    if name == "Flux2Pipeline":
        settings |= {"embeds_guidance": True, "guidance": 4.0, "max_sequence_length": 400}
    return Flux2(
        pipeline(name, **extra),
        Family(**{**settings, "masked": True, **(family or {})}),
        name,
        options or Options(halo=None, feather=0),
    )


def of_family(name: str, options: Options, **family: Any) -> Any:
    """A model of any pipeline class in FAMILIES, as its family's own tests make it; its weights are its own, and the same each
    time.
    """
    made_in = importlib.import_module("tiny" if name in PIPELINES else f"test_{FAMILIES[name].adapter}")
    made_in.parts.cache_clear()
    try:
        if name in PIPELINES:
            return model(name, family, options)
        extra = family if FAMILIES[name].adapter != "sdxl" else {}
        return made_in.model(*(() if extra is family else (9,)), name=name, options=options, **extra)
    finally:
        made_in.parts.cache_clear()


def photo(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    """A smooth random picture, (height, width, channels) uint8."""
    rng = np.random.default_rng(seed)
    small = rng.uniform(0, 255, (height // 16 + 2, width // 16 + 2, channels))
    big = small.repeat(16, 0).repeat(16, 1)[:height, :width]
    return (0.5 * big + 0.5 * np.roll(big, 7, (0, 1))).astype(np.uint8)
