"""`load`: from a checkpoint's name to an engine."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from retouch.cache.disk import Disk
from retouch.cache.store import Memory, Store
from retouch.edit import InvalidOption
from retouch.engine.engine import MEMORY, Engine
from retouch.engine.savings import SAVINGS
from retouch.engine.savings import check as check_savings
from retouch.engine.scheduler import POLICIES
from retouch.models import checkpoint, codec, lora
from retouch.models.base import Document, Prompt
from retouch.models.dtype import choose
from retouch.models.families import adapter_of
from retouch.models.options import Options
from retouch.passes.compile import compiled

log = logging.getLogger(__name__)

DISK = 8 << 30
"""Bytes of encoded documents kept in a cache folder; prompts take an eighth of it beside them."""


def load(
    model: str = "retouch-mini", dtype: str = "auto", device: str = "auto", options: Options | None = None,
    cache: Path | None = None, policy: str = "first-come", tokens: int | None = None, queue: int = 1000,
    beside: int | None = None, memory: int = MEMORY, host: int = 0, disk: int = DISK, savings: tuple[str, ...] = SAVINGS,
    adapters: Path | None = None, compile: bool = False,
) -> Engine:  # fmt: skip
    """An engine on a bundled checkpoint, a directory or a hub name.

    `memory`, `host` and `disk` are bytes of encoded documents kept on the device, in host memory, and in the folder `cache`,
    where one is given: what lies there outlives the engine. `beside` threads encode and decode beside the loop: by default
    one on a GPU; on a CPU none, as they would only take its cores from the step. `savings` are those of `savings.SAVINGS` that
    are to be had; the others are left off, whatever else is said. `adapters` is a folder of LoRA adapters that edits may wear.
    `compile`: take a minute or two to compile the decoder (passes/compile.py).

    Raises UnknownCheckpoint, CheckpointMismatch, UnknownAdapter, and InvalidOption for a policy, dtype or device that is not
    there.
    """
    if policy not in POLICIES:
        raise InvalidOption(f"policy is {policy!r}; give one of {', '.join(POLICIES)}.")
    check_savings(savings)
    place = _device(device)
    path = checkpoint.find(model)
    chosen = choose(dtype, place)
    pipeline, family = checkpoint.read(path, chosen)
    log.info("%s: %s on %s in %s", path.name, type(pipeline).__name__, place, str(chosen).removeprefix("torch."))
    served = adapter_of(family)(pipeline.to(place), family, _fingerprint(path), _computed(options or Options(), savings))
    if adapters is not None:
        lora.adapted(served, type(pipeline), adapters)
    if compile:
        served = compiled(served)
    documents: Store[Document] = Store(Memory("device", memory))
    prompts: Store[Prompt] = Store(Memory("device", memory // 8))
    if cache is not None:
        tier = Disk(cache / "documents", disk, codec.dump_document, partial(codec.load_document, device=place))
        words = Disk(cache / "prompts", disk // 8, codec.dump_prompt, partial(codec.load_prompt, device=place))
        documents, prompts = Store(*documents.tiers, tier), Store(*prompts.tiers, words)
    if host:
        move, back = partial(codec.moved, device=torch.device("cpu")), partial(codec.moved, device=place)
        documents = Store(documents.tiers[0], Memory("host", host, move, back), *documents.tiers[1:])
    if "documents" not in savings:
        documents = Store(Memory("device", 0))
    if "prompts" not in savings:
        prompts = Store(Memory("device", 0))
    tokens = tokens if "packing" in savings else 1  # of which every step takes one edit
    threads = int(place.type == "cuda") if beside is None else beside
    return Engine(served, POLICIES[policy](), tokens, queue, documents, prompts, Store(Memory("host", memory // 8)), threads)


def _computed(options: Options, savings: tuple[str, ...]) -> Options:
    return options if "mask" in savings else replace(options, whole=True, halo=None, refresh=None, context=None)


def _fingerprint(path: Path) -> str:
    files = sorted(p for p in path.rglob("*") if p.suffix in (".json", ".safetensors"))
    stamp = "|".join(f"{p.relative_to(path)}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files)
    return hashlib.blake2b(stamp.encode(), digest_size=16).hexdigest()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidOption(f"device {name!r} is not here: {' '.join(str(error).split())[:200]} Give auto or cpu.") from error
    return device
