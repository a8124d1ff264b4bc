"""Which adapter runs a checkpoint: one file a family, imported when it is asked for."""

from __future__ import annotations

import importlib

from retouch.models.adapter import Adapter
from retouch.models.checkpoint import Family

ADAPTERS = {"flux1": "Flux1", "flux2": "Flux2", "qwen": "Qwen", "sdxl": "StableDiffusion"}
"""Module of this room -> the class in it."""


def adapter_of(family: Family) -> type[Adapter]:
    module = importlib.import_module(f"retouch.models.{family.adapter}")
    found: type[Adapter] = getattr(module, ADAPTERS[family.adapter])
    return found
