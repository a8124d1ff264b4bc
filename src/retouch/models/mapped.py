"""How much of a model's weights lies in the mapped files, whose pages all processes of a machine share.

diffusers and transformers map .safetensors files, and a weight that needs no change stays a view of them. A copy is made of
what is run in another dtype or on another device, of convolutions that run with channels last, and of matrices that a single
file holds in another form.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path

from torch import nn

MAPS = Path("/proc/self/maps")


def regions(maps: Path = MAPS) -> list[range]:
    """Addresses at which this process has .safetensors files mapped; none where the system does not tell (Linux does)."""
    try:
        rows = [line.split(maxsplit=5) for line in maps.read_text().splitlines()]
    except OSError:
        return []
    files = [row[0].split("-") for row in rows if len(row) == 6 and row[5].removesuffix(" (deleted)").endswith(".safetensors")]
    return [range(int(start, 16), int(end, 16)) for start, end in files]


def counted(parts: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Of each part, bytes of weights that are views of mapped files, and bytes that are this process's own."""
    files, found = regions(), {}
    for name, part in parts.items():
        inside = outside = 0
        for tensor in chain(part.parameters(), part.buffers()):
            if tensor.device.type == "cpu" and any(tensor.data_ptr() in file for file in files):
                inside += tensor.nbytes
            else:
                outside += tensor.nbytes
        found[name] = (inside, outside)
    return found


def said(parts: Mapping[str, nn.Module]) -> str:
    """The same as a line for the log."""
    megabytes = {name: [f"{size / 1e6:,.1f} MB" for size in sizes] for name, sizes in counted(parts).items()}
    return "; ".join(f"{name} {inside} mapped, {outside} copied" for name, (inside, outside) in megabytes.items())
