"""The compiled decoder: the same pictures but for rounding, beside the model that it was made of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2

import tiny
from retouch.edit import Edit
from retouch.engine import Engine
from retouch.models.flux2 import Flux2
from retouch.models.options import Options
from retouch.passes.compile import compiled

KV = "Flux2KleinKVPipeline"


def test_a_compiled_decoder_makes_the_same_pictures_and_leaves_the_model_alone() -> None:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(4, 4),
        layers_per_block=1, latent_channels=4, norm_num_groups=2, mid_block_add_attention=False,
    )  # fmt: skip
    pipeline = tiny.assembled(KV, {**tiny.parts(), "vae": vae})
    model = Flux2(pipeline, replace(tiny.model(KV).family, max_side=128), options=Options(halo=1, feather=0))
    decoder = model.vae.decoder
    made = compiled(model)
    assert model.vae.decoder is decoder
    assert made.vae.decoder is not decoder
    for height, width in ((64, 96), (112, 80), (16, 48)):
        photo = tiny.photo(height, width)
        mask = np.zeros((height, width), bool)
        mask[20:50, 30:60] = True
        edit = Edit(photo, "a red apple", mask if mask.any() else None)
        with torch._dynamo.config.patch(error_on_recompile=True):  # whatever the size, its code was made beforehand
            plain, fast = (Engine(one).edit([edit])[0].image for one in (model, made))
        assert np.abs(plain.astype(int) - fast.astype(int)).max() <= 1
        assert (plain != photo).any()
