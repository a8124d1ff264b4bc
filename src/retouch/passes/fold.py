"""A decoder whose upsampling and the convolution after it are one transposed convolution (models/upsampling.py)."""

from __future__ import annotations

import logging
from copy import copy
from typing import Any, TypeVar

from retouch.models.adapter import Adapter
from retouch.models.upsampling import Folded, folds

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=Adapter)


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


def with_folded(module: Any) -> tuple[Any, int]:
    """The module with each `Upsample2D` that repeats pixels and convolves in a folded form, and how many there are of them.

    What has none is the same object.
    """
    if folds(module):
        return Folded(module.conv), 1
    parts = {name: with_folded(part) for name, part in module.named_children()}
    count = sum(found for _, found in parts.values())
    if not count:
        return module, 0
    made = shallow(module)
    made._modules |= {name: part for name, (part, _) in parts.items()}
    return made, count


def shallow(module: Any) -> Any:
    """A module's copy with a table of its own of the same parts."""
    made = copy(module)
    made._modules = dict(module._modules)
    return made
