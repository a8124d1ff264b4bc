"""Ragged attention over two key ranges: a segment's own tokens, and the cached keys of its document.

The two are attended apart and merged by their log-sum-exps, so that a document's keys are never copied, and neighbours in
the pack that share a document read its keys in one call. Merging is exact up to rounding.

Source: the log-sum-exp merge of split keys, as in FlashAttention (https://arxiv.org/abs/2205.14135), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start` to `stop` of the pack."""

    start: int
    stop: int

    def meets(self, other: Span) -> bool:
        return self.start < other.stop and other.start < self.stop


def attend(q: Tensor, k: Tensor, v: Tensor, own: list[Span], shared: list[tuple[Span, Tensor, Tensor]]) -> Tensor:
    """Attention of a pack.

    q, k, v: (tokens, heads, head_dim). `own`: segments, in order and without gaps, whose tokens see each other. `shared`:
    spans of whole segments whose tokens also see these keys and values, (keys, heads, head_dim); they may overlap. Returns
    q's shape.
    """
    parts = [_attention(q[s.start : s.stop], k[s.start : s.stop], v[s.start : s.stop]) for s in own]
    out = torch.cat([part for part, _ in parts]) if len(parts) > 1 else parts[0][0]
    if not shared:
        return out
    lse = torch.cat([weight for _, weight in parts]) if len(parts) > 1 else parts[0][1]
    for at, (span, keys, values) in enumerate(shared):
        rows = slice(span.start, span.stop)
        more, more_lse = _attention(q[rows], keys, values)
        share = torch.sigmoid(more_lse - lse[rows]).unsqueeze(-1)
        out[rows] = torch.lerp(out[rows].float(), more.float(), share).to(out.dtype)
        if any(span.meets(later) for later, _, _ in shared[at + 1 :]):
            lse[rows] = torch.logaddexp(lse[rows], more_lse)
    return out


def attend_reference(q: Tensor, k: Tensor, v: Tensor, own: list[Span], shared: list[tuple[Span, Tensor, Tensor]]) -> Tensor:
    """What `attend` means: every segment against the concatenation of all keys it sees."""
    out = torch.empty_like(q)
    for span in own:
        rows = slice(span.start, span.stop)
        more = [(keys, values) for wide, keys, values in shared if wide.start <= span.start and span.stop <= wide.stop]
        keys, values = (torch.cat(parts) for parts in zip((k[rows], v[rows]), *more, strict=True))
        queries, keys, values = (t.transpose(0, 1)[None] for t in (q[rows], keys, values))
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        out[rows] = mixed[0].transpose(0, 1)
    return out


def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Dense attention (Q, heads, dim) and the log-sum-exp of its scores (Q, heads), float32."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.dtype in (torch.float16, torch.bfloat16):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
        lse = lse[..., : q.shape[-2]]
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)
