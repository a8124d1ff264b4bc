"""The FLUX.1 family: Fill, Kontext (inpainting too), and dev and schnell, which draw from text alone.

How each sees the document (`Family.sees`), and what edits of one document share:

- `channels` (Fill): latents of the picture with the mask's hole in it, and the mask itself, lie beside the noisy tokens. They
  depend on the mask, and on the seed too (diffusers draws them from the encoder's distribution), so `start` makes them for each
  edit. Shared are the latents of the whole picture, which the decoder's halo and partial steps need. Without a mask all of the
  picture is in the hole, and nothing of it is seen.
- `sequence` (Kontext): its latents run along as tokens at rotary time 1. They see the noisy ones, so that nothing but latents
  can be kept. A further picture takes the document's place there, as in FluxKontextInpaintPipeline.
- `nothing` (dev, schnell): noise alone. With a mask, known cells are set back to the noised document after each step.

diffusers' Kontext scales the picture to one of 17 sizes of about a megapixel, and its answer to a megapixel. Here the picture
keeps its size, padded to whole cells; only what is longer than the checkpoint's `max_side` is scaled down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retouch.edit import CheckpointMismatch, Edit, InvalidMask, InvalidPrompt
from retouch.models import flux1_transformer, latents, transformer
from retouch.models.adapter import Adapter
from retouch.models.base import PROMPT_OF_TEXT, Document, Frame, Job, Prompt, Traits
from retouch.models.checkpoint import Family
from retouch.models.framing import framed_mask
from retouch.models.options import Options
from retouch.models.packing import Packed, cell_positions
from retouch.models.schedule import flow_sigmas, shift_of

REFERENCE_TIME = 1
"""Rotary time coordinate of the picture in the sequence (FluxKontextPipeline.prepare_latents)."""


class Flux1(Adapter):
    """Over the parts of a FLUX.1 diffusers pipeline."""

    def __init__(self, pipeline: Any, family: Family, fingerprint: str = "", options: Options | None = None) -> None:
        super().__init__(pipeline, family, fingerprint, options)
        self.transformer = pipeline.transformer.eval()
        self.clip, self.clip_tokenizer = pipeline.text_encoder.eval(), pipeline.tokenizer
        self.t5, self.t5_tokenizer = pipeline.text_encoder_2.eval(), pipeline.tokenizer_2
        self.fills = family.sees == "channels"
        self.renoised = not self.fills
        self.channels = int(self.transformer.out_channels)
        self._check()

    def _check(self) -> None:
        wanted = self.channels + (self.channels + self.cell**2 if self.fills else 0)
        if (got := self.transformer.config.in_channels) != wanted:
            raise CheckpointMismatch(
                f"its transformer reads {got} channels, and a pipeline that sees documents as {self.family.sees} gives it "
                f"{wanted}; the parts do not belong together."
            )
        if self.transformer.config.guidance_embeds != self.family.embeds_guidance:
            raise CheckpointMismatch(
                f"embeds_guidance is {self.family.embeds_guidance}, but the transformer's guidance_embeds is not; mend "
                "retouch.json."
            )

    @classmethod
    def traits(cls, family: Family) -> Traits:
        return Traits(
            packing="ragged",
            masked="exact" if family.masked else "approximate",
            document="latents",
            prompt=PROMPT_OF_TEXT,
            guidance="embedded" if family.embeds_guidance else "none",
            references=family.references,
            decode="approximate",
            outside="exact",
        )

    def _denoiser(self, pipeline: Any) -> Any:
        return pipeline.transformer

    def _cell_side(self) -> int:
        return int(2 ** len(self.vae.config.block_out_channels))

    def frame(self, edit: Edit) -> Frame:
        frame = super().frame(edit)
        if edit.mask is None and edit.references:
            raise InvalidMask(
                "this checkpoint looks at a further picture in the document's place; give a mask of what to change in the "
                "document, or edit the further picture itself."
            )
        return frame

    def _running(self, frame: Frame) -> Sequence[np.ndarray]:
        """The document, or a further picture in its place."""
        if frame.blank or self.family.sees != "sequence":
            return ()
        return frame.references[:1] or (frame.pixels,)

    @torch.inference_mode()
    def encode_document(self, frame: Frame) -> Document:
        shown = torch.zeros(0, 0, self.channels, device=self.device)
        if frame.blank:
            tokens = torch.zeros(*self._grid(frame), self.channels, device=self.device)
        else:
            tokens = self._encode(frame.pixels)
            if self.family.sees == "sequence":
                shown = self._encode(frame.references[0]) if frame.references else tokens.clone()  # its own, on disk too
        cells = torch.arange(shown.shape[0] * shown.shape[1], device=self.device)
        positions = cell_positions(cells, max(1, shown.shape[1]), REFERENCE_TIME)
        return Document(frame.key, tokens, (), shown.flatten(0, 1), positions)

    def _encode(self, pixels: np.ndarray) -> Tensor:
        return self._tokens(latents.pixels_of(pixels[None], self.device, self.vae.dtype))

    def _tokens(self, pixels: Tensor, draw: Tensor | None = None) -> Tensor:
        """(1, 3, H, W) -> tokens (h, w, C): the encoder's mean, or, with a normal `draw` (1, C / 4, 2 h, 2 w), a sample."""
        found = self.vae.encode(pixels).latent_dist
        drawn = found.mode().float() if draw is None else found.mean.float() + found.std.float() * draw
        return latents.patchify((drawn - self.vae.config.shift_factor) * self.vae.config.scaling_factor)[0]

    def _latents(self, tokens: Tensor) -> Tensor:
        return latents.unpatchify(tokens[None].float()) / self.vae.config.scaling_factor + self.vae.config.shift_factor

    def _pixels(self, of: Tensor) -> np.ndarray:
        return latents.pictures_of(latents.of_decoder(self.vae, of))[0]

    def _read(self, key: str, text: str, document: Document) -> Prompt:
        """T5 reads all of the text. CLIP, whose pooled output modulates, reads its first 77 tokens, as FLUX.1 was trained."""
        longest = self.family.max_sequence_length
        count = len(self.t5_tokenizer(text).input_ids)
        if count > longest:
            raise InvalidPrompt(f"the prompt has {count:,} tokens; this model reads {longest}. Make it shorter.")
        padded = {"padding": "max_length", "max_length": longest} if self.family.pad_prompts else {}
        words = self.t5_tokenizer(text, return_tensors="pt", **padded).input_ids
        first = self.clip_tokenizer(
            text, padding="max_length", truncation=True, max_length=self.clip_tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
        pooled = self.clip(first.to(self.device)).pooler_output[0]
        return Prompt(key, self.t5(words.to(self.device))[0][0], pooled)

    def _sigmas(self, steps: int, tokens: int) -> tuple[float, ...]:
        return flow_sigmas(self.schedule, steps, shift_of(self.schedule, tokens))

    @torch.inference_mode()
    def start(self, edit: Edit, frame: Frame, document: Document, prompt: Prompt, negative: Prompt | None) -> Job:
        job = super().start(edit, frame, document, prompt, negative)
        if self.fills:
            job.condition = self._hole(edit, frame).flatten(0, 1)[job.cells]
        return job

    def _hole(self, edit: Edit, frame: Frame) -> Tensor:
        """(h, w, C + cell²): latents of the picture with the mask's hole, which is grey, and the mask, pixel by pixel.

        What pads the frame to whole cells repeats the mask's last row and column, as it does the picture's.
        """
        mask = framed_mask(edit, frame)
        missing = [(0, whole - inner) for whole, inner in zip(frame.pixels.shape[:2], mask.shape, strict=True)]
        hole = torch.from_numpy(np.pad(mask, missing, mode="edge")).to(self.device)
        rows, columns = self._grid(frame)
        draw = self._draw(edit.seed, (rows, columns, self.channels), 2)
        seen = self._tokens(latents.pixels_of(frame.pixels[None], self.device, self.vae.dtype) * ~hole, draw)
        side = self.cell // 2
        inside = hole.float().view(2 * rows, side, 2 * columns, side).permute(1, 3, 0, 2).flatten(0, 1)
        return torch.cat([seen, latents.patchify(inside[None])[0]], -1)

    def _noise(self, seed: int, shape: Sequence[int]) -> Tensor:
        return latents.patchify(self._draw(seed, shape, 1 if self.fills else 0))[0]

    def _draw(self, seed: int, shape: Sequence[int], before: int) -> Tensor:
        """(1, C / 4, 2 h, 2 w) for tokens (h, w, C): what a seed gives after so many others of its kind.

        FluxFillPipeline draws three: the picture's latents, which full strength leaves unused, the noise, the hole's latents.
        """
        rows, columns, channels = shape
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.randn((1, channels // 4, 2 * rows, 2 * columns), generator=generator) for _ in range(before + 1)]
        return draws[-1].to(self.device)

    def _denoise(self, pack: Packed) -> Tensor:
        segments = pack.segments
        guidance = None
        if self.family.embeds_guidance:
            guidance = torch.tensor([segment.job.guidance for segment in segments], device=self.device)
        pooled: Any = [segment.prompt.pooled for segment in segments]
        embedding = flux1_transformer.embed(self.transformer, pack.sigmas(), torch.stack(pooled), guidance)
        rope = transformer.rope_of(self.transformer, pack.positions())
        # A row for each segment broadcasts where there is one.
        spread = pack.gather if len(segments) > 1 else lambda modulation: modulation
        image, text = pack.image(self.dtype), pack.text(self.dtype)
        return flux1_transformer.denoise(self.transformer, image, text, embedding, rope, pack, spread)
