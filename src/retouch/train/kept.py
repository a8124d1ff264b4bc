"""What training keeps in its work folder: whole files, each with the settings it was made with.

A run that would go on from a file of other settings is refused, as it would give the other run's weights under its own name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from retouch.edit import InvalidOption

Settings = Mapping[str, str | int | float | None]
"""Of what a file's content depends on."""


def save(path: Path, value: Any, made_with: Settings) -> None:
    """The file appears whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save({"made_with": dict(made_with), "value": value}, part)
    os.replace(part, path)


def load(path: Path, made_with: Settings, trusted: bool = False) -> Any:
    """What `save` kept, on the CPU; None where there is no such file. `trusted` may hold other objects than tensors.

    Raises InvalidOption where it cannot be read, or was made with other settings.
    """
    if not path.exists():
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=not trusted)
    except Exception as error:  # of a damaged file the unpickler raises anything
        raise InvalidOption(f"{path} cannot be read ({type(error).__name__}); delete it, and it is made anew.") from error
    if not isinstance(found, dict) or found.keys() != {"made_with", "value"}:
        raise InvalidOption(f"{path} does not say what it was made with; {_mend(path)}")
    if differing := differences(found["made_with"], made_with):
        raise InvalidOption(f"{path} was made with {differing}; {_mend(path)}")
    return found["value"]


def differences(then: Settings, now: Settings) -> str:
    """Such as "seed 0, now 1"; nothing where they are alike."""
    names = [name for name in {**then, **now} if then.get(name) != now.get(name) or (name in then) != (name in now)]
    return "; ".join(f"{name} {_said(then, name)}, now {_said(now, name)}" for name in names)


def _said(settings: Settings, name: str) -> str:
    return "not set" if settings.get(name) is None else str(settings[name])


def _mend(path: Path) -> str:
    return f"give another --work, or delete it and what was trained after it ({path.parent}) to begin anew."


def digest_of(folder: Path) -> str:
    """Of the weights in a checkpoint's folder: what tells one from another that takes its name later."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(folder.rglob("*.safetensors")):
        digest.update(f"{file.relative_to(folder)}\0".encode())
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
