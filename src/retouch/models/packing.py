"""Ragged jobs on one token axis, without padding: each segment is a job's text tokens, then its image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from retouch.kernels.attention import Span, attend
from retouch.models.base import Document, Job, Prompt
from retouch.models.compact import dense
from retouch.models.transformer import Modulation


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One forward of one job: with its prompt, or, for classifier-free guidance, with the negative one.

    A `partial` one computes the job's fresh cells; all others, and references that run along, it sees as the keys and values
    that an earlier segment of the job, which `keeps` them, has left on it.
    """

    job: Job
    prompt: Prompt
    partial: bool = False
    keeps: bool = False

    @property
    def cells(self) -> Tensor:
        """(N,) those computed in this step."""
        return self._computed(self.job.cells)

    @property
    def noisy(self) -> Tensor:
        """(N, C + C'): their latents, with their condition beside them."""
        latents = self._computed(self.job.latents)
        return latents if self.job.condition is None else torch.cat([latents, self._computed(self.job.condition)], -1)

    @property
    def reference(self) -> Tensor:
        """(R, C) reference tokens that run along, none where their keys and values are known."""
        return self.job.document.reference[: 0 if self.partial else None]

    @property
    def places(self) -> Tensor:
        """(R, 4) where they are."""
        return self.job.document.positions[: 0 if self.partial else None]

    def _computed(self, of_cells: Tensor) -> Tensor:
        return of_cells[self.job.fresh] if self.partial else of_cells

    def rest(self) -> Tensor:
        """Those image tokens of a full segment that a partial one will not compute."""
        others = torch.ones(len(self.job.cells) + len(self.reference), dtype=torch.bool, device=self.job.cells.device)
        others[self.job.fresh] = False
        return others.nonzero()[:, 0]


class Packed:
    """Layout of a step: a segment's tokens lie together, and segments of like adapters and of one document lie side by side.

    Texts and images are also kept apart, as (all text tokens, ...) and (all image tokens, ...), where weights differ.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = sorted(segments, key=lambda s: (s.job.frame.adapters, s.job.document.key))
        self.texts = [len(s.prompt.embedded) for s in self.segments]
        self.images = [len(s.cells) + len(s.reference) for s in self.segments]
        device = self.segments[0].job.latents.device
        self.own: list[Span] = []
        text_index, image_index, start = [], [], 0
        for texts, images in zip(self.texts, self.images, strict=True):
            text_index.append(torch.arange(start, start + texts))
            image_index.append(torch.arange(start + texts, start + texts + images))
            self.own.append(Span(start, start + texts + images))
            start += texts + images
        self.tokens = start
        self.text_index, self.image_index = (torch.cat(parts).to(device) for parts in (text_index, image_index))
        counts = torch.tensor([self.texts, self.images], device=device)
        rows = torch.arange(len(self.segments), device=device)
        self.row_of_text = rows.repeat_interleave(counts[0], output_size=sum(self.texts))
        self.row_of_image = rows.repeat_interleave(counts[1], output_size=sum(self.images))
        self.row_of_token = rows.repeat_interleave(counts.sum(0), output_size=self.tokens)
        self.documents = self._documents()
        triples = zip(self.segments, self.own, self.texts, strict=True)
        self.keeping = [(s, own.start + texts + s.rest()) for s, own, texts in triples if s.keeps]

    def _documents(self) -> list[tuple[Span, Document]]:
        """The span of tokens that reads each document's cached keys."""
        spans = []
        for document, group in groupby(zip(self.segments, self.own, strict=True), key=lambda pair: pair[0].job.document):
            own = [span for _, span in group]
            if document.keys:
                spans.append((Span(own[0].start, own[-1].stop), document))
        return spans

    def image(self, dtype: torch.dtype) -> Tensor:
        """(image tokens, C): noisy latents with their condition, and reference tokens after them where the family runs those
        along.
        """
        parts = [part for s in self.segments for part in (s.noisy, s.reference) if len(part)]
        return torch.cat(parts).to(dtype)

    def text(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([s.prompt.embedded for s in self.segments]).to(dtype)

    def positions(self) -> Tensor:
        """(tokens, 4) coordinates (time, row, column, sequence), joined."""
        parts = []
        for segment, texts in zip(self.segments, self.texts, strict=True):
            text = torch.zeros(texts, 4, dtype=torch.int64, device=segment.cells.device)
            text[:, 3] = torch.arange(texts, device=segment.cells.device)
            parts += [text, cell_positions(segment.cells, segment.job.document.tokens.shape[1]), segment.places]
        return torch.cat(parts)

    def sigmas(self) -> Tensor:
        return torch.tensor([s.job.sigma for s in self.segments], device=self.text_index.device)

    def gather(self, modulation: Modulation) -> Modulation:
        """From a row for each segment to a row for each token."""
        return Modulation(
            tuple(m[self.row_of_image] for m in modulation.image),
            tuple(m[self.row_of_text] for m in modulation.text),
            tuple(m[self.row_of_token] for m in modulation.single),
            tuple(m[self.row_of_image] for m in modulation.out),
        )

    def velocities(self, out: Tensor) -> list[Tensor]:
        """(image tokens, C) -> for each segment the part of its job's noisy tokens, (N, C); 0 for those not computed."""
        parts = []
        for segment, part in zip(self.segments, out.split(self.images), strict=True):
            job, computed = segment.job, part[: len(segment.cells)]
            if segment.partial:
                computed = part.new_zeros(len(job.cells), part.shape[-1]).index_copy_(0, job.fresh, computed)
            parts.append(computed)
        return parts

    def join(self, text: Tensor, image: Tensor, axis: int = -2) -> Tensor:
        joined = image.new_empty((self.tokens, *image.shape[1:]))
        return joined.index_copy_(0, self.text_index, text).index_copy_(0, self.image_index, image)

    def split(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        return joined[self.text_index], joined[self.image_index]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for segment, rows in self.keeping:
            segment.job.kept[segment.prompt.key, layer] = k[rows], v[rows]
        return attend(q, k, v, self.own, self._keys(layer, q.dtype))

    def _keys(self, layer: int, dtype: torch.dtype) -> list[tuple[Span, Tensor, Tensor]]:
        pairs = [(span, *document.keys[layer]) for span, document in self.documents]
        shared = [(span, dense(keys, dtype), dense(values, dtype)) for span, keys, values in pairs]
        partial = [(span, s) for span, s in zip(self.own, self.segments, strict=True) if s.partial]
        return shared + [(span, *s.job.kept[s.prompt.key, layer]) for span, s in partial]


class Reference:
    """Layout of reference tokens (R, ...): they see only each other, and their keys and values are kept."""

    def __init__(self) -> None:
        self.keys: list[tuple[Tensor, Tensor]] = []

    def join(self, text: Tensor, image: Tensor, axis: int = -2) -> Tensor:
        return image

    def split(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        return joined[:0], joined

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys.append((k.contiguous(), v.contiguous()))
        return attend(q, k, v, [Span(0, len(q))], [])


def cell_positions(cells: Tensor, width: int, time: int = 0) -> Tensor:
    """Flat indices (..., N) into a grid of `width` columns -> coordinates (..., N, 4)."""
    zero = torch.zeros_like(cells)
    return torch.stack([zero + time, cells // width, cells % width, zero], -1)
