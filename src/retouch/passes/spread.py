"""A denoiser that does not fit one device, its layers on several: activations go to a layer's device and back.

Linear layers and convolutions, which hold nearly all weights and which every adapter calls as modules, are cut in their order
into shares of about equal bytes. All else (norms, embeddings of timesteps, attention, the autoencoder, what reads text) is on
the first device. Devices compute one after the other: this buys memory, not speed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from typing import TypeVar

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from retouch.edit import InvalidOption
from retouch.models.adapter import Adapter
from retouch.passes.offload import parts_of

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=Adapter)

MAPS = ("balanced", "auto")
"""Names that accelerate has for shares of equal size."""


def devices_of(name: str, device: torch.device) -> list[torch.device]:
    """All GPUs, `device` first. Raises InvalidOption where there are not several."""
    if name not in MAPS:
        raise InvalidOption(f"device map is {name!r}; give {' or '.join(MAPS)}.")
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if count < 2:
        raise InvalidOption(
            f"a device map spreads a model over several GPUs, and {'one is' if count else 'none are'} to be had with device "
            f"{device}; leave it out, or give offload='stages'."
        )
    first = device.index or 0
    return [torch.device("cuda", index) for index in sorted(range(count), key=lambda index: (index != first, index))]


def spread(model: Model, devices: Sequence[torch.device]) -> Model:
    """The same model over these devices; where they are several, it is in host memory before."""
    if len(devices) == 1:
        return model
    layers = [layer for layer in model.denoiser.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    sizes = [sum(parameter.nbytes for parameter in layer.parameters()) for layer in layers]
    away = set[int]()
    for layer, share in zip(layers, shares(sizes, len(devices)), strict=True):
        if devices[share] != devices[0]:
            add_hook_to_module(layer, AlignDevicesHook(devices[share], io_same_device=True))
            away |= {id(parameter) for parameter in layer.parameters()}  # they are new ones now
    for module in chain.from_iterable(parts_of(model).values()):
        for tensor in chain(module.parameters(), module.buffers()):
            if id(tensor) not in away:
                tensor.data = tensor.data.to(devices[0])
    model.device = devices[0]
    log.info("the denoiser's layers are on %s", ", ".join(map(str, devices)))
    return model


def shares(sizes: Sequence[int], count: int) -> list[int]:
    """Which of `count` shares each belongs to: neighbours together, sums about equal."""
    total, before, found = max(1, sum(sizes)), 0, []
    for size in sizes:
        found.append(min(count - 1, (before + size // 2) * count // total))
        before += size
    return found
