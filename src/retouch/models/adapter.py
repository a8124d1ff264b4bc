"""What every family of latent diffusion does alike: the frame, the cells, the noise, the way back to pixels.

A family is a subclass that says how pixels become tokens and back, how a text is read, which noise schedule there is, and what
one packed call of its transformer gives (docs/models.md).
"""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retouch.edit import Edit, InvalidMask, InvalidOption
from retouch.models import framing, lora
from retouch.models.base import Document, Frame, Job, Prompt, Traits, Worn
from retouch.models.checkpoint import Family
from retouch.models.framing import Region
from retouch.models.options import Options
from retouch.models.packing import Packed, Segment
from retouch.models.preview import Sketch
from retouch.models.refresh import Refresh

Made = tuple[np.ndarray, int, int]
"""Pixels (h, w, 3) uint8, and the frame's row and column that they begin at."""


class Adapter(ABC):
    """An `EditModel` over the parts of a diffusers pipeline. `pipeline` has a `vae`; the rest is the family's business."""

    renoised = True
    """Where every cell is computed, known ones are set back to the noised document after each step."""

    refreshes = True
    """Its steps can be partial: all attention goes through `Packed.attend`."""

    adapts = True
    """It runs its denoiser's linear layers by calling them, so that an edit may wear adapters (lora.py)."""

    channels_last = True
    """All convolutions of its autoencoder are of pictures, which run faster with channels last."""

    def __init__(self, pipeline: Any, family: Family, fingerprint: str = "", options: Options | None = None) -> None:
        self.family, self.options = family, options or Options()
        self.vae = pipeline.vae.eval()
        if self.channels_last:
            self.vae.decoder.to(memory_format=torch.channels_last)
            self.vae.encoder.to(memory_format=torch.channels_last)
        self.schedule = pipeline.scheduler.config
        self.denoiser = self._denoiser(pipeline)
        self.device, self.dtype = self.denoiser.device, self.denoiser.dtype
        self.cell = self._cell_side()
        self.whole = not family.masked if self.options.whole is None else self.options.whole
        self.refresh = self._refresh()
        self._fingerprint = f"{fingerprint}|{self.dtype}|{self.options.keys}|{self.options.refresh}".encode()
        self.sigmas = lru_cache(maxsize=256)(self._sigmas)
        self.loras: lora.Loras | None = None
        self._sketch: Sketch | None = None
        self._fitting, self._reading, self._apart = threading.Lock(), threading.Lock(), threading.local()

    def _refresh(self) -> Refresh | None:
        """Raises InvalidOption where there is nothing to it."""
        if self.options.refresh is None:
            return None
        if not self.refreshes:
            raise InvalidOption("this family computes every cell at every step; leave refresh out.")
        if not self.whole and self.family.cached:
            raise InvalidOption(
                "this checkpoint computes masked cells alone and keeps its documents, which leaves nothing to refresh; leave "
                "it out, or give whole=True."
            )
        return Refresh.parsed(self.options.refresh)

    @classmethod
    @abstractmethod
    def traits(cls, family: Family) -> Traits:
        """What a checkpoint of this family has of the fast path."""

    @abstractmethod
    def _denoiser(self, pipeline: Any) -> Any:
        """The transformer or UNet among the pipeline's parts."""

    @abstractmethod
    def _cell_side(self) -> int:
        """Pixels along one side of a token's cell."""

    @abstractmethod
    def _encode(self, pixels: np.ndarray) -> Tensor:
        """(H, W, 3) uint8, sides multiples of the cell -> tokens (h, w, C) float32."""

    @abstractmethod
    def _latents(self, tokens: Tensor) -> Tensor:
        """Tokens (h, w, C) -> latents in the decoder's own scale (..., H, W): one of a cell, or several in a square."""

    @abstractmethod
    def _pixels(self, latents: Tensor) -> np.ndarray:
        """Of `_latents`, or of a window of these, (height, width, 3) uint8."""

    @torch.inference_mode()
    def warm(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Decode nothing in each of these sizes, rows and columns of latents, as far as the largest picture has them."""
        side = max(self.cell, self.family.max_side // self.cell * self.cell)
        of_all = self._latents(self._encode(np.zeros((side, side, 3), np.uint8)))
        most = of_all.shape[-2:]
        for rows, columns in dict.fromkeys((min(rows, most[0]), min(columns, most[1])) for rows, columns in sizes):
            self._pixels(of_all[..., :rows, :columns])

    @abstractmethod
    def _read(self, key: str, text: str, document: Document) -> Prompt:
        """Raises InvalidPrompt. One thread at a time is in here."""

    @abstractmethod
    def _sigmas(self, steps: int, tokens: int) -> tuple[float, ...]:
        """The checkpoint's own noise schedule, as its diffusers pipeline sets it; `steps` + 1 values down to 0."""

    @abstractmethod
    def _denoise(self, pack: Packed) -> Tensor:
        """One call of the transformer: velocities (image tokens, C) of the pack."""

    @abstractmethod
    def encode_document(self, frame: Frame) -> Document: ...

    @property
    def approximate(self) -> tuple[str, ...]:
        keys = self.options.keys
        lossy: tuple[str, ...] = (f"{keys} documents",) if keys != "exact" and self.family.cached else ()
        if self.options.context is not None:
            lossy += (f"context of {self.options.context} px",)
        if self.refresh is not None:
            what = "masked tokens" if self.whole else "masked tokens, references" if not self.family.masked else "references"
            return (*lossy, f"{what} refreshed {self.options.refresh}")
        return lossy if self.whole or self.family.masked else (*lossy, "masked tokens")

    def frame(self, edit: Edit) -> Frame:
        """The whole picture; where that is larger than the model's size, or it is so said, a crop around the mask."""
        if len(edit.references) > (most := self.family.references):
            wanted = f"at most {most} further pictures" if most else "no further pictures"
            raise InvalidOption(f"this checkpoint looks at {wanted} beside the document; {len(edit.references)} are given.")
        if self.family.sees == "nothing" and edit.mask is None and not edit.blank:
            raise InvalidMask(
                "this checkpoint draws from text and does not look at the picture; give a mask of what to fill, or ask for a "
                "picture from nothing."
            )
        longest = self.family.max_side
        box, scale = framing.place(edit, longest, self.options.context, self.cell)
        pixels = self._fit(edit.image[box[1] : box[3], box[0] : box[2], :3], scale)
        references = [self._fit(other[..., :3], min(1.0, longest / max(other.shape[:2]))) for other in edit.references]
        digest = hashlib.blake2b(self._fingerprint, digest_size=20)
        adapters = lora.chosen(edit, self.loras)
        digest.update(f"{edit.tenant}\0{adapters if self.family.cached else ()}".encode())
        for part in (pixels, *references):
            digest.update(repr(part.shape).encode())
            digest.update(b"blank" if edit.blank else part.tobytes())
        return Frame(box, scale, pixels, tuple(references), digest.hexdigest(), edit.blank, adapters)

    def worn(self, frame: Frame) -> Worn:
        """The adapters of a frame, read where they are not yet. Raises AdapterMismatch."""
        if self.loras is None:
            return ()
        return tuple((self.loras.get(name, stamp), scale) for name, scale, stamp in frame.adapters)

    def _fit(self, pixels: np.ndarray, scale: float) -> np.ndarray:
        return framing.fitted(pixels, scale, self.cell)

    def _masked_cells(self, edit: Edit, frame: Frame) -> Tensor:
        return framing.masked_cells(edit, frame, self._grid(frame), self.cell, self.options.dilate)

    def size(self, edit: Edit, frame: Frame) -> tuple[int, int]:
        steps, partial = edit.steps or self.family.steps, self.refresh is not None
        masked = int(self._masked_cells(edit, frame).sum()) if partial or not self.whole else 0
        along = sum(self._count(pixels) for pixels in self._running(frame))
        full = along + (self._count(frame.pixels) if self.whole else masked)
        often = steps if self.refresh is None else self.refresh.count(steps)
        tokens = -(-(often * full + (steps - often) * masked) // steps)
        return tokens * (1 if self.negative(edit) is None else 2), steps

    def _running(self, frame: Frame) -> Sequence[np.ndarray]:
        """The pictures whose tokens run along in every full step, as references that see the edit."""
        return ()

    def _count(self, pixels: np.ndarray) -> int:
        """Cells of a picture."""
        return pixels.shape[0] // self.cell * (pixels.shape[1] // self.cell)

    def _grid(self, frame: Frame) -> tuple[int, int]:
        return frame.pixels.shape[0] // self.cell, frame.pixels.shape[1] // self.cell

    def prompt_key(self, text: str, tenant: str, frame: Frame) -> str:
        return hashlib.blake2b(self._fingerprint + repr((tenant, text)).encode(), digest_size=20).hexdigest()

    def negative(self, edit: Edit) -> str | None:
        if self.family.guidance is None and edit.guidance is not None:
            raise InvalidOption("this checkpoint is distilled and takes no guidance; leave it out.")
        guidance = self.family.guidance if edit.guidance is None else edit.guidance
        if not self.family.embeds_guidance and guidance is not None and guidance > 1:
            return edit.negative
        if edit.negative:
            raise InvalidOption("a negative prompt needs guidance by a second pass, which this edit has not; leave it out.")
        return None

    @torch.inference_mode()
    def encode_prompt(self, key: str, text: str, document: Document) -> Prompt:
        with self._reading:  # the one tokenizer is set to each text's length
            return self._read(key, text, document)

    @torch.inference_mode()
    def start(self, edit: Edit, frame: Frame, document: Document, prompt: Prompt, negative: Prompt | None) -> Job:
        rows, columns = document.tokens.shape[:2]
        masked = self._masked_cells(edit, frame).to(self.device)
        cells = torch.arange(rows * columns, device=self.device) if self.whole else masked.nonzero()[:, 0]
        noise = self._noise(edit.seed, document.tokens.shape).flatten(0, 1)[cells]
        guidance = self.family.guidance if edit.guidance is None else edit.guidance
        sigmas = self.sigmas(edit.steps or self.family.steps, rows * columns)
        known = ~masked if self.whole and not bool(masked.all()) else None
        job = Job(edit, frame, document, prompt, negative, guidance, cells, known, noise, noise, sigmas)
        if self.refresh is not None and (known is not None or len(document.reference)):
            job.fresh = (~known).nonzero()[:, 0] if known is not None else torch.arange(len(cells), device=self.device)
        job.worn = self.worn(frame)
        job.usage.tokens_whole = rows * columns * job.steps
        return job

    def _noise(self, seed: int, shape: Sequence[int]) -> Tensor:
        """Noise tokens (h, w, C) of a seed, drawn in the order in which the family's diffusers pipeline draws it."""
        rows, columns, channels = shape
        noise = torch.randn((channels, rows, columns), generator=torch.Generator().manual_seed(seed))
        return noise.permute(1, 2, 0).to(self.device)

    def _noised(self, clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
        return torch.lerp(clean, noise, sigma)

    @torch.inference_mode()
    def step(self, jobs: Sequence[Job]) -> None:
        pack = Packed([segment for job in jobs for segment in self._segments(job)])
        with lora.worn(lora.packed(pack)):
            out = pack.velocities(self._denoise(pack).float())
        velocities = {(s.job, s.prompt): v for s, v in zip(pack.segments, out, strict=True)}
        for job in jobs:
            job.width = 0
        for segment, own in zip(pack.segments, pack.own, strict=True):
            segment.job.width += own.stop - own.start
        for job in jobs:
            velocity = velocities[job, job.prompt]
            if job.negative is not None and job.guidance is not None:
                velocity = self._guided(velocity, velocities[job, job.negative], job.guidance)
            self._advance(job, velocity)

    def _segments(self, job: Job) -> list[Segment]:
        partial = self._partial(job, job.step)
        keeps = not partial and self._partial(job, job.step + 1)
        return [Segment(job, prompt, partial, keeps) for prompt in (job.prompt, job.negative) if prompt]

    def _partial(self, job: Job, step: int) -> bool:
        return job.fresh is not None and self.refresh is not None and step < job.steps and not self.refresh.full(step)

    def _guided(self, velocity: Tensor, without: Tensor, guidance: float) -> Tensor:
        return without + guidance * (velocity - without)

    def _advance(self, job: Job, velocity: Tensor) -> None:
        """One Euler step; where every cell is computed, known ones go back to the document's, noised for the next step.

        So do those that a partial step left out, whatever the family.
        """
        partial = self._partial(job, job.step)
        sigma, following = job.sigmas[job.step], job.sigmas[job.step + 1]
        job.estimate = job.latents - sigma * velocity
        job.latents = job.latents + (following - sigma) * velocity
        if job.known is not None and (self.renoised or partial):
            clean = job.document.tokens.flatten(0, 1)[job.cells]
            job.latents = torch.where(job.known[:, None], self._noised(clean, job.noise, following), job.latents)
        job.step += 1
        job.usage.steps = job.step
        job.usage.tokens_computed += len(job.fresh) if partial and job.fresh is not None else len(job.cells)
        if job.kept:
            job.usage.kept_bytes = max(job.usage.kept_bytes, job.kept_bytes)
        if job.done:
            job.kept.clear()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def apart(self) -> AbstractContextManager[Any]:
        """A stream of this thread's own on a GPU; a CPU has no such thing."""
        if self.device.type != "cuda":
            return nullcontext()
        if not hasattr(self._apart, "stream"):
            self._apart.stream = torch.cuda.Stream(self.device)
        return torch.cuda.stream(self._apart.stream)

    @torch.inference_mode()
    def finish(self, job: Job) -> np.ndarray:
        return self._composed(job, job.latents, self._decode)

    @torch.inference_mode()
    def preview(self, job: Job) -> np.ndarray:
        assert job.estimate is not None
        return self._composed(job, job.estimate, self._sketched)

    def _composed(self, job: Job, computed: Tensor, decode: Callable[[Tensor, Region], Made]) -> np.ndarray:
        tokens = job.document.tokens.clone()
        tokens.view(-1, tokens.shape[-1])[job.cells] = computed
        made, top, left = decode(tokens, framing.region_of(job.edit, job.frame))
        return framing.put_back(job.edit, job.frame, made, top, left, self.options.feather)

    def _sketched(self, tokens: Tensor, region: Region) -> Made:
        """As `_decode`, by the preview's matrix."""
        with self._fitting:
            self._sketch = self._sketch or Sketch(self._encode, self.cell)
        top, bottom, left, right = framing.window(region, 0, self.cell, tokens.shape)
        return self._sketch(tokens[top:bottom, left:right]), top * self.cell, left * self.cell

    def _decode(self, tokens: Tensor, region: Region) -> Made:
        return self.decode(tokens, region, self.options.halo)

    @torch.inference_mode()
    def decode(self, tokens: Tensor, region: Region, halo: int | None) -> Made:
        """Tokens (h, w, C) -> pixels that hold the region and `halo` around it (None: all there are), and where they lie."""
        of_all = self._latents(tokens)
        unit = self.cell * tokens.shape[0] // of_all.shape[-2]
        halo = self.cell * max(tokens.shape[:2]) if halo is None else halo
        top, bottom, left, right = framing.window(region, halo, unit, of_all.shape[-2:])
        return self._pixels(of_all[..., top:bottom, left:right]), top * unit, left * unit
