"""Which device a name means."""

from __future__ import annotations

import torch

from retouch.edit import InvalidOption


def choose(name: str) -> torch.device:
    """`name` is torch's, such as cuda:1, or auto: a GPU where there is one. Raises InvalidOption for one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidOption(f"device {name!r} is not here: {' '.join(str(error).split())[:200]} Give auto or cpu.") from error
    return device
