"""How an edit is computed, whatever the family: what is left out, and what of that is lossy. No torch: servers check it too."""

from __future__ import annotations

from dataclasses import dataclass

from retouch.edit import InvalidOption
from retouch.models.refresh import Refresh

KEYS = ("exact", "int8", "fp8")
"""How a document's keys and values may be kept."""


@dataclass(frozen=True, slots=True)
class Options:
    """How an edit is computed.

    `whole`: every cell is computed and known ones are re-noised at each step (the usual inpainting loop); False: masked cells
    only, which is lossy where the checkpoint was not trained so; None: masked cells only where it was. `dilate`: cells added
    around those that the mask touches. `halo`: the model's pixels that are decoded around the mask's bounds, beside what is
    missing to whole latents (None: the whole picture is decoded). `feather`: pixels over which the edit fades in, inside the
    mask. `keys`: how a document's keys and values are kept: exact, or lossy as int8 or fp8. `refresh`: "F,K", the first F steps
    are full, then every K-th (refresh.py); those between compute the masked cells alone, with the others, and references that
    run along, as the last full step left them: lossy; None: every step is full. `context`: the model sees so many of its pixels
    around the mask's bounds, and nothing of the picture beyond: lossy; None: all of it, as far as it is made for pictures of
    that size.
    """

    whole: bool | None = None
    dilate: int = 0
    halo: int | None = 8
    feather: int = 4
    keys: str = "exact"
    refresh: str | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        if self.refresh is not None:
            Refresh.parsed(self.refresh)
        if self.context is not None and not 0 <= self.context <= 4096:
            raise InvalidOption(f"context is {self.context} pixels; give 0 to 4096, or leave it out for the whole picture.")
        if self.keys not in KEYS:
            raise InvalidOption(f"documents are kept as {self.keys!r}; give {KEYS[0]}, {' or '.join(KEYS[1:])}.")
