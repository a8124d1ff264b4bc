"""LoRA adapters: low-rank additions to a model's linear layers, each edit its own, several in one packed step.

An edit names adapters of a folder and their scales. `adapted` gives a model that folder, from outside: the linear layers that
an adapter changes get a forward of their own which adds `scale * up(down(x))` to those rows whose edit wears it. Which rows
these are travels in a context variable for the time of one call, as documents are encoded in other threads meanwhile. Until an
adapter is read, no layer is touched.

Source: LoRA (https://arxiv.org/abs/2106.09685); many adapters in one batch, as in Punica (https://arxiv.org/abs/2310.18547).
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from torch import Tensor, nn

from retouch.cache.memory import Memory
from retouch.cache.store import Store
from retouch.edit import AdapterMismatch, Edit, InvalidOption, UnknownAdapter
from retouch.models.base import Job, Lora, Worn
from retouch.models.lora_file import read
from retouch.models.packing import Packed

if TYPE_CHECKING:
    from retouch.models.adapter import Adapter

BUDGET = 1 << 30
"""Bytes of adapters that are kept on the device."""

IMAGE, TEXT, JOINED, SEGMENT = "image", "text", "joined", "segment"
"""What a row of a layer's input is: an image or text token, one of both in sequence, or a whole segment."""


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbours in a call that wear the same: their rows, by what a row is, out of a call's `segments`."""

    worn: Worn
    rows: dict[str, slice]
    segments: int


_groups: ContextVar[tuple[Group, ...]] = ContextVar("adapters of the rows of a call", default=())


@contextmanager
def worn(groups: Sequence[Group]) -> Iterator[None]:
    """Inside, this thread's calls of the model add what these groups wear."""
    token = _groups.set(tuple(groups))
    try:
        yield
    finally:
        _groups.reset(token)


def packed(pack: Packed) -> list[Group]:
    """The groups of a step: segments that wear the same lie side by side."""
    if not any(segment.job.worn for segment in pack.segments):
        return []
    groups, first, text, image = [], 0, 0, 0
    rows = zip(pack.segments, pack.own, pack.texts, pack.images, strict=True)
    for _, neighbours in groupby(rows, key=lambda row: row[0].job.frame.adapters):
        segments, own, texts, images = zip(*neighbours, strict=True)
        spans = {
            SEGMENT: slice(first, first + len(segments)), TEXT: slice(text, text + sum(texts)),
            IMAGE: slice(image, image + sum(images)), JOINED: slice(own[0].start, own[-1].stop),
        }  # fmt: skip
        first, text, image = (spans[kind].stop for kind in (SEGMENT, TEXT, IMAGE))
        if segments[0].job.worn:
            groups.append(Group(segments[0].job.worn, spans, len(pack.segments)))
    return groups


def dense(jobs: Sequence[Job]) -> list[Group]:
    """The groups of a batch with one row for each of these jobs."""
    kinds = (SEGMENT, TEXT, IMAGE, JOINED)
    return [Group(job.worn, dict.fromkeys(kinds, slice(i, i + 1)), len(jobs)) for i, job in enumerate(jobs) if job.worn]


def alone(adapters: Worn) -> list[Group]:
    """All rows of a call wear the same."""
    return [Group(adapters, dict.fromkeys((SEGMENT, TEXT, IMAGE, JOINED), slice(None)), 1)] if adapters else []


def chosen(edit: Edit, loras: Loras | None) -> tuple[tuple[str, float, str], ...]:
    """Name, scale and stamp of each that the edit wears. Raises UnknownAdapter, InvalidOption."""
    if not edit.adapters:
        return ()
    if loras is None:
        raise InvalidOption("no adapters are kept here; leave them out, or start with --adapters and a folder of them.")
    return tuple((name, float(scale), loras.stamp(name)) for name, scale in edit.adapters if scale)


def adapted(model: Adapter, pipeline: type, folder: Path, budget: int = BUDGET) -> Adapter:
    """The model with the adapters of a folder to choose from. Raises UnknownAdapter, and InvalidOption for a family without."""
    if not model.adapts:
        raise InvalidOption("this family takes no adapters; leave them out.")
    model.loras = Loras(folder, model.denoiser, pipeline, budget)
    return model


class Loras:
    """A folder of adapters (NAME.safetensors, or NAME/ with one such file in it) for one model.

    Those in use are kept on the device, by bytes. `get` may be called from any thread.
    """

    def __init__(self, folder: Path, denoiser: nn.Module, pipeline: type, budget: int = BUDGET) -> None:
        if not os.path.isdir(folder):  # which, unlike pathlib in Python 3.11, is False for a name that is too long
            raise UnknownAdapter(f"{folder} is no folder; give one with .safetensors files of LoRA adapters.")
        self.folder, self.denoiser, self.pipeline = folder, denoiser, pipeline
        self._store: Store[Lora] = Store(Memory("device", budget))
        self._wrapped: set[str] = set()
        self._wrapping = threading.Lock()

    def names(self) -> list[str]:
        files = {path.stem for path in self.folder.glob("*.safetensors")}
        return sorted(files | {path.parent.name for path in self.folder.glob("*/*.safetensors")})

    def stamp(self, name: str) -> str:
        """What tells this adapter from one that takes its name later. Raises UnknownAdapter, AdapterMismatch."""
        stat = self._file(name).stat()
        return f"{stat.st_size}:{stat.st_mtime_ns}"

    def get(self, name: str, stamp: str) -> Lora:
        """Raises UnknownAdapter, AdapterMismatch."""
        return self._store.get(f"{name}|{stamp}", lambda: self._made(name, stamp))[0]

    def _file(self, name: str) -> Path:
        if re.fullmatch(r"\w[\w.-]*", name):
            if os.path.isfile(path := self.folder / f"{name}.safetensors"):
                return path
            folder = self.folder / name
            files = sorted(folder.glob("*.safetensors")) if os.path.isdir(folder) else []
            if len(files) > 1:
                raise AdapterMismatch(f"adapter {name!r} has {len(files)} .safetensors files; leave one in its folder.")
            if files:
                return files[0]
        raise UnknownAdapter(f"there is no adapter {name!r}; there are {', '.join(self.names()) or 'none'}.")

    def _made(self, name: str, stamp: str) -> Lora:
        try:
            found = read(self._file(name), self.denoiser, self.pipeline)
        except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:  # its header holds anything
            raise AdapterMismatch(f"adapter {name!r} cannot be read ({error}); download it again.") from error
        if self.stamp(name) != stamp:
            raise AdapterMismatch(f"adapter {name!r} was written to while it was read; send the edit again.")
        some = next(self.denoiser.parameters())
        weights = {
            module: (down.to(some.device, some.dtype), up.to(some.device, some.dtype)) for module, (down, up) in found.items()
        }
        with self._wrapping:
            for module in weights.keys() - self._wrapped:
                _wrap(module, self.denoiser.get_submodule(module))
            self._wrapped |= weights.keys()
        return Lora(name, weights)


def _wrap(name: str, layer: nn.Module) -> None:
    """A forward of its own for this one layer: nn.Module looks it up on the instance first."""
    plain, kind = layer.forward, stream(name)

    def forward(x: Tensor) -> Tensor:
        out: Tensor = plain(x)
        for group in _groups.get():
            changes = [(lora.weights[name], scale) for lora, scale in group.worn if name in lora.weights]
            if changes:
                _add(out, x, group, kind, changes)
        return out

    layer.forward = forward


def _add(out: Tensor, x: Tensor, group: Group, kind: str, changes: list[tuple[tuple[Tensor, Tensor], float]]) -> None:
    """out (rows, ..., dim) += scale * up(down(x)) in the group's rows, for each ((down, up), scale)."""
    if kind == SEGMENT:  # a layer may see all segments several times over
        out, x = (t.unflatten(0, (-1, group.segments)).transpose(0, 1) for t in (out, x))
    rows = group.rows[kind]
    assert rows.stop is None or rows.stop <= len(x), "a layer sees other rows than its name says"
    for (down, up), scale in changes:
        out[rows].add_(x[rows] @ down.T @ up.T, alpha=scale)


def stream(name: str) -> str:
    """What a row is to the layer of that name, by the names that diffusers' transformers share."""
    parts = name.split(".")
    if any(part.startswith(("norm", "time")) or part.endswith("_mod") or "modulation" in part for part in parts):
        return SEGMENT
    if parts[0] == "single_transformer_blocks":
        return JOINED
    text = ("add_", "to_add_out", "ff_context", "context_embedder", "txt_")
    return TEXT if any(part.startswith(text) for part in parts) else IMAGE
