"""The stock diffusers pipelines on the same weights, timed from outside.

They get what a careful user would give them: prompts without padding where the checkpoint is trained so, no guidance, an
autoencoder in channels-last layout, one prompt throughout so that compiled code is specialized to its shapes. The
`padding_mask_crop` of `Flux2KleinInpaintPipeline` is no peer: it scales the crop up to the picture's size again and so saves
nothing; the crop that does save is cut by hand here (`Peer.run` with a box).
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinKVPipeline, Flux2KleinPipeline
from PIL import Image

from ceiling import decoder, encoder, kv_steps, plain_steps, prompt
from retouch.boxes import Box
from retouch.composite import composite
from retouch.edit import Edit
from retouch.models.flux2 import Flux2
from retouch.models.peer import PLAIN
from timing import Clock, Sample

PIPELINES = {"KV": Flux2KleinKVPipeline, "plain": Flux2KleinPipeline}


class Peer:
    """One pipeline, eager or compiled. Compiled: the transformer's repeated blocks, and both halves of the autoencoder."""

    def __init__(self, model: Flux2, kind: str, compiled: bool, clock: Clock, steps: int) -> None:
        self.model, self.kind, self.clock, self.steps = model, kind, clock, steps
        self.name = f"{kind} {'compiled' if compiled else 'eager'}"
        transformer, vae = _share(model.transformer), _share(model.vae)
        if kind == "plain":
            double, single = PLAIN  # a transformer that served a KV pipeline keeps its processors
            for block in transformer.transformer_blocks:
                block.attn.set_processor(double())
            for block in transformer.single_transformer_blocks:
                block.attn.set_processor(single())
        self.pipeline = PIPELINES[kind](
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(model.schedule), transformer=transformer, vae=vae,
            text_encoder=model.text_encoder, tokenizer=model.tokenizer,
        )  # fmt: skip
        self.pipeline.set_progress_bar_config(disable=True)
        if compiled:
            transformer.compile_repeated_blocks(dynamic=False)
            vae.encoder.compile(dynamic=False)
            vae.decoder.compile(dynamic=False)
        self._calls, self._marks = 0, [0.0, 0.0]
        transformer.register_forward_pre_hook(self._before)
        transformer.register_forward_hook(self._after)

    def _before(self, *_: Any) -> None:
        if self._calls == 0:
            self._marks[0] = self.clock()
        self._calls += 1

    def _after(self, *_: Any) -> None:
        if self._calls == self.steps:
            self._marks[1] = self.clock()

    def run(self, edit: Edit, box: Box | None = None) -> Sample:
        """The whole picture, or a box (x0, y0, x1, y1) of it; the mask decides what of the answer is taken."""
        height, width = edit.image.shape[:2]
        box = box or (0, 0, width, height)
        image = Image.fromarray(edit.image[box[1] : box[3], box[0] : box[2]])
        family, mask = self.model.family, np.ones((height, width), bool) if edit.mask is None else edit.mask
        words = family.max_sequence_length if family.pad_prompts else self.model.count_tokens(edit.prompt)
        self._calls = 0
        started = self.clock()
        answer = self.pipeline(
            image=image, prompt=edit.prompt, num_inference_steps=self.steps, height=image.height, width=image.width,
            generator=torch.Generator().manual_seed(edit.seed), max_sequence_length=words,
            text_encoder_out_layers=family.out_layers, **({} if self.kind == "KV" else {"guidance_scale": 1.0}),
        ).images[0]  # fmt: skip
        composite(edit.image, np.asarray(answer), mask, box, self.model.options.feather)
        ended = self.clock()
        assert self._calls == self.steps, (self._calls, self.steps)
        cells = image.height * image.width // self.model.cell**2
        of_steps = kv_steps if self.kind == "KV" else plain_steps
        flops = (
            encoder(self.model.vae, image.height, image.width) + prompt(self.model.text_encoder, words),
            of_steps(self.model.transformer.config, cells, words, self.steps),
            decoder(self.model.vae, 2 * image.height // self.model.cell, 2 * image.width // self.model.cell),
        )
        return Sample.of([started, *self._marks, ended], flops, cells if self.kind == "KV" else 2 * cells)


def _share(module: Any) -> Any:
    """A copy of the modules with the very same weights, so that compiling or hooking one leaves the other as it is."""
    kept = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in kept})
