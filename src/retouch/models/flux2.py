"""The FLUX.2 family: klein-KV (the bundled one too), klein, and dev, over the cells that the mask touches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinKVPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from diffusers.pipelines.flux2.pipeline_flux2_klein_kv import compute_empirical_mu
from torch import Tensor

from retouch.edit import CheckpointMismatch, InvalidPrompt
from retouch.models import latents, lora, transformer
from retouch.models.adapter import Adapter
from retouch.models.base import PROMPT_OF_TEXT, Document, Frame, Prompt, Traits
from retouch.models.checkpoint import Family
from retouch.models.compact import compact
from retouch.models.options import Options
from retouch.models.packing import Packed, Reference, cell_positions
from retouch.models.schedule import flow_sigmas

REFERENCE_TIME = 10
"""Rotary time coordinate of the first reference; each further one is as much later (Flux2Pipeline._prepare_image_ids)."""


class Flux2(Adapter):
    """Over the parts of a FLUX.2 diffusers pipeline."""

    def __init__(self, pipeline: Any, family: Family, fingerprint: str = "", options: Options | None = None) -> None:
        super().__init__(pipeline, family, fingerprint, options)
        self.transformer = pipeline.transformer.eval()
        self.text_encoder, self.tokenizer = pipeline.text_encoder.eval(), pipeline.tokenizer
        self._check_layers()

    def _check_layers(self) -> None:
        """Raises CheckpointMismatch for layers that the text encoder has not, or more or fewer than the transformer reads."""
        layers, config = self.family.out_layers, self.text_encoder.config.get_text_config()
        wide, most = self.transformer.config.joint_attention_dim, config.num_hidden_layers
        if max(layers) > most or len(layers) * config.hidden_size != wide:
            raise CheckpointMismatch(
                f"out_layers is {list(layers)}, but the text encoder has {most} layers of width {config.hidden_size}, and the "
                f"transformer reads {wide} numbers a token: give {wide // config.hidden_size} of them in retouch.json."
            )

    @classmethod
    def traits(cls, family: Family) -> Traits:
        return Traits(
            packing="ragged",
            masked="exact" if family.masked else "approximate",
            document="keys and values, exact" if family.cached else "latents",
            prompt=PROMPT_OF_TEXT,
            guidance="embedded" if family.embeds_guidance else "none" if family.guidance is None else "two passes",
            references=family.references,
            decode="approximate",
            outside="exact",
        )

    def _denoiser(self, pipeline: Any) -> Any:
        return pipeline.transformer

    def _cell_side(self) -> int:
        return latents.cell_side(self.vae)

    def _running(self, frame: Frame) -> Sequence[np.ndarray]:
        return () if self.family.cached or (frame.blank and not self.family.grey) else (frame.pixels, *frame.references)

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
        rope = transformer.rope_of(self.transformer, place)
        with lora.worn(lora.alone(self.worn(frame))):
            at_zero = transformer.modulate_at(self.transformer, torch.zeros(1, device=self.device))
            transformer.encode_reference(self.transformer, tokens.to(self.dtype), at_zero, rope, layout)
        keys: Any = layout.keys
        if self.options.keys != "exact":
            keys = [tuple(compact(part, self.options.keys) for part in pair) for pair in keys]
        return Document(frame.key, grids[0], tuple(keys), tokens[:0], place[:0])

    def _nothing(self, frame: Frame) -> Document:
        """A document that no token sees; its grid of zeros only gives the size."""
        channels = self.transformer.config.in_channels
        grid = torch.zeros(*self._grid(frame), channels, device=self.device)
        reference = torch.zeros(0, channels, device=self.device)
        return Document(frame.key, grid, (), reference, torch.zeros(0, 4, dtype=torch.int64, device=self.device))

    def _encode(self, pixels: np.ndarray) -> Tensor:
        return latents.encode(self.vae, latents.pixels_of(pixels[None], self.device, self.vae.dtype))[0]

    def _latents(self, tokens: Tensor) -> Tensor:
        return latents.of_tokens(self.vae, tokens[None])

    def _pixels(self, of: Tensor) -> np.ndarray:
        return latents.pictures_of(latents.of_decoder(self.vae, of))[0]

    def _read(self, key: str, text: str, document: Document) -> Prompt:
        return Prompt(key, self._embedded(text))

    def _embedded(self, text: str) -> Tensor:
        """(T, joint_attention_dim)."""
        layers, longest = list(self.family.out_layers), self.family.max_sequence_length
        count = self.count_tokens(text)
        if count > longest:
            raise InvalidPrompt(f"the prompt has {count:,} tokens; this model reads {longest}. Make it shorter.")
        if self.family.embeds_guidance:
            embedded = Flux2Pipeline._get_mistral_3_small_prompt_embeds(
                self.text_encoder, self.tokenizer, text, max_sequence_length=longest, hidden_states_layers=layers
            )
            return embedded[0]
        embedded = Flux2KleinKVPipeline._get_qwen3_prompt_embeds(
            self.text_encoder, self.tokenizer, text,
            max_sequence_length=longest if self.family.pad_prompts else count, hidden_states_layers=layers,
        )  # fmt: skip
        return embedded[0]

    def count_tokens(self, text: str) -> int:
        """How many tokens a prompt has, the chat template's included, and of dev its system message's."""
        if self.family.embeds_guidance:
            said = format_input([text])
            read = self.tokenizer.apply_chat_template(said, tokenize=True, return_dict=True, return_tensors="pt")
            return read["input_ids"].shape[1]
        message = [{"role": "user", "content": text}]
        chat = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return len(self.tokenizer(chat)["input_ids"])

    def _sigmas(self, steps: int, tokens: int) -> tuple[float, ...]:
        return flow_sigmas(self.schedule, steps, compute_empirical_mu(tokens, steps))

    def _denoise(self, pack: Packed) -> Tensor:
        guidance = None
        if self.family.embeds_guidance:
            guidance = torch.tensor([segment.job.guidance for segment in pack.segments], device=self.device)
        modulation = pack.gather(transformer.modulate_at(self.transformer, pack.sigmas(), guidance))
        rope = transformer.rope_of(self.transformer, pack.positions())
        return transformer.denoise(self.transformer, pack.image(self.dtype), pack.text(self.dtype), modulation, rope, pack)
