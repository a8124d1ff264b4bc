"""The decoder compiled by torch.compile: its norms and activations are fused, its convolutions stay the library's.

A packed step of the transformer on a CPU is products and attention for the most part; compiling its blocks brought nothing
there, so that they are left as they are. Rounding differs, nothing else does.
"""

from __future__ import annotations

import logging
import time
from copy import copy
from typing import TypeVar

import torch

from retouch.models.adapter import Adapter
from retouch.passes.fold import shallow

log = logging.getLogger(__name__)

WARM = tuple(
    (rows << at, columns << at) for at in range(6) for rows, columns in ((2, 3), (2, 4), (2, 5), (3, 4), (3, 5), (3, 6))
)
"""Rows and columns of latents that are decoded before the first edit. Code is made for any shape, but several times: torch runs
convolutions of up to 20,480 numbers by another kernel, which each layer comes to at an area of its own. These areas are a third
apart.
"""

FORMS = 64
"""How often code may be made of one decoder; torch's own limit is 8, after which it would silently run without."""

Model = TypeVar("Model", bound=Adapter)


def compiled(model: Model) -> Model:
    """The same model with a decoder of its own that is compiled, which takes a minute or two. `model` stays as it is."""
    made = copy(model)
    made.vae = shallow(model.vae)
    made.vae.decoder = torch.compile(model.vae.decoder, dynamic=True)
    started = time.perf_counter()
    with torch._dynamo.config.patch(recompile_limit=FORMS):
        made.warm(WARM)
    log.info("the decoder is compiled, in %.0f s", time.perf_counter() - started)
    return made
