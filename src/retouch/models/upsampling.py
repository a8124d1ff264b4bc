"""Upsampling and the convolution after it as one transposed convolution: 4 of its 9 products, and no picture of repeated pixels
in between.

A convolution of 3 x 3 after each pixel was repeated into 2 x 2 multiplies the same pixel by several weights. Their sums are
taken once, here. In one dimension, of an even pixel w0 falls on the one before, and w1 + w2 on its own; of an odd one w0 + w1
on its own, and w2 on the one after: a transposed convolution with stride 2 by (w2, w1 + w2, w0 + w1, w0). Rounding differs,
nothing else does. Source: Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?" (arXiv:1609.07009),
section 2, read backwards.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

SUMS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))
"""The transposed convolution's four weights, of the convolution's three."""


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
    return (
        torch.einsum("oiyx,py,qx->iopq", weight.float(), sums, sums)
        .to(weight.dtype)
        .contiguous(memory_format=torch.channels_last)
    )


def folds(module: Any) -> bool:
    """Whether it repeats pixels, and convolves them with 3 x 3 weights; nothing else."""
    if not isinstance(module, Upsample2D) or not isinstance(conv := getattr(module, "conv", None), nn.Conv2d):
        return False
    plain = module.interpolate and module.norm is None and not module.use_conv_transpose
    return plain and (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((3, 3), (1, 1), (1, 1), 1)
