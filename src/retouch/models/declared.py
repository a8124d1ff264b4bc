"""What model_index.json and a checkpoint's own retouch.json say, checked: a wrong value is named with what is wanted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retouch.edit import MAX_STEPS, CheckpointMismatch

if TYPE_CHECKING:
    from retouch.models.checkpoint import Family

SEES = ("sequence", "channels", "nothing")

RANGES = {"references": (0, 100), "steps": (1, MAX_STEPS), "max_sequence_length": (1, 1 << 20), "max_side": (16, 1 << 16)}
"""Setting -> least and most of a whole number."""


def parts_of(index: Mapping[str, Any], path: Path) -> list[str]:
    """The parts of a pipeline, which are its lists of a library and a class. Raises CheckpointMismatch for another list."""
    parts = {name: value for name, value in index.items() if isinstance(value, list)}
    for name, value in parts.items():
        if len(value) != 2 or not all(part is None or isinstance(part, str) for part in value):
            raise CheckpointMismatch(f'{path}: {name} is {value!r}; give its library and class, such as ["diffusers", "Name"].')
    return list(parts)


def applied(family: Family, said: Mapping[str, Any], path: Path) -> Family:
    """`family` with the settings of `said`, which `path` holds. Raises CheckpointMismatch for one that is unknown or wrong."""
    known = asdict(family)
    if unknown := sorted(set(said) - set(known)):
        raise CheckpointMismatch(f"{path} has unknown settings {unknown}; known are {sorted(known)}.")
    for name, value in said.items():
        if wanted := _wanted(name, value, family):
            raise CheckpointMismatch(f"{path}: {name} is {value!r}; give {wanted}.")
    layers = tuple(said.get("out_layers", family.out_layers))
    return replace(family, **{**said, "out_layers": layers})


def _wanted(name: str, value: Any, family: Family) -> str:
    """What a setting should be; nothing where it is so."""
    if isinstance(getattr(family, name), bool):
        return "" if isinstance(value, bool) else "true or false"
    if name in RANGES:
        least, most = RANGES[name]
        return "" if _whole(value) and least <= value <= most else f"a whole number from {least} to {most:,}"
    if name == "guidance":
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
        return "" if value is None or number else "a number of at least 0, or null where the checkpoint is distilled"
    if name == "out_layers":
        layers = isinstance(value, list) and bool(value) and all(_whole(layer) and layer >= 0 for layer in value)
        return "" if layers else "a list of the text encoder's layers, such as [9, 18, 27]"
    if name == "adapter":
        return "" if value == family.adapter else f"{family.adapter!r}, which runs this pipeline, or leave it out"
    return "" if value in SEES else f"one of {', '.join(SEES)}"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
