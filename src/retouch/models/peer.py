"""The peer of every speed claim: diffusers' own FLUX.2 klein pipelines on the same weights, run as an edit with a mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinInpaintPipeline, Flux2KleinKVPipeline
from diffusers.models.transformers.transformer_flux2 import (
    Flux2AttnProcessor,
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
    Flux2ParallelSelfAttnProcessor,
)
from PIL import Image

from retouch.composite import composite
from retouch.edit import CheckpointMismatch, Edit, InvalidImage, InvalidMask
from retouch.models import checkpoint
from retouch.models.base import EditModel
from retouch.models.flux2 import Flux2

PLAIN = (Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor)
KV = (Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor)


class Peer:
    """Both pipelines over one set of modules, which nobody else uses: nothing of Retouch (memory format, dtype of a part)
    reaches them.

    Each method answers the whole picture as its pipeline returns it, (H, W, 3) uint8. Same seed, steps and prompt length as
    the Flux2 they are compared with; no guidance. Sides must be multiples of the cell, as the pipelines cut off the rest.
    """

    def __init__(self, pipeline: Any, model: Flux2) -> None:
        parts = {name: pipeline.components[name] for name in ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")}
        self.model = model
        self._kv = Flux2KleinKVPipeline(**parts)
        self._inpaint = Flux2KleinInpaintPipeline(**parts, is_distilled=True)
        for pipe in (self._kv, self._inpaint):
            pipe.set_progress_bar_config(disable=True)

    def inpaint(self, edit: Edit) -> np.ndarray:
        """The masked edit of diffusers: every token noisy, known ones re-noised at each step, the document in the sequence."""
        if edit.mask is None:
            raise InvalidMask("the inpainting pipeline needs a mask; give the edit one.")
        mask = Image.fromarray(edit.mask.astype(np.uint8) * 255)
        return self._run(self._inpaint, PLAIN, edit, mask_image=mask, strength=1.0, guidance_scale=1.0)

    def kv(self, edit: Edit) -> np.ndarray:
        """The whole picture made anew; reference keys and values are cached from the first step on, not between edits."""
        return self._run(self._kv, KV, edit)

    def paste(self, edit: Edit, whole: np.ndarray) -> np.ndarray:
        """A pipeline's picture put into the edit's, inside the mask only and feathered as Retouch does it."""
        if edit.mask is None:
            return whole
        height, width = edit.mask.shape
        return composite(edit.image, whole, edit.mask, (0, 0, width, height), self.model.options.feather)

    def _run(self, pipe: Any, processors: tuple[Any, Any], edit: Edit, **more: Any) -> np.ndarray:
        height, width = edit.image.shape[:2]
        model, family = self.model, self.model.family
        if height % model.cell or width % model.cell or height * width > 1024 * 1024:
            raise InvalidImage(
                f"the picture is {width} x {height}; the diffusers pipelines would scale or cut it. "
                f"Give sides that are multiples of {model.cell}, and at most a megapixel."
            )
        # Constructing a KV pipeline leaves its processors on the transformer, whoever else runs it.
        double, single = processors
        for block in pipe.transformer.transformer_blocks:
            block.attn.set_processor(double())
        for block in pipe.transformer.single_transformer_blocks:
            block.attn.set_processor(single())
        made = pipe(
            image=Image.fromarray(edit.image[..., :3]),
            prompt=edit.prompt,
            num_inference_steps=edit.steps or family.steps,
            generator=torch.Generator().manual_seed(edit.seed),
            max_sequence_length=family.max_sequence_length if family.pad_prompts else model.count_tokens(edit.prompt),
            text_encoder_out_layers=family.out_layers,
            **more,
        )
        return np.array(made.images[0])


def load(name: str, model: EditModel) -> Peer:
    """The pipelines of checkpoint `name`, read once more from its files, beside `model`, which was read from them too.

    Raises CheckpointMismatch where the checkpoint is no FLUX.2-klein-KV: then the two would not do the same.
    """
    if not isinstance(model, Flux2) or not model.family.cached or model.family.guidance is not None:
        raise CheckpointMismatch(f"{name} is no distilled FLUX.2-klein-KV checkpoint; the diffusers pipelines need one.")
    pipeline, _ = checkpoint.read(checkpoint.find(name), model.dtype)
    return Peer(pipeline.to(model.device), model)
