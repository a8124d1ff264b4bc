"""Reference keys and values in 8 bits: half or a quarter of a document's bytes, and no longer quite the same values.

One scale a token and head, from its largest magnitude. Lossy, so it is named wherever it is on; `bench/compact_documents.py`
measures what it does to an edit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retouch.models.options import KEYS

FORMS = dict(zip(KEYS[1:], (torch.int8, torch.float8_e4m3fn), strict=True))
"""Name of a form -> what its values are kept in."""


@dataclass(frozen=True, slots=True, eq=False)
class Compact:
    """`values` (..., dim) in 8 bits, and the `scale` (..., 1) of each row, float16."""

    values: Tensor
    scale: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: torch.device) -> Compact:
        return Compact(self.values.to(device), self.scale.to(device))

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.values.to(dtype) * self.scale.to(dtype)


def compact(x: Tensor, form: str) -> Compact:
    """`x` (..., dim) in one of FORMS."""
    kind = FORMS[form]
    most = 127.0 if kind == torch.int8 else torch.finfo(kind).max
    scale = (x.float().abs().amax(-1, keepdim=True) / most).clamp_min(1e-7).half()
    scaled = (x.float() / scale.float()).clamp(-most, most)
    return Compact((scaled.round() if kind == torch.int8 else scaled).to(kind), scale)


def dense(x: Tensor | Compact, dtype: torch.dtype) -> Tensor:
    """What a step computes with; a plain tensor is taken as it is."""
    return x.dense(dtype) if isinstance(x, Compact) else x
