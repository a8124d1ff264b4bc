"""Upsampling folded into its convolution: the same numbers, in any family that has such a decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.upsampling import Upsample2D

import tiny
from retouch.edit import Edit
from retouch.engine import Engine
from retouch.models.options import Options
from retouch.models.upsampling import Folded
from retouch.passes.fold import folded, with_folded


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (7, 3), (16, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_layer_is_the_layer(height: int, width: int, bias: bool) -> None:
    layer = Upsample2D(6, use_conv=True, out_channels=4, bias=bias).requires_grad_(False).double()
    x = torch.randn(2, 6, height, width, generator=torch.Generator().manual_seed(height), dtype=torch.float64)
    made, count = with_folded(layer)
    assert count == 1
    assert isinstance(made, Folded)
    made.weight.data = made.weight.double()
    assert torch.allclose(made(x), layer(x), atol=1e-6)
    assert made(x).shape == (2, 4, 2 * height, 2 * width)


@pytest.mark.parametrize(
    "layer",
    [
        Upsample2D(4),
        Upsample2D(4, use_conv_transpose=True),
        Upsample2D(4, use_conv=True, kernel_size=1, padding=0),
        Upsample2D(4, use_conv=True, norm_type="ln_norm"),
        torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3)),
    ],
)
def test_other_layers_are_left_alone(layer: torch.nn.Module) -> None:
    made, count = with_folded(layer)
    assert made is layer
    assert count == 0


@pytest.mark.parametrize("name", ["Flux2KleinKVPipeline", "FluxFillPipeline", "StableDiffusionXLInpaintPipeline"])
def test_a_folded_decoder_makes_the_same_pictures_and_leaves_the_model_alone(name: str) -> None:
    model = tiny.of_family(name, Options(halo=1, feather=0))
    decoder = model.vae.decoder
    made = folded(model)
    layers = [module for module in made.vae.decoder.modules() if isinstance(module, Folded)]
    assert len(layers) == sum(isinstance(module, Upsample2D) for module in decoder.modules()) > 0
    assert model.vae.decoder is decoder
    assert not any(isinstance(module, Folded) for module in decoder.modules())
    assert made.vae.decoder.conv_in.weight is decoder.conv_in.weight
    for height, width in ((64, 96), (112, 80)):
        photo = tiny.photo(height, width)
        mask = np.zeros((height, width), bool)
        mask[20:50, 30:60] = True
        plain, fast = (Engine(one).edit([Edit(photo, "a red apple", mask)])[0].image for one in (model, made))
        assert np.abs(plain.astype(int) - fast.astype(int)).max() <= 1
        assert (plain != photo).any()


def test_a_decoder_of_another_kind_stays_what_it_is() -> None:
    model = tiny.of_family("QwenImageEditPipeline", Options())
    assert folded(model) is model
