"""Parts of a model that do not fit its device together: each is there while its stage runs, and in host memory else.

The parts are the denoiser, the autoencoder, and what reads text. One of them at a time is on the device; it stays there until
another one is wanted, so that steps that follow each other move nothing. Weights never change, so that on the way back nothing
is copied: the host's tensors, pinned where the device is a CUDA one, are kept, and the device's are let go.

Stages of several threads take turns, in the order in which they come, and end with what they gave the device done, so that no
kernel reads a part that is let go. What a stage works with is told by the adapter's own hooks (`ASKS`), and else by the modules
that are called. The idea of stages is that of diffusers' `enable_model_cpu_offload`.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from retouch.models.adapter import Adapter
from retouch.models.base import Frame, Worn

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=Adapter)

STAGES = ("encode_document", "encode_prompt", "start", "step", "finish", "preview", "decode", "warm")
"""Methods of an adapter that compute."""

ASKS = {"_read": "text", "_encode": "autoencoder", "_latents": "autoencoder", "_pixels": "autoencoder", "_denoise": "denoiser"}
"""Method -> the part that it works with from its first line on."""


def offloaded(model: Model, device: torch.device) -> Model:
    """The same model with one part at a time on `device`. `model` is in host memory, and not to be used further: both have the
    same modules.
    """
    made, parts = copy(model), parts_of(model)
    made.device = device
    stages = Stages(parts, device)
    for name in STAGES:
        setattr(made, name, partial(stages.run, made.synchronize, getattr(made, name)))
    for name, part in ASKS.items():
        setattr(made, name, partial(_asking, stages, part, getattr(made, name)))
    setattr(made, "worn", partial(_worn, stages, made.worn))  # noqa: B010
    for name, modules in parts.items():
        for module in chain.from_iterable(module.modules() for module in modules):
            module.register_forward_pre_hook(partial(_called, stages, name))
    sizes = {name: sum({id(host): host.nbytes for host in hosts}.values()) for name, hosts in stages.hosts.items()}
    told = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in sizes.items())
    log.info("one at a time on %s: %s", device, told)
    return made


def parts_of(model: Adapter) -> dict[str, list[nn.Module]]:
    """Whatever modules an adapter holds, in lists too; what is neither denoiser nor autoencoder reads text."""
    found: list[nn.Module] = []
    _collect(list(vars(model).values()), found)
    text = [module for module in found if module is not model.denoiser and module is not model.vae]
    return {"denoiser": [model.denoiser], "autoencoder": [model.vae], "text": text}


def _collect(value: Any, found: list[nn.Module]) -> None:
    if isinstance(value, nn.Module) and all(value is not other for other in found):
        found.append(value)
    elif isinstance(value, list | tuple):
        for one in value:
            _collect(one, found)


def slots_of(modules: list[nn.Module]) -> list[tuple[dict[str, Any], str]]:
    """Where modules hold their parameters and buffers: a table of a module's, and the name in it."""
    inner = [one for module in modules for one in module.modules()]
    tables = [table for one in inner for table in (one._parameters, one._buffers)]
    return [(table, name) for table in tables for name, tensor in table.items() if tensor is not None]


def _asking(stages: Stages, part: str, method: Callable[..., Any], *args: Any) -> Any:
    stages.bring(part)
    return method(*args)


def _called(stages: Stages, part: str, module: nn.Module, args: Any) -> None:
    stages.bring(part)


def _worn(stages: Stages, worn: Callable[[Frame], Worn], frame: Frame) -> Worn:
    """Adapters are read onto the device of the layers that they go beside."""
    if frame.adapters:
        stages.bring("denoiser")
    return worn(frame)


class Stages:
    """Whose turn it is, and which part is on the device. `run` may be called from any thread, `bring` inside of it."""

    def __init__(self, parts: dict[str, list[nn.Module]], device: torch.device) -> None:
        self.device, self.here = device, ""
        self.slots = {name: slots_of(modules) for name, modules in parts.items()}
        self.hosts = {name: _hosts(slots, device) for name, slots in self.slots.items()}
        self._turns: deque[object] = deque()
        self._owner = 0
        self._changed = threading.Condition()

    def run(self, synchronize: Callable[[], None], method: Callable[..., Any], *args: Any) -> Any:
        """`method` with nobody else's beside it; one that is called by another is in the same turn."""
        if self._owner == threading.get_ident():
            return method(*args)
        with self._turn():
            try:
                return method(*args)
            finally:
                synchronize()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        mine = object()
        with self._changed:
            self._turns.append(mine)
            self._changed.wait_for(lambda: self._turns[0] is mine)
        self._owner = threading.get_ident()
        try:
            yield
        finally:
            self._owner = 0
            with self._changed:
                self._turns.popleft()
                self._changed.notify_all()

    def bring(self, part: str) -> None:
        """Onto the device, the one before it off."""
        if part == self.here:
            return
        log.debug("%s in the place of %s", part, self.here or "nothing")
        with torch.inference_mode(False):
            if self.here:
                _fill(self.slots[self.here], self.hosts[self.here])
                self.here = ""
            _fill(self.slots[part], _each(self.hosts[part], lambda host: host.to(self.device, non_blocking=True)))
        self.here = part


def _fill(slots: list[tuple[dict[str, Any], str]], tensors: list[Tensor]) -> None:
    for (table, name), tensor in zip(slots, tensors, strict=True):
        table[name] = tensor


def _hosts(slots: list[tuple[dict[str, Any], str]], device: torch.device) -> list[Tensor]:
    """What is in the slots, which hold it further on: for a CUDA device in pinned memory, which it reads at full speed; as it
    is where the system does not give so much of that.
    """
    hosts = [table[name] for table, name in slots]
    if device.type == "cuda":
        try:
            hosts = _each(hosts, Tensor.pin_memory)
        except RuntimeError as error:
            log.warning("weights are moved from unpinned memory, which is slower (%s)", " ".join(str(error).split())[:120])
    _fill(slots, hosts)
    return hosts


def _each(tensors: list[Tensor], made: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What is made of each, parameters of parameters; one that is there several times is made once."""
    found: dict[int, Tensor] = {}
    for tensor in tensors:
        if id(tensor) not in found:
            data = made(tensor.detach())
            found[id(tensor)] = nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data
    return [found[id(tensor)] for tensor in tensors]
