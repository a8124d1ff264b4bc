"""The decoder compiled by torch.compile: its norms and activations are fused, its convolutions stay the library's.

A packed step of the transformer on a CPU is products and attention for the most part; compiling its blocks brought nothing
there, so that they are left as they are. Rounding differs, nothing else does.
"""

from __future__ import annotations

import logging
import time
from copy import copy
from typing import TypeVar

import numpy as np
import torch

from retouch.models.adapter import Adapter
from retouch.passes.fold import shallow

log = logging.getLogger(__name__)

WARM = ((6, 7), (9, 8), (16, 16))
"""Rows and columns of cells that are decoded before the first edit: from the second shape on, code for any shape is made."""

Model = TypeVar("Model", bound=Adapter)


def compiled(model: Model) -> Model:
    """The same model with a decoder of its own that is compiled, which takes a minute or two. `model` stays as it is."""
    made = copy(model)
    made.vae = shallow(model.vae)
    made.vae.decoder = torch.compile(model.vae.decoder, dynamic=True)
    started = time.perf_counter()
    for rows, columns in WARM:
        made.through(np.zeros((rows * made.cell, columns * made.cell, 3), np.uint8))
    log.info("the decoder is compiled, in %.0f s", time.perf_counter() - started)
    return made
