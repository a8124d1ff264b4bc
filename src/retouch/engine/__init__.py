"""The engine, and `load`, the way to one."""

from __future__ import annotations

import hashlib
import logging

import torch

from retouch.edit import InvalidOption
from retouch.engine.engine import Engine
from retouch.models import checkpoint
from retouch.models.dtype import choose
from retouch.models.flux2 import Flux2, Options

log = logging.getLogger(__name__)

__all__ = ["Engine", "load"]


def load(model: str = "retouch-mini", dtype: str = "auto", device: str = "auto", options: Options | None = None) -> Engine:
    """An engine on a bundled checkpoint, a directory or a hub name.

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
    return Engine(Flux2(pipeline.to(place), family, fingerprint, options or Options()))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidOption(f"device {name!r} is not here: {' '.join(str(error).split())[:200]} Give auto or cpu.") from error
    return device
