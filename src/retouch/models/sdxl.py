"""The Stable Diffusion family on its UNet: SDXL-inpaint with nine channels, SDXL with four, and Stable Diffusion inpainting.

Sigmas are those of `EulerDiscreteScheduler`: noisy latents are clean ones plus sigma times the noise, so that sigmas start far
above 1 (Karras et al. 2022, arXiv:2206.00364). Tokens are single latents, cells of 8 pixels. A UNet computes every cell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from retouch.edit import CheckpointMismatch, Edit, InvalidOption, InvalidPrompt
from retouch.models import latents, lora
from retouch.models.adapter import Adapter
from retouch.models.base import PROMPT_OF_TEXT, Document, Frame, Job, Prompt, Traits
from retouch.models.checkpoint import Family
from retouch.models.framing import framed_mask
from retouch.models.options import Options
from retouch.models.packing import Packed, Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Holed(Frame):
    """The frame of a checkpoint that is shown the picture without what is to be edited: `hole` (h, w) bool in `pixels`."""

    hole: np.ndarray


class StableDiffusion(Adapter):
    """Over the parts of a Stable Diffusion (XL) pipeline.

    A Document's `tokens` are the means of its latents, its `reference` their deviations, (h * w, C) with no positions: the
    stock pipelines draw the latents from both with the edit's generator. With nine channels it is the picture with a hole where
    the mask is, so that it serves every edit of the same mask; with four it is the whole picture.
    """

    refreshes = False

    def __init__(self, pipeline: Any, family: Family, fingerprint: str = "", options: Options | None = None) -> None:
        super().__init__(pipeline, family, fingerprint, options)
        if not self.whole:
            raise InvalidOption("a UNet computes every cell; leave the option whole out.")
        self.unet = pipeline.unet.eval()
        self.holed = self.unet.config.in_channels == 9
        self.renoised = not self.holed
        encoders = [(pipeline.tokenizer, pipeline.text_encoder)]
        self.pooled = getattr(pipeline, "text_encoder_2", None) is not None
        if self.pooled:
            encoders.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
        self.encoders = encoders
        self.zeros = bool(pipeline.config.get("force_zeros_for_empty_prompt"))
        self._euler = type(pipeline.scheduler) is EulerDiscreteScheduler
        self.schedule_of = lru_cache(maxsize=256)(self._schedule_of)
        if self.vae.config.force_upcast:
            self.vae.float()
        self._check(pipeline)

    def _check(self, pipeline: Any) -> None:
        """Raises CheckpointMismatch for what the stock pipelines know and this adapter does not."""
        unet, prediction = self.unet.config, self.schedule.get("prediction_type", "epsilon")
        wrong = {
            f"a UNet of {unet.in_channels} channels; served are 4 and 9": unet.in_channels not in (4, 9),
            "no first text encoder (a refiner)": pipeline.text_encoder is None,
            "an aesthetic score among its conditions": bool(pipeline.config.get("requires_aesthetics_score")),
            "guidance embedded in its UNet (a consistency model)": unet.time_cond_proj_dim is not None,
            "latents with a mean of their own": getattr(self.vae.config, "latents_mean", None) is not None,
            f"prediction of {prediction}; served are epsilon and v_prediction": prediction not in ("epsilon", "v_prediction"),
            "a schedule that does not end at 0": self.schedule.get("final_sigmas_type", "zero") != "zero",
        }
        if found := [what for what, is_so in wrong.items() if is_so]:
            raise CheckpointMismatch(f"the checkpoint has {found[0]}. Give one that does without.")

    @classmethod
    def traits(cls, family: Family) -> Traits:
        return Traits(
            packing="dense batches by size",
            masked="no",
            document="latents (with nine channels of one mask)",
            prompt=PROMPT_OF_TEXT,
            guidance="two passes",
            references=0,
            decode="approximate",
            outside="exact",
        )

    @property
    def approximate(self) -> tuple[str, ...]:
        return super().approximate if self._euler else (*super().approximate, "Euler steps")

    def _denoiser(self, pipeline: Any) -> Any:
        return pipeline.unet

    def _cell_side(self) -> int:
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def _fit(self, pixels: np.ndarray, scale: float) -> np.ndarray:
        """Padded to what the UNet can halve as often as it does."""
        return self._padded(super()._fit(pixels, scale))

    def _padded(self, pixels: np.ndarray) -> np.ndarray:
        multiple = self.cell * 2 ** (len(self.unet.config.block_out_channels) - 1)
        missing = [(0, -side % multiple) for side in pixels.shape[:2]]
        return np.pad(pixels, [*missing, *[(0, 0)] * (pixels.ndim - 2)], mode="edge")

    def frame(self, edit: Edit) -> Frame:
        whole = super().frame(edit)
        if not self.holed:
            return whole
        hole = self._padded(framed_mask(edit, whole))
        key = hashlib.blake2b(whole.key.encode() + np.packbits(hole).tobytes(), digest_size=20).hexdigest()
        return Holed(whole.box, whole.scale, whole.pixels, (), key, whole.blank, whole.adapters, hole=hole)

    @torch.inference_mode()
    def encode_document(self, frame: Frame) -> Document:
        place = torch.zeros(0, 4, dtype=torch.int64, device=self.device)
        if frame.blank and not self.holed:  # no step looks at it: it gives the size alone
            grid = torch.zeros(*self._grid(frame), self.vae.config.latent_channels, device=self.device)
            return Document(frame.key, grid, (), grid.flatten(0, 1), place)
        pixels = latents.pixels_of(frame.pixels[None], self.device, self.vae.dtype)
        if isinstance(frame, Holed):
            pixels = pixels * torch.from_numpy(~frame.hole).to(pixels)
        found = self.vae.encode(pixels).latent_dist
        return Document(frame.key, self._tokens(found.mean), (), self._tokens(found.std).flatten(0, 1), place)

    def _encode(self, pixels: np.ndarray) -> Tensor:
        return self._tokens(self.vae.encode(latents.pixels_of(pixels[None], self.device, self.vae.dtype)).latent_dist.mean)

    def _tokens(self, encoded: Tensor) -> Tensor:
        """(1, C, h, w) -> (h, w, C), scaled as the UNet has seen them."""
        return (self.vae.config.scaling_factor * encoded[0].float()).permute(1, 2, 0).contiguous()

    def _latents(self, tokens: Tensor) -> Tensor:
        return tokens.permute(2, 0, 1)[None] / self.vae.config.scaling_factor

    def _pixels(self, of: Tensor) -> np.ndarray:
        return latents.pictures_of(latents.of_decoder(self.vae, of))[0]

    def _read(self, key: str, text: str, document: Document) -> Prompt:
        parts, pooled = [], None
        for tokenizer, encoder in self.encoders:
            longest = tokenizer.model_max_length
            if (count := len(tokenizer(text)["input_ids"])) > longest:
                raise InvalidPrompt(f"the prompt has {count:,} tokens; this model reads {longest}. Make it shorter.")
            ids = tokenizer(text, padding="max_length", max_length=longest, return_tensors="pt").input_ids.to(self.device)
            found = encoder(ids, output_hidden_states=self.pooled)
            parts.append(found.hidden_states[-2][0] if self.pooled else found[0][0])
            pooled = found[0][0] if self.pooled else None  # of the last encoder
        embedded = torch.cat(parts, -1)
        if self.zeros and not text:
            embedded, pooled = torch.zeros_like(embedded), None if pooled is None else torch.zeros_like(pooled)
        return Prompt(key, embedded, pooled)

    def _sigmas(self, steps: int, tokens: int) -> tuple[float, ...]:
        return tuple(self.schedule_of(steps).sigmas.tolist())

    def _schedule_of(self, steps: int) -> EulerDiscreteScheduler:
        """Never stepped, as that would change it: Jobs share it. Raises InvalidOption for a number of steps it has not."""
        scheduler = EulerDiscreteScheduler.from_config(self.schedule)
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) != steps or len(scheduler.sigmas) != steps + 1:  # its spacing may round to one more
            raise InvalidOption(f"this checkpoint's schedule has no {steps} steps; give one more, or one less.")
        return scheduler

    def start(self, edit: Edit, frame: Frame, document: Document, prompt: Prompt, negative: Prompt | None) -> Job:
        """The seed's generator gives the noise and what the document's latents are drawn with, in the order of the stock
        pipelines: this one with nine channels, the other with four; from nothing, the noise alone.
        """
        rows, columns, channels = document.tokens.shape
        generator = torch.Generator().manual_seed(edit.seed)
        drawn = [torch.randn((channels, rows, columns), generator=generator) for _ in range(2)]
        if not self.holed and not frame.blank:
            drawn.reverse()
        noise, spread = (part.permute(1, 2, 0).to(self.device) for part in drawn)
        tokens = document.tokens + spread * document.reference.view(document.tokens.shape)
        job = super().start(edit, frame, replace(document, tokens=tokens, reference=document.reference[:0]), prompt, negative)
        job.noise = noise.flatten(0, 1)
        job.latents = job.noise * float(self.schedule_of(job.steps).init_noise_sigma)
        if isinstance(frame, Holed):
            marked = torch.from_numpy(frame.hole[:: self.cell, :: self.cell].copy()).to(tokens)
            job.condition = torch.cat([marked[..., None], tokens], -1).flatten(0, 1)
        return job

    def _denoise(self, pack: Packed) -> Tensor:
        """Segments of one size are one batch of the UNet, whatever their timesteps."""
        sizes: dict[tuple[int, ...], list[int]] = {}
        for index, segment in enumerate(pack.segments):
            sizes.setdefault(tuple(segment.job.document.tokens.shape), []).append(index)
        out: dict[int, Tensor] = {}
        for size, indices in sizes.items():
            out |= zip(indices, self._batch([pack.segments[i] for i in indices], size), strict=True)
        return torch.cat([out[i] for i in range(len(pack.segments))])

    def _batch(self, segments: Sequence[Segment], size: tuple[int, ...]) -> Tensor:
        """Of B segments with (h, w, C) tokens: the slopes (x - clean) / sigma, (B, h * w, C)."""
        jobs = [segment.job for segment in segments]
        x = torch.stack([job.latents for job in jobs])
        sigma = torch.tensor([job.sigma for job in jobs], device=self.device)[:, None, None]
        parts = [x / (sigma**2 + 1).sqrt()]
        if self.holed:
            parts.append(torch.stack([job.condition for job in jobs if job.condition is not None]))
        image = torch.cat(parts, -1).transpose(1, 2).unflatten(2, size[:2])
        times = torch.stack([self.schedule_of(job.steps).timesteps[job.step] for job in jobs]).to(self.device)
        text = torch.stack([segment.prompt.embedded for segment in segments])
        with lora.worn(lora.dense(jobs)):
            out = self.unet(
                image.to(self.dtype), times, encoder_hidden_states=text.to(self.dtype),
                added_cond_kwargs=self._added(segments, size), return_dict=False,
            )[0].float().flatten(2).transpose(1, 2)  # fmt: skip
        if self.schedule.get("prediction_type", "epsilon") == "epsilon":
            return out
        clean = x / (sigma**2 + 1) - out * sigma / (sigma**2 + 1).sqrt()
        return (x - clean) / sigma

    def _added(self, segments: Sequence[Segment], size: tuple[int, ...]) -> dict[str, Tensor] | None:
        """SDXL's further conditions: the pooled text, and the size of the original, its crop and the target's size."""
        if not self.pooled:
            return None
        sides = [size[0] * self.cell, size[1] * self.cell]
        pooled = torch.stack([segment.prompt.pooled for segment in segments if segment.prompt.pooled is not None])
        times = torch.tensor([[*sides, 0, 0, *sides]] * len(segments), device=self.device, dtype=torch.float32)
        return {"text_embeds": pooled.to(self.dtype), "time_ids": times}

    def _noised(self, clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """Noise is added on top here."""
        return clean + sigma * noise
