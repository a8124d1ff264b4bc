"""What every model family is to the engine: the `EditModel` protocol and the three things it passes around."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from retouch.edit import Edit, Usage
from retouch.models.compact import Compact


@dataclass(frozen=True, slots=True)
class Frame:
    """The part of the picture a model works on.

    `box` (x0, y0, x1, y1) in the picture's pixels; `scale`, at most 1, is model pixels for each of the picture's.
    `pixels` (h, w, 3) uint8 are the box scaled and padded to whole cells by its last rows and columns; `references` are
    the further pictures, each (h', w', 3). `key` names all of these pixels and the weights that read them. Where it is
    `blank`, the pixels give the size alone. `adapters`: name, scale and stamp of each that the edit wears.
    """

    box: tuple[int, int, int, int]
    scale: float
    pixels: np.ndarray
    references: tuple[np.ndarray, ...]
    key: str
    blank: bool = False
    adapters: tuple[tuple[str, float, str], ...] = ()

    @property
    def inner(self) -> tuple[int, int]:
        """(width, height) of the scaled box in `pixels`: without what pads it to whole cells."""
        width, height = self.box[2] - self.box[0], self.box[3] - self.box[1]
        return max(1, round(width * self.scale)), max(1, round(height * self.scale))


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """An encoded source picture, with what further reference pictures the edit has. Depends on pixels and weights alone.

    `tokens` (h, w, C) are its latents. `keys` holds, for each layer, the references' rotated keys and their values,
    (R, heads, head_dim), as they are or in 8 bits; it is empty where the family lets references see the edit, and then
    `reference` (R, C) at `positions` (R, 4) runs along in every step. `prefix`, in an order of the family's own, is what
    a text encoder that looks at the pictures made of them, before any text.
    """

    key: str
    tokens: Tensor
    keys: tuple[tuple[Tensor | Compact, Tensor | Compact], ...]
    reference: Tensor
    positions: Tensor
    prefix: tuple[Tensor, ...] = ()

    @property
    def bytes(self) -> int:
        pairs = (t for pair in self.keys for t in pair)
        return sum(t.nbytes for t in (self.tokens, self.reference, *self.prefix, *pairs))


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """An encoded prompt: `embedded` (T, joint_attention_dim), and the `pooled` (dim,) whole of it where the family has that."""

    key: str
    embedded: Tensor
    pooled: Tensor | None = None

    @property
    def bytes(self) -> int:
        return self.embedded.nbytes + (0 if self.pooled is None else self.pooled.nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """`weights`: module -> down (rank, in) and up (out, rank), the latter with alpha / rank in it."""

    name: str
    weights: dict[str, tuple[Tensor, Tensor]]

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for pair in self.weights.values() for t in pair)


Worn = tuple[tuple[Lora, float], ...]
"""Adapters and their scales."""


@dataclass(slots=True, eq=False)
class Job:
    """An Edit in flight. All that changes from step to step is here.

    `cells` (N,) int64 are the flat indices of the computed cells, `latents` (N, C) float32 their noisy tokens, `noise`
    (N, C) what they started from; `condition` (N, C') are channels that go beside them into every step. `known` (N,) bool
    marks cells outside the mask (only where every cell is computed). `sigmas` has one more entry than there are steps and ends
    at 0; `step` counts the steps done. `estimate` (N, C) is what the last step took the clean tokens for.

    `fresh` are the indices into `cells` that a partial step computes; None: all steps are full. `kept` is what it sees of
    the rest: keys and values, (R, heads, head_dim), by prompt key and layer, as the last full step has left them. `worn`: its
    adapters. `width`: all tokens of its last step, with those of the prompt and of references that ran along, of both passes
    where it is guided by a second one.
    """

    edit: Edit
    frame: Frame
    document: Document
    prompt: Prompt
    negative: Prompt | None
    guidance: float | None
    cells: Tensor
    known: Tensor | None
    latents: Tensor
    noise: Tensor
    sigmas: tuple[float, ...]
    condition: Tensor | None = None
    step: int = 0
    estimate: Tensor | None = None
    fresh: Tensor | None = None
    kept: dict[tuple[str, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    worn: Worn = ()
    width: int = 1
    usage: Usage = field(default_factory=Usage)

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def done(self) -> bool:
        return self.step == self.steps

    @property
    def sigma(self) -> float:
        return self.sigmas[self.step]

    @property
    def kept_bytes(self) -> int:
        return sum(t.nbytes for pair in list(self.kept.values()) for t in pair)


PROMPT_OF_TEXT = "for its text"
"""What most families' prompts are kept for."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What a family has of the fast path, in the words that `retouch models` prints.

    `packing`: which edits share a step. `masked`: computing the masked cells alone. `document`: what of a document is kept for
    later edits of it. `prompt`: for what an encoded prompt is kept. `guidance`: none, embedded or two passes. `references`:
    further pictures an edit may bring. `decode`: decoding the surroundings of the mask alone, against all of the picture.
    `outside`: the pixels outside the mask.
    """

    packing: str
    masked: str
    document: str
    prompt: str
    guidance: str
    references: int
    decode: str
    outside: str


class EditModel(Protocol):
    """A family adapter. It keeps no state of any edit; the keys say which Documents and Prompts may be shared.

    `approximate` names what makes its answers differ from the plain model's; the decode of a crop is not counted.
    """

    @property
    def approximate(self) -> tuple[str, ...]: ...

    def frame(self, edit: Edit) -> Frame:
        """The part of the picture to work on, and the key of its Document."""

    def size(self, edit: Edit, frame: Frame) -> tuple[int, int]:
        """(image tokens of one step, steps): what an edit will cost, before anything is encoded.

        References that run along are counted, and all of it twice where a second pass guides. Where steps differ it is their
        mean.
        """

    def prompt_key(self, text: str, tenant: str, frame: Frame) -> str:
        """The key of a text's Prompt, which may look at the frame too."""

    def negative(self, edit: Edit) -> str | None:
        """The text of the second prompt where the edit is guided by one, else None. Raises InvalidOption."""

    def encode_document(self, frame: Frame) -> Document:
        """Latents and reference keys and values: of the frame's pixels, and of nothing else of the edit."""

    def encode_prompt(self, key: str, text: str, document: Document) -> Prompt:
        """Raises InvalidPrompt when the text has more tokens than the model reads."""

    def start(self, edit: Edit, frame: Frame, document: Document, prompt: Prompt, negative: Prompt | None) -> Job:
        """Positions inside the mask, and noise for them from the edit's seed."""

    def step(self, jobs: Sequence[Job]) -> None:
        """One denoising step of each job, all in one packed call, whatever their documents, sizes, masks and timesteps."""

    def synchronize(self) -> None:
        """Wait for what this thread gave the device, so that a stage's seconds are its own."""

    def apart(self) -> AbstractContextManager[None]:
        """Inside, this thread's work runs beside that of the thread that steps."""

    def finish(self, job: Job) -> np.ndarray:
        """The edited picture, in form and size as the edit's; outside the mask it is the edit's, bit for bit."""

    def preview(self, job: Job) -> np.ndarray:
        """The same, cheap and rough, of a job that has been stepped: what the last step took the end for."""
