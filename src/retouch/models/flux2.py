"""The FLUX.2 family: klein-KV (the bundled one too), klein, and dev, over the cells that the mask touches."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinKVPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein_kv import compute_empirical_mu
from PIL import Image
from torch import Tensor

from retouch import picture
from retouch.edit import Edit, InvalidOption, InvalidPrompt
from retouch.models import latents, transformer
from retouch.models.base import Document, Frame, Job, Prompt
from retouch.models.checkpoint import Family
from retouch.models.compact import FORMS, compact
from retouch.models.packing import Packed, Reference, Segment, cell_positions
from retouch.models.preview import Sketch

log = logging.getLogger(__name__)

Decode = Callable[[Tensor, tuple[int, int, int, int]], tuple[int, int, np.ndarray]]

REFERENCE_TIME = 10
"""Rotary time coordinate of the first reference; each further one is as much later (Flux2Pipeline._prepare_image_ids)."""


@dataclass(frozen=True, slots=True)
class Options:
    """How an edit is computed.

    `whole`: every cell is computed and known ones are re-noised at each step (the usual inpainting loop), instead of
    masked cells only. `dilate`: cells added around those that the mask touches. `halo`: cells of the document decoded
    around the edited ones (None: the whole picture is decoded). `feather`: pixels over which the edit fades in, inside
    the mask. `keys`: how a document's keys and values are kept: exact, or lossy as int8 or fp8.
    """

    whole: bool = False
    dilate: int = 0
    halo: int | None = 1
    feather: int = 4
    keys: str = "exact"

    def __post_init__(self) -> None:
        if self.keys != "exact" and self.keys not in FORMS:
            raise InvalidOption(f"documents are kept as {self.keys!r}; give exact, {' or '.join(FORMS)}.")


class Flux2:
    """An `EditModel` over the parts of a FLUX.2 diffusers pipeline."""

    def __init__(self, pipeline: Any, family: Family, fingerprint: str = "", options: Options = Options()) -> None:
        self.family, self.options = family, options
        self.transformer, self.vae = pipeline.transformer.eval(), pipeline.vae.eval()
        self.text_encoder, self.tokenizer = pipeline.text_encoder.eval(), pipeline.tokenizer
        self.vae.decoder.to(memory_format=torch.channels_last)
        self.vae.encoder.to(memory_format=torch.channels_last)
        self.schedule = pipeline.scheduler.config
        self.device = pipeline.transformer.device
        self.dtype = pipeline.transformer.dtype
        self.cell = latents.cell_side(self.vae)
        self._fingerprint = f"{fingerprint}|{self.dtype}|{options.keys}".encode()
        self.sigmas = lru_cache(maxsize=256)(self._sigmas)
        self._sketch: Sketch | None = None
        self._fitting, self._reading, self._apart = threading.Lock(), threading.Lock(), threading.local()

    @property
    def approximate(self) -> tuple[str, ...]:
        return () if self.options.keys == "exact" or not self.family.cached else (f"{self.options.keys} documents",)

    def frame(self, edit: Edit) -> Frame:
        """The whole picture, or, where it is larger than the model's size, a crop around the mask with context."""
        height, width = edit.image.shape[:2]
        mask = np.ones((height, width), bool) if edit.mask is None else edit.mask
        box, scale = picture.working_crop(mask, (width, height), self.family.max_side)
        pixels = self._fit(edit.image[box[1] : box[3], box[0] : box[2], :3], scale)
        references = []
        for reference in edit.references:
            shrink = min(1.0, self.family.max_side / max(reference.shape[:2]))
            references.append(self._fit(reference[..., :3], shrink))
        digest = hashlib.blake2b(self._fingerprint, digest_size=20)
        digest.update(edit.tenant.encode() + b"\0")
        for part in (pixels, *references):
            digest.update(repr(part.shape).encode())
            digest.update(b"blank" if edit.blank else part.tobytes())
        return Frame(box, scale, pixels, tuple(references), digest.hexdigest(), edit.blank)

    def _fit(self, pixels: np.ndarray, scale: float) -> np.ndarray:
        """Scaled, and padded to whole cells by repeating the last row and column."""
        if scale < 1:
            size = [max(1, round(side * scale)) for side in pixels.shape[1::-1]]
            pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
        missing = [-side % self.cell for side in pixels.shape[:2]]
        return np.pad(pixels, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge") if any(missing) else pixels

    def size(self, edit: Edit, frame: Frame) -> tuple[int, int]:
        grid = frame.pixels.shape[0] // self.cell, frame.pixels.shape[1] // self.cell
        tokens = grid[0] * grid[1] if self.options.whole else int(self._masked_cells(edit, frame, grid).sum())
        return tokens * (1 if self.negative(edit) is None else 2), edit.steps or self.family.steps

    def prompt_key(self, text: str, tenant: str) -> str:
        return hashlib.blake2b(self._fingerprint + f"|{tenant}|{text}".encode(), digest_size=20).hexdigest()

    def negative(self, edit: Edit) -> str | None:
        if self.family.guidance is None and edit.guidance is not None:
            raise InvalidOption("this checkpoint is distilled and takes no guidance; leave it out.")
        if self.family.embeds_guidance or self.family.guidance is None:
            return None
        guidance = self.family.guidance if edit.guidance is None else edit.guidance
        return "" if guidance > 1 else None

    @torch.inference_mode()
    def encode_document(self, frame: Frame) -> Document:
        if frame.blank:
            if not self.family.grey:
                return self._nothing(frame)
            frame = replace(frame, pixels=np.full_like(frame.pixels, 128))
        grids = [self._encode(pixels) for pixels in (frame.pixels, *frame.references)]
        positions = []
        for index, grid in enumerate(grids):
            cells = torch.arange(grid.shape[0] * grid.shape[1], device=self.device)
            positions.append(cell_positions(cells, grid.shape[1], REFERENCE_TIME * (index + 1)))
        tokens, place = torch.cat([grid.flatten(0, 1) for grid in grids]), torch.cat(positions)
        if not self.family.cached:
            return Document(frame.key, grids[0], (), tokens, place)
        layout = Reference()
        at_zero = transformer.modulate_at(self.transformer, torch.zeros(1, device=self.device))
        rope = transformer.rope_of(self.transformer, place)
        transformer.encode_reference(self.transformer, tokens.to(self.dtype), at_zero, rope, layout)
        keys: Any = layout.keys
        if self.options.keys != "exact":
            keys = [tuple(compact(part, self.options.keys) for part in pair) for pair in keys]
        return Document(frame.key, grids[0], tuple(keys), tokens[:0], place[:0])

    def _nothing(self, frame: Frame) -> Document:
        """A document that no token sees; its grid of zeros only gives the size."""
        channels = self.transformer.config.in_channels
        grid = torch.zeros(frame.pixels.shape[0] // self.cell, frame.pixels.shape[1] // self.cell, channels, device=self.device)
        reference = torch.zeros(0, channels, device=self.device)
        return Document(frame.key, grid, (), reference, torch.zeros(0, 4, dtype=torch.int64, device=self.device))

    def _encode(self, pixels: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 -> (h, w, C) float32."""
        return latents.encode(self.vae, latents.pixels_of(pixels[None], self.device, self.vae.dtype))[0]

    @torch.inference_mode()
    def encode_prompt(self, text: str, tenant: str = "") -> Prompt:
        with self._reading:  # the one tokenizer is set to each text's length
            return Prompt(self.prompt_key(text, tenant), self._embedded(text))

    def _embedded(self, text: str) -> Tensor:
        """(T, joint_attention_dim)."""
        layers, longest = list(self.family.out_layers), self.family.max_sequence_length
        if self.family.embeds_guidance:
            embedded = Flux2Pipeline._get_mistral_3_small_prompt_embeds(
                self.text_encoder, self.tokenizer, text, max_sequence_length=longest, hidden_states_layers=layers
            )
            return embedded[0]
        count = self.count_tokens(text)
        if count > longest:
            raise InvalidPrompt(f"the prompt has {count:,} tokens; this model reads {longest}. Make it shorter.")
        embedded = Flux2KleinKVPipeline._get_qwen3_prompt_embeds(
            self.text_encoder, self.tokenizer, text,
            max_sequence_length=longest if self.family.pad_prompts else count, hidden_states_layers=layers,
        )  # fmt: skip
        return embedded[0]

    def count_tokens(self, text: str) -> int:
        """How many tokens a prompt has, the chat template's included; not for checkpoints that embed guidance."""
        message = [{"role": "user", "content": text}]
        chat = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return len(self.tokenizer(chat)["input_ids"])

    @torch.inference_mode()
    def start(self, edit: Edit, frame: Frame, document: Document, prompt: Prompt, negative: Prompt | None) -> Job:
        rows, columns, channels = document.tokens.shape
        masked = self._masked_cells(edit, frame, (rows, columns)).to(self.device)
        cells = torch.arange(rows * columns, device=self.device) if self.options.whole else masked.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(edit.seed)
        noise = torch.randn((1, channels, rows, columns), generator=generator)
        noise = noise.flatten(2)[0].T.to(self.device)[cells]
        guidance = self.family.guidance if edit.guidance is None else edit.guidance
        sigmas = self.sigmas(edit.steps or self.family.steps, rows * columns)
        known = ~masked if self.options.whole and not bool(masked.all()) else None
        job = Job(edit, frame, document, prompt, negative, guidance, cells, known, noise, noise, sigmas)
        job.usage.tokens_whole = rows * columns * job.steps
        return job

    def _masked_cells(self, edit: Edit, frame: Frame, grid: tuple[int, int]) -> Tensor:
        """(rows * columns,) bool: the cells an edit may change."""
        if edit.mask is None:
            return torch.ones(grid[0] * grid[1], dtype=torch.bool)
        x0, y0, x1, y1 = frame.box
        mask = edit.mask[y0:y1, x0:x1]
        if frame.scale < 1:
            grey = Image.fromarray(mask.astype(np.uint8) * 255).resize(frame.inner, Image.Resampling.BOX, reducing_gap=None)
            mask = np.asarray(grey) > 0
        return torch.from_numpy(latents.cells_of(mask, self.cell, self.options.dilate).ravel())

    def _sigmas(self, steps: int, tokens: int) -> tuple[float, ...]:
        """The checkpoint's own noise schedule, as the diffusers pipelines set it; `steps` + 1 values down to 0."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.schedule)
        even = None if scheduler.config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(steps, sigmas=even, mu=compute_empirical_mu(tokens, steps))
        return tuple(scheduler.sigmas.tolist())

    @torch.inference_mode()
    def step(self, jobs: Sequence[Job]) -> None:
        segments = [Segment(job, prompt) for job in jobs for prompt in (job.prompt, job.negative) if prompt]
        pack = Packed(segments)
        guidance = None
        if self.family.embeds_guidance:
            guidance = torch.tensor([segment.job.guidance for segment in pack.segments], device=self.device)
        modulation = pack.gather(transformer.modulate_at(self.transformer, pack.sigmas(), guidance))
        rope = transformer.rope_of(self.transformer, pack.positions())
        out = transformer.denoise(self.transformer, pack.image(self.dtype), pack.text(self.dtype), modulation, rope, pack)
        velocities = {(s.job, s.prompt): v for s, v in zip(pack.segments, pack.velocities(out.float()), strict=True)}
        for job in jobs:
            velocity = velocities[job, job.prompt]
            if job.negative is not None and job.guidance is not None:
                without = velocities[job, job.negative]
                velocity = without + job.guidance * (velocity - without)
            self._advance(job, velocity)

    def _advance(self, job: Job, velocity: Tensor) -> None:
        """One Euler step; where every cell is computed, known ones go back to the document's, noised for the next step."""
        sigma, following = job.sigmas[job.step], job.sigmas[job.step + 1]
        job.estimate = job.latents - sigma * velocity
        job.latents = job.latents + (following - sigma) * velocity
        if job.known is not None:
            clean = job.document.tokens.flatten(0, 1)[job.cells]
            job.latents = torch.where(job.known[:, None], torch.lerp(clean, job.noise, following), job.latents)
        job.step += 1
        job.usage.steps = job.step
        job.usage.tokens_computed += len(job.cells)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """A stream of this thread's own on a GPU; a CPU has no such thing."""
        if self.device.type != "cuda":
            yield
            return
        if not hasattr(self._apart, "stream"):
            self._apart.stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._apart.stream):
            yield

    @torch.inference_mode()
    def finish(self, job: Job) -> np.ndarray:
        return self._composed(job, job.latents, self._decode)

    @torch.inference_mode()
    def preview(self, job: Job) -> np.ndarray:
        assert job.estimate is not None
        return self._composed(job, job.estimate, self._sketched)

    def _composed(self, job: Job, computed: Tensor, decode: Decode) -> np.ndarray:
        edit, frame = job.edit, job.frame
        tokens = job.document.tokens.clone()
        tokens.view(-1, tokens.shape[-1])[job.cells] = computed
        y0, x0, crop = decode(tokens, self._region(job))
        # Back to the picture's pixels: the region without what pads the frame to whole cells.
        box = frame.box
        width, height = frame.inner
        crop = crop[: height - y0, : width - x0]
        if frame.scale < 1:
            full = frame.pixels[:height, :width].copy()
            full[y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]] = crop
            size = (box[2] - box[0], box[3] - box[1])
            crop, y0, x0 = np.asarray(Image.fromarray(full).resize(size, Image.Resampling.BICUBIC)), 0, 0
        left, top = box[0] + x0, box[1] + y0
        place = (left, top, left + crop.shape[1], top + crop.shape[0])
        mask = np.ones(edit.image.shape[:2], bool) if edit.mask is None else edit.mask
        return picture.composite(edit.image, crop, mask, place, round(self.options.feather / frame.scale))

    def _region(self, job: Job) -> tuple[int, int, int, int]:
        """Rows and columns of cells that hold all masked ones: (top, bottom, left, right), half open."""
        columns = job.document.tokens.shape[1]
        cells = job.cells if job.known is None else job.cells[~job.known]
        row, column = cells // columns, cells % columns
        return int(row.min()), int(row.max()) + 1, int(column.min()), int(column.max()) + 1

    def _sketched(self, tokens: Tensor, region: tuple[int, int, int, int]) -> tuple[int, int, np.ndarray]:
        """As `_decode`, by the preview's matrix."""
        top, bottom, left, right = region
        with self._fitting:
            if self._sketch is None:
                self._sketch = Sketch(self._encode, self.cell)
        return top * self.cell, left * self.cell, self._sketch(tokens[top:bottom, left:right])

    def _decode(self, tokens: Tensor, region: tuple[int, int, int, int]) -> tuple[int, int, np.ndarray]:
        """Decode the region with its halo; returns the region's first pixel row and column, and its pixels, uint8."""
        top, bottom, left, right = region
        halo = max(tokens.shape[:2]) if self.options.halo is None else self.options.halo
        t, l = max(0, top - halo), max(0, left - halo)  # noqa: E741
        part = tokens[t : min(tokens.shape[0], bottom + halo), l : min(tokens.shape[1], right + halo)]
        pixels = latents.pictures_of(latents.decode(self.vae, part[None]))[0]
        side = self.cell
        inner = pixels[(top - t) * side : (bottom - t) * side, (left - l) * side : (right - l) * side]
        return top * side, left * side, inner
