"""Which dtype a device is faster in: measured once a machine, kept, and said."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import torch

from retouch.config import cache_folder
from retouch.edit import InvalidOption
from retouch.record import processor

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose(name: str, device: torch.device) -> torch.dtype:
    """`name` is float32, bfloat16 or auto. Raises InvalidOption for any other."""
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise InvalidOption(f"dtype is {name!r}; give auto, {' or '.join(DTYPES)}.")
    path = cache_folder() / "dtype.json"
    machine = f"{_processor(device)} | torch {torch.__version__} | {torch.get_num_threads()} threads"
    known = _read(path)
    if machine not in known:
        rates = {name: matmul_rate(dtype, device) for name, dtype in DTYPES.items()}
        known[machine] = max(rates, key=lambda name: rates[name])
        measured = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.items())
        log.info("matrix products in GFLOP/s: %s; using %s on this machine from now on", measured, known[machine])
        _write(path, known)
    return DTYPES[known[machine]]


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 1024, rounds: int = 5) -> float:
    """FLOP/s of square matrix products, the best of some rounds."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, amx {torch.cpu._is_amx_tile_supported()}"


def _read(path: Path) -> dict[str, str]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in known.items() if v in DTYPES} if isinstance(known, dict) else {}


def _write(path: Path, known: dict[str, str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1))
    except OSError as error:
        log.warning("could not keep the measured dtype in %s (%s); it will be measured again", path, error)
