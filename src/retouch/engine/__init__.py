"""The engine, and `load`, the way to one."""

from __future__ import annotations

import hashlib
import logging
from functools import partial
from pathlib import Path

import torch

from retouch.cache.disk import Disk
from retouch.cache.store import Memory, Store
from retouch.edit import InvalidOption
from retouch.engine.engine import MEMORY, Engine
from retouch.models import checkpoint, codec
from retouch.models.dtype import choose
from retouch.models.flux2 import Flux2, Options

log = logging.getLogger(__name__)

__all__ = ["Engine", "load"]


DISK = 8 << 30
"""Bytes of encoded documents kept in a cache folder; prompts take an eighth of it beside them."""


def load(
    model: str = "retouch-mini", dtype: str = "auto", device: str = "auto", options: Options | None = None,
    cache: Path | None = None,
) -> Engine:  # fmt: skip
    """An engine on a bundled checkpoint, a directory or a hub name. What it encodes outlives it in `cache`, where one is given.

    Raises UnknownCheckpoint, CheckpointMismatch, and InvalidOption for a dtype or device that is not there.
    """
    place = _device(device)
    path = checkpoint.find(model)
    chosen = choose(dtype, place)
    pipeline, family = checkpoint.read(path, chosen)
    log.info("%s: %s on %s in %s", path.name, type(pipeline).__name__, place, str(chosen).removeprefix("torch."))
    files = sorted(p for p in path.rglob("*") if p.suffix in (".json", ".safetensors"))
    stamp = "|".join(f"{p.relative_to(path)}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files)
    fingerprint = hashlib.blake2b(stamp.encode(), digest_size=16).hexdigest()
    served = Flux2(pipeline.to(place), family, fingerprint, options or Options())
    if cache is None:
        return Engine(served)
    documents = Disk(cache / "documents", DISK, codec.dump_document, partial(codec.load_document, device=place))
    prompts = Disk(cache / "prompts", DISK // 8, codec.dump_prompt, partial(codec.load_prompt, device=place))
    return Engine(
        served, documents=Store(Memory("device", MEMORY), documents), prompts=Store(Memory("device", MEMORY // 8), prompts)
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidOption(f"device {name!r} is not here: {' '.join(str(error).split())[:200]} Give auto or cpu.") from error
    return device
