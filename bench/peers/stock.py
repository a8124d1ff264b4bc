"""The stock diffusers pipelines over a checkpoint directory, as a careful user runs them on a CPU.

Prompts are not padded where the checkpoint's `retouch.json` says that it is trained so, no guidance, the autoencoder in
channels-last layout, the variations of a request in one call with a generator each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.models.transformers import transformer_flux2
from PIL import Image

from protocol import PADDING, Ask, Box, crop_box, paste

PIPELINES = {
    "klein": diffusers.Flux2KleinPipeline,
    "kv": diffusers.Flux2KleinKVPipeline,
    "inpaint": diffusers.Flux2KleinInpaintPipeline,
}
CROP_SIDES = (128, 192, 256, 384, 512)
"""Sides of crops where shapes are to be few, so that requests find mates for a batch."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One picture to make: what of an Ask, where, and with which seed. Parts of equal `shape` can share a call."""

    ask: Ask
    seed: int
    box: Box
    words: int
    steps: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        x0, y0, x1, y1 = self.box
        return x1 - x0, y1 - y0, self.words, self.steps


class Stock:
    """One pipeline. `crop`: "none" edits the whole picture, "cut" a crop around the mask; "pipeline" leaves it to the
    inpainting pipeline's `padding_mask_crop`. `sides`: those a cut crop may have. `most`: variations made in one call: whole
    pictures fill a CPU one by one, and only get slower together.
    """

    MOST = 4

    def __init__(self, model: Path, pipeline: str, dtype: str, crop: str = "none", sides: Sequence[int] = ()) -> None:
        for noisy in (diffusers.utils.logging, transformers.utils.logging):
            noisy.set_verbosity_error()
            noisy.disable_progress_bar()
        self.kind, self.crop, self.sides = pipeline, crop, sides
        self.most = self.MOST if crop == "cut" else 1
        said = json.loads((model / "retouch.json").read_text()) if (model / "retouch.json").is_file() else {}
        self.steps, self.layers = said.get("steps", 4), tuple(said.get("out_layers", (9, 18, 27)))
        self.longest, self.padded = said.get("max_sequence_length", 512), said.get("pad_prompts", True)
        self.pipe = PIPELINES[pipeline].from_pretrained(model, dtype=getattr(torch, dtype), local_files_only=True)
        self.pipe.set_progress_bar_config(disable=True)
        if pipeline != "kv":
            self.pipe.register_to_config(is_distilled=True)
        self.pipe.vae.to(memory_format=torch.channels_last)
        self._check()

    def _check(self) -> None:
        """With the default attention processors `kv_cache` is accepted and ignored."""
        wanted = transformer_flux2.Flux2KVAttnProcessor if self.kind == "kv" else transformer_flux2.Flux2AttnProcessor
        for block in self.pipe.transformer.transformer_blocks:
            assert type(block.attn.processor) is wanted, type(block.attn.processor)

    def parts(self, ask: Ask) -> list[Part]:
        """The pictures that a request asks for."""
        height, width = ask.mask.shape
        box = crop_box(ask.mask, sides=self.sides) if self.crop == "cut" else (0, 0, width, height)
        words, steps = self._words(ask.prompt), ask.steps or self.steps
        return [Part(ask, ask.seed + turn, box, words, steps) for turn in range(ask.n)]

    def _words(self, prompt: str) -> int:
        if self.padded:
            return self.longest
        message = [{"role": "user", "content": prompt}]
        chat = self.pipe.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return min(len(self.pipe.tokenizer(chat)["input_ids"]), self.longest)

    def edit(self, ask: Ask) -> list[np.ndarray]:
        """A request's pictures."""
        return self.edit_all([ask])[0]

    def edit_all(self, asks: Sequence[Ask]) -> list[list[np.ndarray]]:
        """The pictures of several requests: parts of one shape share calls, `most` in each."""
        made: dict[tuple[int, int], np.ndarray] = {}
        groups: dict[Any, list[tuple[int, int, Part]]] = {}
        for row, ask in enumerate(asks):
            for column, part in enumerate(self.parts(ask)):
                mates = part.shape if self.kind == "inpaint" else (row, *part.shape)
                groups.setdefault(mates, []).append((row, column, part))
        for group in groups.values():
            for at in range(0, len(group), self.most):
                several = group[at : at + self.most]
                pictures = self.run([part for _, _, part in several])
                made |= {(row, column): picture for (row, column, _), picture in zip(several, pictures, strict=True)}
        return [[made[row, column] for column in range(ask.n)] for row, ask in enumerate(asks)]

    def run(self, parts: Sequence[Part]) -> list[np.ndarray]:
        """One call of the pipeline, for parts of one shape, and each put into its document.

        Parts of one request go in as one prompt; those of several as a list, which only the inpainting pipeline can do: the
        others take a list of images for several references of one picture.
        """
        first = parts[0]
        assert len({part.shape for part in parts}) == 1
        width, height, words, steps = first.shape
        inputs: dict[str, Any] = {"num_inference_steps": steps, "max_sequence_length": words}
        inputs["generator"] = [torch.Generator().manual_seed(part.seed) for part in parts]
        if all(part.ask is first.ask for part in parts):
            inputs |= self._pictures(first) | {"prompt": first.ask.prompt, "num_images_per_prompt": len(parts)}
        else:
            assert self.kind == "inpaint"
            several = [self._pictures(part) for part in parts]
            inputs |= {name: [one[name] for one in several] for name in several[0]}
            inputs["prompt"] = [part.ask.prompt for part in parts]
        if self.kind != "kv":
            inputs["guidance_scale"] = 1.0
        if self.kind == "inpaint":
            inputs |= {"strength": 1.0, **({"padding_mask_crop": PADDING} if self.crop == "pipeline" else {})}
        else:
            inputs |= {"height": height, "width": width}
        made = self.pipe(**inputs, text_encoder_out_layers=self.layers).images
        return [paste(part.ask.image, np.asarray(one), part.ask.mask, part.box) for part, one in zip(parts, made, strict=True)]

    def _pictures(self, part: Part) -> dict[str, Image.Image]:
        x0, y0, x1, y1 = part.box
        pictures = {"image": Image.fromarray(part.ask.image[y0:y1, x0:x1])}
        if self.kind == "inpaint":
            pictures["mask_image"] = Image.fromarray(part.ask.mask[y0:y1, x0:x1].astype(np.uint8) * 255)
        return pictures


def batching_sides(pipeline: str, crop: str) -> Sequence[int]:
    """Sides of crops for a server that batches: requests of several documents share a call of the inpainting pipeline only."""
    return CROP_SIDES if (pipeline, crop) == ("inpaint", "cut") else ()


def examples(compiled: bool = False) -> list[Ask]:
    """Edits to warm up with. For compiled code all that it tells apart: two sizes and prompts, one picture and several."""
    cases = [(192, "a red apple", 1), (256, "replace the car with a cat", 1), (192, "a red apple", 2), (256, "a cat", 3)]
    cases = cases if compiled else cases[:1]
    made = []
    for side, prompt, n in cases:
        image, mask = np.full((side, side, 3), 128, np.uint8), np.zeros((side, side), bool)
        mask[PADDING : side - PADDING, PADDING : side - PADDING] = True
        made.append(Ask(image, mask, prompt, n))
    return made
