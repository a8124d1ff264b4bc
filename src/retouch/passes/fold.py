"""A decoder whose upsampling and the convolution after it are one transposed convolution: 4 of its 9 products, and no picture
of repeated pixels in between.

A convolution of 3 x 3 after each pixel was repeated into 2 x 2 multiplies the same pixel by several weights. Their sums are
taken once, here. In one dimension, of an even pixel w0 falls on the one before, and w1 + w2 on its own; of an odd one w0 + w1
on its own, and w2 on the one after: a transposed convolution with stride 2 by (w2, w1 + w2, w0 + w1, w0). Rounding differs,
nothing else does. Source: Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?" (arXiv:1609.07009),
section 2, read backwards.
"""

from __future__ import annotations

import logging
from copy import copy
from typing import Any, TypeVar

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from retouch.models.adapter import Adapter

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=Adapter)

SUMS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))
"""The transposed convolution's four weights, of the convolution's three."""


def folded(model: Model) -> Model:
    """The same model with a decoder of its own that is folded, as far as its family's has such layers. `model` stays as it is,
    and shares all other weights.
    """
    decoder, count = with_folded(model.vae.decoder)
    if not count:
        return model
    made = copy(model)
    made.vae = shallow(model.vae)
    made.vae.decoder = decoder
    log.info("the decoder's upsampling is folded into %d convolutions", count)
    return made


def with_folded(module: nn.Module) -> tuple[nn.Module, int]:
    """The module with each `Upsample2D` that repeats pixels and convolves in a folded form, and how many there are of them.

    What has none is the same object.
    """
    if _folds(module):
        return Folded(module.conv), 1
    parts = {name: with_folded(part) for name, part in module.named_children()}
    count = sum(found for _, found in parts.values())
    if not count:
        return module, 0
    made = shallow(module)
    made._modules |= {name: part for name, (part, _) in parts.items()}
    return made, count


class Folded(nn.Module):
    """(B, C, H, W) -> (B, C', 2 H, 2 W), as nearest upsampling and then `conv`, of 3 x 3 with one pixel of zeros around."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(folded_weight(conv.weight.detach()), requires_grad=False)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)


def folded_weight(weight: Tensor) -> Tensor:
    """(C', C, 3, 3) of a convolution -> (C, C', 4, 4) of a transposed one; summed in float32, then rounded once."""
    sums = torch.tensor(SUMS, dtype=torch.float32, device=weight.device)
    return torch.einsum("oiyx,py,qx->iopq", weight.float(), sums, sums).to(weight.dtype).contiguous()


def _folds(module: Any) -> bool:
    if not isinstance(module, Upsample2D) or not isinstance(conv := getattr(module, "conv", None), nn.Conv2d):
        return False
    plain = module.interpolate and module.norm is None and not module.use_conv_transpose
    return plain and (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((3, 3), (1, 1), (1, 1), 1)


def shallow(module: Any) -> Any:
    """A module's copy with a table of its own of the same parts."""
    made = copy(module)
    made._modules = dict(module._modules)
    return made
