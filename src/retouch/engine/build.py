"""`load`: from a checkpoint's name to an engine."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from retouch.cache.disk import Disk
from retouch.cache.memory import Memory
from retouch.cache.store import Store
from retouch.edit import InvalidOption
from retouch.engine.engine import MEMORY, Engine
from retouch.engine.savings import SAVINGS
from retouch.engine.savings import check as check_savings
from retouch.engine.scheduler import POLICIES
from retouch.models import checkpoint, codec, lora, mapped
from retouch.models.base import Document, Prompt
from retouch.models.device import choose as choose_device
from retouch.models.dtype import choose
from retouch.models.families import adapter_of
from retouch.models.options import Options
from retouch.passes.compile import compiled
from retouch.passes.fold import folded
from retouch.passes.offload import offloaded
from retouch.passes.spread import devices_of, spread

log = logging.getLogger(__name__)

OFFLOADS = ("stages",)

DISK = 8 << 30
"""Bytes of encoded documents kept in a cache folder; prompts take an eighth of it beside them."""

HEAD, BLOCKS, BLOCK = 1 << 20, 1024, 4096
"""What tells weight files apart: bytes of a file's beginning, and how many blocks of how many bytes after them."""


def load(
    model: str = "retouch-mini", dtype: str = "auto", device: str = "auto", options: Options | None = None,
    cache: Path | None = None, policy: str = "first-come", tokens: int | None = None, queue: int = 1000,
    beside: int | None = None, memory: int = MEMORY, host: int = 0, disk: int = DISK, savings: tuple[str, ...] = SAVINGS,
    adapters: Path | None = None, compile: bool = False, base: str | None = None, offload: str | None = None,
    device_map: str | None = None,
) -> Engine:  # fmt: skip
    """An engine on a bundled checkpoint, a directory, a hub name, or a .safetensors file and all else in the directory `base`.

    `memory`, `host` and `disk` are bytes of encoded documents kept on the device, in host memory, and in the folder `cache`,
    where one is given: what lies there outlives the engine. `beside` threads encode and decode beside the loop: by default
    one on a GPU; on a CPU none, as they would only take its cores from the step. `savings` are those of `savings.SAVINGS` that
    are to be had; the others are left off, whatever else is said. `adapters` is a folder of LoRA adapters that edits may wear.
    `compile`: take a minute or two to compile the decoder (passes/compile.py). `offload="stages"`: one part of the model at a
    time is on the device (passes/offload.py), and nothing beside the loop by default. `device_map="balanced"`: its layers are
    on all GPUs (passes/spread.py).

    Raises UnknownCheckpoint, CheckpointMismatch, UnknownAdapter, and InvalidOption for a policy, dtype or device that is not
    there.
    """
    if policy not in POLICIES:
        raise InvalidOption(f"policy is {policy!r}; give one of {', '.join(POLICIES)}.")
    check_savings(savings)
    place = choose_device(device)
    devices = _devices(place, offload, device_map, compile)
    path = checkpoint.find(model)
    folder = checkpoint.base_of(path, base)
    chosen = choose(dtype, place)
    pipeline, family = checkpoint.read(path, chosen, folder)
    log.info("%s: %s on %s in %s", path.name, type(pipeline).__name__, place, str(chosen).removeprefix("torch."))
    if offload is None and device_map is None:
        pipeline.to(place)
    served = adapter_of(family)(pipeline, family, _fingerprint(path, folder), _computed(options or Options(), savings))
    log.info("weights: %s", mapped.said({k: v for k, v in pipeline.components.items() if isinstance(v, torch.nn.Module)}))
    if adapters is not None:
        lora.adapted(served, type(pipeline), adapters)
    served = folded(served)
    served = compiled(served) if compile else offloaded(served, place) if offload else spread(served, devices)
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
    threads = int(place.type == "cuda" and offload is None) if beside is None else beside
    return Engine(served, POLICIES[policy](), tokens, queue, documents, prompts, Store(Memory("host", memory // 8)), threads)


def _computed(options: Options, savings: tuple[str, ...]) -> Options:
    return options if "mask" in savings else replace(options, whole=True, halo=None, refresh=None, context=None)


def _fingerprint(path: Path, base: Path) -> str:
    """Of all files of `base`, and of `path` where that is a file in the place of some of them.

    Names, sizes and times of change are not enough: two fine-tunes are of one size, and archives and images may set all times
    alike. So it is of what the files hold, too.
    """
    files = sorted(p for p in base.rglob("*") if p.suffix in (".json", ".safetensors"))
    named = [(p.relative_to(base), p) for p in files] + [(Path("file"), path)] * path.is_file()
    digest = hashlib.blake2b(digest_size=16)
    for name, p in named:
        stat = p.stat()
        digest.update(f"{name}:{stat.st_size}:{stat.st_mtime_ns}|".encode())
        _sample(p, stat.st_size, digest)
    return digest.hexdigest()


def _sample(path: Path, size: int, digest: hashlib.blake2b) -> None:
    """The file's first MiB, where the names, shapes and places of its tensors are, and blocks spread evenly over the rest, the
    last at its very end: all of a file of up to 5 MiB, and 5 MiB of any larger one, so that one of 20 GB takes a moment. What
    was changed in stretches of less than a thousandth of the file alone may be missed.
    """
    with path.open("rb", buffering=0) as file:
        digest.update(file.read(HEAD))
        count = min(BLOCKS, -(-max(0, size - HEAD) // BLOCK))
        for index in range(count):
            file.seek(HEAD + (size - HEAD - BLOCK) * index // max(1, count - 1))
            digest.update(file.read(BLOCK))


def _devices(place: torch.device, offload: str | None, device_map: str | None, compile: bool) -> list[torch.device]:
    """Raises InvalidOption for a way to place the model that is not there, and for two at once."""
    if offload not in (None, *OFFLOADS):
        raise InvalidOption(f"offload is {offload!r}; give {' or '.join(OFFLOADS)}, or leave it out.")
    if sum((offload is not None, device_map is not None, compile)) > 1:
        raise InvalidOption("offload, a device map and compile do not go together; give one of them.")
    return [place] if device_map is None else devices_of(device_map, place)
