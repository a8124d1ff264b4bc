"""`Record`: one flat row for every measured number, as JSON lines."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from retouch.edit import OutputFailed, RetouchError

Scalar = str | int | float | bool | None

NVIDIA = Path("/proc/driver/nvidia/gpus")
QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of processor time that a container may use, and in how many; the first is `max` where it has no limit."""


@dataclass(frozen=True, slots=True)
class Record:
    """One number, what it was measured on, and what it could be at most.

    `value` in `unit` is the median of `n` measurements, `low` and `high` their p10 and p90. `ceiling`, in the same unit, is
    the value that the machine would allow. `error` says why there is no value. `device` is what computed, `processor` the
    machine's CPU. `commit` is that of the code, `dirty` where it had changes on top. `extra` holds further scalars; they lie
    flat beside the others in the file and may not be named like one of them.
    """

    suite: str
    name: str
    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    n: int = 1
    ceiling: float | None = None
    error: str = ""
    device: str = ""
    processor: str = ""
    threads: int = 0
    dtype: str = ""
    python: str = ""
    torch: str = ""
    diffusers: str = ""
    commit: str = ""
    dirty: bool = False
    date: str = ""
    extra: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        taken = sorted(set(self.extra) & set(FIELDS))
        if taken:
            raise ValueError(f"extra {taken} are fields of a Record; name them otherwise.")
        for name, value in self.flat().items():
            if not isinstance(value, Scalar) or (isinstance(value, float) and not math.isfinite(value)):
                raise ValueError(f"{name} is {value!r}; a Record holds text, finite numbers, true, false or null.")
        if self.value is None and not self.error:
            raise ValueError(f"{self.name} has neither a value nor an error.")

    def flat(self) -> dict[str, Scalar]:
        return {**{name: getattr(self, name) for name in FIELDS if name != "extra"}, **self.extra}


FIELDS = tuple(f.name for f in fields(Record))


def append(path: Path, records: Iterable[Record]) -> None:
    """Add rows in a single write, so that a killed run leaves whole rows. Raises OutputFailed."""
    lines = "".join(json.dumps(record.flat(), ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
    except OSError as error:
        raise OutputFailed(f"{path} cannot be written ({error.strerror or error}); give another file.") from error


def read(path: Path) -> list[Record]:
    """All rows of a file. Raises RetouchError where it is not there, or a line is no Record."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RetouchError(f"{path} cannot be read ({error}); give a file of Records.") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            records.append(_record(row))
        except (ValueError, TypeError) as error:
            raise RetouchError(f"{path}, line {number} is no Record ({error}); mend or remove it.") from error
    return records


def _record(row: Any) -> Record:
    if not isinstance(row, dict):
        raise TypeError("no JSON object")
    known = {name: row.pop(name) for name in FIELDS if name in row}
    return Record(**known, extra=row)


def environment(device: str = "", dtype: str = "", threads: int = 0) -> dict[str, Any]:
    """Where and on what code a number is measured, as fields of a Record. `device` defaults to the processor."""
    commit, dirty = _commit()
    return {
        "device": device or processor(),
        "processor": processor(),
        "threads": threads,
        "dtype": dtype,
        "python": platform.python_version(),
        "torch": _version("torch"),
        "diffusers": _version("diffusers"),
        "commit": commit,
        "dirty": dirty,
        "date": now(),
    }


def now() -> str:
    """The date of a Record."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@lru_cache
def processor() -> str:
    """The CPU's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """What torch's `device` ("cpu", "cuda:1") is called by its driver, asked without torch.

    "" where nobody says, or where the machine has GPUs of several kinds and it is not certain which this is.
    """
    if not device.startswith("cuda"):
        return processor()
    names = set()
    for path in NVIDIA.glob("*/information"):
        with suppress(OSError, ValueError):
            lines = path.read_text(encoding="utf-8").splitlines()
            names |= {line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")}
    return names.pop() if len(names) == 1 else ""


def vcpus() -> float:
    """Of the machine's CPUs, as many as this process may use."""
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with suppress(OSError, ValueError):
        quota, period = QUOTA.read_text(encoding="utf-8").split()
        count = min(count, float(quota) / float(period)) if quota != "max" else count
    return count


def _version(package: str) -> str:
    """That of the imported module, which tells builds apart (2.13.0+cpu), else of the installed package."""
    loaded = getattr(sys.modules.get(package), "__version__", None)
    if loaded is not None:
        return str(loaded)
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> tuple[str, bool]:
    """The commit of this checkout, and whether anything but results has changed since; ("", False) outside of one."""
    here = Path(__file__).parent
    try:
        _git(here, "ls-files", "--error-unmatch", "__init__.py")  # not some other project's repository around site-packages
        commit = _git(here, "rev-parse", "HEAD")
        return commit, bool(_git(here, "status", "--porcelain", "--", ":(top)", ":(top,exclude)results"))
    except (OSError, subprocess.SubprocessError):
        return "", False


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
