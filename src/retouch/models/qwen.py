"""The Qwen-Image family: Edit, Edit-Plus (several pictures), inpainting on either, and text to image.

The text encoder is a vision-language model that looks at the pictures before it reads the text. What it made of them (its last
states, and its keys and values) is kept in the Document, so that a further text on the same pictures costs the text alone.

What differs from the stock pipelines, none of it in what the parity tests compare:

- They resize each picture to about a megapixel, up as well as down (1024 x 1024 stays). Here pictures keep their size up to the
  checkpoint's `max_side`; what the vision tower looks at is the padded frame, for Edit-Plus resized to the area of 384 x 384
  pixels as there.
- Inpainting draws the document's latents from the seed; a Document serves all seeds, so here they are the encoder's mean.
- On transformers 5 they give the vision-language model no positions for its picture tokens
  (https://github.com/huggingface/diffusers/issues/14194); here they have the rows and columns that it was trained with.
- An empty negative prompt is one space, as on the checkpoints' cards, and an edit is guided without one, too.
- They refuse an edit without a picture where the checkpoint looks at some; here it looks at a grey one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from retouch.edit import Edit, InvalidPrompt
from retouch.models import latents, qwen_transformer
from retouch.models.adapter import Adapter
from retouch.models.base import PROMPT_OF_TEXT, Document, Frame, Prompt, Traits
from retouch.models.checkpoint import Family
from retouch.models.options import Options
from retouch.models.packing import Packed, Segment
from retouch.models.schedule import flow_sigmas, shift_of
from retouch.models.transformer import rope_of

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
"""Where a picture stands in a text."""

LOOK = 384 * 384
"""Pixels of each picture that Edit-Plus's text encoder looks at (CONDITION_IMAGE_SIZE of its pipeline)."""


class Qwen(Adapter):
    """Over the parts of a Qwen-Image pipeline; with a `processor` among them it looks at pictures."""

    channels_last = False

    def __init__(self, pipeline: Any, family: Family, fingerprint: str = "", options: Options | None = None) -> None:
        super().__init__(pipeline, family, fingerprint, options)
        self.transformer = pipeline.transformer.eval()
        self.text_encoder, self.tokenizer = pipeline.text_encoder.eval(), pipeline.tokenizer
        processor = getattr(pipeline, "processor", None)
        self.look: Any = getattr(processor, "image_processor", processor)
        self.before, self.after = pipeline.prompt_template_encode.split("{}")
        self.several = self.look is not None and PICTURE not in self.before
        self.dropped = pipeline.prompt_template_encode_start_idx

    @classmethod
    def traits(cls, family: Family) -> Traits:
        blind = family.sees == "nothing"
        return Traits(
            packing="ragged",
            masked="exact" if family.masked else "approximate",
            document="latents" if blind else "latents, and what the text encoder saw",
            prompt=PROMPT_OF_TEXT if blind else "for its text and pictures",
            guidance="two passes",
            references=family.references,
            decode="approximate",
            outside="exact",
        )

    def _denoiser(self, pipeline: Any) -> Any:
        return pipeline.transformer

    def _cell_side(self) -> int:
        return 2 * 2 ** len(self.vae.temperal_downsample)

    def negative(self, edit: Edit) -> str | None:
        return " " if (text := super().negative(edit)) == "" else text

    def _running(self, frame: Frame) -> Sequence[np.ndarray]:
        return () if self.look is None else (frame.pixels, *frame.references)

    @torch.inference_mode()
    def encode_document(self, frame: Frame) -> Document:
        """A picture from nothing has no document, or a grey one where the checkpoint has always seen some."""
        if self.look is None:
            channels = self.transformer.config.in_channels
            nothing = torch.zeros(*self._grid(frame), channels, device=self.device)
            place = torch.zeros(0, 4, dtype=torch.int64, device=self.device)
            return Document(frame.key, nothing if frame.blank else self._encode(frame.pixels), (), nothing[0, :0], place)
        pictures = (np.full_like(frame.pixels, 128) if frame.blank else frame.pixels, *frame.references)
        grids, places = [self._encode(pixels) for pixels in pictures], []
        for time, grid in enumerate(grids, 1):
            rows, columns = grid.shape[:2]
            cells = torch.arange(rows * columns, device=self.device)
            places.append(qwen_transformer.cell_positions(cells, (rows, columns), time))
        tokens = torch.cat([grid.flatten(0, 1) for grid in grids])
        return Document(frame.key, grids[0], (), tokens, torch.cat(places), self._looked(pictures))

    def _looked(self, pictures: Sequence[np.ndarray]) -> tuple[Tensor, ...]:
        """What the text encoder makes of all that comes before the text: its last states (P, dim) without the first, which the
        pipelines drop, its keys and values (layers, 2, heads, P + dropped, head_dim), and the position (1,) of the text.
        """
        model = self.text_encoder.model
        shown = [Image.fromarray(_sized(pixels, LOOK) if self.several else pixels) for pixels in pictures]
        read = self.look(images=shown, return_tensors="pt").to(self.device)
        counts = iter((read["image_grid_thw"].prod(-1) // self.look.merge_size**2).tolist())
        names = "".join(f"Picture {number}: {PICTURE}" for number in range(1, len(pictures) + 1)) if self.several else ""
        place = self.text_encoder.config.image_token_id
        words = self.tokenizer(self.before + names)["input_ids"]
        ids = self._ids([word for word in words for _ in range(next(counts) if word == place else 1)])
        kinds, grid = (ids == place).int(), read["image_grid_thw"]
        positions, further = model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)
        out = model(
            input_ids=ids, position_ids=positions, pixel_values=read["pixel_values"], image_grid_thw=grid, use_cache=True
        )
        keys = torch.stack([torch.cat(pair[:2]) for pair in out.past_key_values])
        return out.last_hidden_state[0, self.dropped :], keys, further[0] + ids.shape[1]

    def _ids(self, words: list[int]) -> Tensor:
        return torch.tensor([words], device=self.device)

    def _encode(self, pixels: np.ndarray) -> Tensor:
        """The autoencoder is one for videos; past its first frame it would keep state, so its parts are called without."""
        x = latents.pixels_of(pixels[None], self.device, self.vae.dtype)[:, :, None]
        moments = DiagonalGaussianDistribution(self.vae.quant_conv(self.vae.encoder(x)))
        mean, spread = self._statistics()
        return latents.patchify((moments.mode()[:, :, 0].float() - mean) / spread)[0]

    def _latents(self, tokens: Tensor) -> Tensor:
        mean, spread = self._statistics()
        return (latents.unpatchify(tokens[None].float()) * spread + mean)[:, :, None].to(self.vae.dtype)

    def _pixels(self, of: Tensor) -> np.ndarray:
        return latents.pictures_of(self.vae.decoder(self.vae.post_quant_conv(of))[:, :, 0])[0]

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of latents, (C, 1, 1) each."""
        config = self.vae.config
        both = torch.tensor([config.latents_mean, config.latents_std], device=self.device)[..., None, None]
        return both[0], both[1]

    def _noise(self, seed: int, shape: Sequence[int]) -> Tensor:
        rows, columns, channels = shape
        drawn = torch.randn((channels // 4, 2 * rows, 2 * columns), generator=torch.Generator().manual_seed(seed))
        return latents.patchify(drawn[None])[0].to(self.device)

    def prompt_key(self, text: str, tenant: str, frame: Frame) -> str:
        """Where the text encoder sees the pictures, a text has another key beside others."""
        return super().prompt_key(text, tenant if self.look is None else f"{tenant}|{frame.key}", frame)

    def _read(self, key: str, text: str, document: Document) -> Prompt:
        model, longest = self.text_encoder.model, self.family.max_sequence_length
        words = self.tokenizer(text + self.after)["input_ids"]
        if len(words) > longest:
            raise InvalidPrompt(f"the prompt has {len(words):,} tokens; this model reads {longest}. Make it shorter.")
        if not document.prefix:
            ids = self._ids(self.tokenizer(self.before + text + self.after)["input_ids"])
            return Prompt(key, model(input_ids=ids, use_cache=False).last_hidden_state[0, self.dropped :])
        before, keys, start = document.prefix
        ids = self._ids(words)
        positions = (torch.arange(len(words), device=self.device) + start).expand(3, 1, -1)
        known = DynamicCache([(pair[:1], pair[1:]) for pair in keys])
        out = model(input_ids=ids, position_ids=positions, past_key_values=known, use_cache=True)
        return Prompt(key, torch.cat([before, out.last_hidden_state[0]]))

    def _sigmas(self, steps: int, tokens: int) -> tuple[float, ...]:
        """A single step goes all the way: to stretch the schedule to its last step (`shift_terminal`) divides by 0 there."""
        return (1.0, 0.0) if steps == 1 else flow_sigmas(self.schedule, steps, shift_of(self.schedule, tokens))

    def _guided(self, velocity: Tensor, without: Tensor, guidance: float) -> Tensor:
        """Each token's velocity as long as it is with the prompt alone."""
        guided = super()._guided(velocity, without, guidance)
        return guided * (velocity.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def _denoise(self, pack: Packed) -> Tensor:
        embedded = qwen_transformer.embed_times(self.transformer, pack.sigmas())
        rows = pack.row_of_image
        if self.transformer.config.zero_cond_t:
            zero = qwen_transformer.embed_times(self.transformer, torch.zeros(len(pack.segments), device=self.device))
            embedded, rows = torch.cat([embedded, zero]), self._rows(pack)
        times = qwen_transformer.Times(embedded, rows, pack.row_of_text)
        rope = rope_of(self.transformer, torch.cat([part for segment in pack.segments for part in _positions(segment)]))
        return qwen_transformer.denoise(
            self.transformer, pack.image(self.dtype), pack.text(self.dtype), times, rope, pack
        )  # fmt: skip

    def _rows(self, pack: Packed) -> Tensor:
        """Which timestep each image token has: its segment's, or, of references, its segment's zero after all of those."""
        count, parts = len(pack.segments), []
        for row, segment in enumerate(pack.segments):
            parts += [torch.full((len(segment.cells),), row), torch.full((len(segment.reference),), count + row)]
        return torch.cat(parts).to(self.device)


def _positions(segment: Segment) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates of a segment's text, its noisy cells and its references, in the order in which they lie in a pack."""
    document = segment.job.document
    grid = (document.tokens.shape[0], document.tokens.shape[1])
    text = qwen_transformer.text_positions(len(segment.prompt.embedded), grid, document.positions)
    return text, qwen_transformer.cell_positions(segment.cells, grid, 0), segment.places


def _sized(pixels: np.ndarray, area: int) -> np.ndarray:
    """Resized to about so many pixels, sides multiples of 32, as the stock pipelines do."""
    ratio = pixels.shape[1] / pixels.shape[0]
    width = math.sqrt(area * ratio)
    size = [max(1, round(side / 32)) * 32 for side in (width, width / ratio)]
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
