"""With every lossy thing off, the adapter is diffusers' own pipeline: same inputs, same noise, same picture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from retouch.edit import Edit, InvalidPrompt
from retouch.engine.engine import Engine
from retouch.models import checkpoint, latents
from retouch.models.flux2 import Flux2
from retouch.models.options import Options

PROMPT = "replace the car with a red apple"
TOLERANCE = 1e-3


def relative(ours: np.ndarray | torch.Tensor, theirs: np.ndarray | torch.Tensor) -> float:
    a, b = (torch.as_tensor(x).double() for x in (ours, theirs))
    return float((a - b).norm() / b.norm())


def final_tokens(engine: Engine, edit: Edit) -> torch.Tensor:
    job = engine.admit(edit)
    while not job.done:
        engine.step([job])
    return job.latents


def stock(pipe: Any, edit: Edit, count: int, **extra: object) -> torch.Tensor:
    """A stock pipeline's final normalized tokens, (h * w, C)."""
    images = [Image.fromarray(p) for p in (edit.image, *edit.references)]
    out = pipe(
        prompt=edit.prompt, num_inference_steps=edit.steps, generator=torch.Generator().manual_seed(edit.seed),
        output_type="latent", text_encoder_out_layers=tiny.LAYERS, max_sequence_length=count, **{"image": images, **extra},
    ).images  # fmt: skip
    if out.ndim == 3:  # dev leaves them as tokens
        return out[0]
    return latents.normalize(pipe.vae, latents.patchify(out))[0].flatten(0, 1)


@pytest.mark.parametrize("name", ["Flux2KleinKVPipeline", "Flux2KleinPipeline"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 112)])
@pytest.mark.parametrize("references", [0, 1])
def test_all_tokens_equal_the_stock_pipeline(name: str, height: int, width: int, references: int) -> None:
    model = tiny.model(name)
    further = tuple(tiny.photo(64, 96, seed) for seed in range(1, references + 1))
    edit = Edit(tiny.photo(height, width), PROMPT, references=further, seed=3, steps=4)
    extra = {} if name.endswith("KVPipeline") else {"guidance_scale": 1.0}
    theirs = stock(tiny.pipeline(name), edit, model.count_tokens(PROMPT), height=height, width=width, **extra)
    assert relative(final_tokens(Engine(model), edit), theirs) < TOLERANCE


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 112)])
def test_whole_mode_equals_the_stock_inpainting_loop(height: int, width: int) -> None:
    name = "Flux2KleinInpaintPipeline"
    model = tiny.model(name, options=Options(whole=True, dilate=0, halo=None, feather=0))
    mask = np.zeros((height, width), bool)
    mask[16:48, 32:64] = True
    edit = Edit(tiny.photo(height, width), PROMPT, mask, seed=5, steps=4)
    white = Image.fromarray(mask.astype(np.uint8) * 255)
    extra = {"image": Image.fromarray(edit.image), "mask_image": white, "strength": 1.0, "guidance_scale": 1.0}
    theirs = stock(tiny.pipeline(name), edit, model.count_tokens(PROMPT), **extra)
    assert relative(final_tokens(Engine(model), edit), theirs) < TOLERANCE


def test_classifier_free_guidance_equals_the_stock_pipeline() -> None:
    name = "Flux2KleinPipeline"
    model = tiny.model(name, family={"guidance": 4.0}, is_distilled=False)
    edit = Edit(tiny.photo(64, 64), PROMPT, seed=1, steps=3)
    pipe = tiny.pipeline(name, is_distilled=False)
    ours = final_tokens(Engine(model), edit)
    length = model.count_tokens(PROMPT)
    negative, _ = pipe.encode_prompt("", text_encoder_out_layers=tiny.LAYERS, max_sequence_length=model.count_tokens(""))
    out = pipe(
        image=Image.fromarray(edit.image), prompt=PROMPT, num_inference_steps=3, guidance_scale=4.0, output_type="latent",
        generator=torch.Generator().manual_seed(1), text_encoder_out_layers=tiny.LAYERS, max_sequence_length=length,
        negative_prompt_embeds=negative, height=64, width=64,
    ).images  # fmt: skip
    theirs = latents.normalize(pipe.vae, latents.patchify(out))[0].flatten(0, 1)
    assert relative(ours, theirs) < TOLERANCE


def test_picture_equals_the_stock_pipelines() -> None:
    name = "Flux2KleinKVPipeline"
    model = tiny.model(name)
    edit = Edit(tiny.photo(64, 96), PROMPT, seed=2, steps=2)
    pipe = tiny.pipeline(name)
    theirs = pipe(
        image=Image.fromarray(edit.image), prompt=PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(2),
        text_encoder_out_layers=tiny.LAYERS, max_sequence_length=model.count_tokens(PROMPT),
    ).images[0]  # fmt: skip
    ours = Engine(model).edit([edit])[0].image
    assert np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_embedded_guidance_equals_the_stock_pipeline() -> None:
    name, longest = "Flux2Pipeline", 400
    model = tiny.model(name, {"max_sequence_length": longest})
    edit = Edit(tiny.photo(64, 96), PROMPT, references=(tiny.photo(64, 64, 1),), seed=1, steps=3, guidance=2.5)
    ours = final_tokens(Engine(model), edit)
    theirs = stock(tiny.pipeline(name), edit, longest, guidance_scale=2.5, height=64, width=96)
    assert relative(ours, theirs) < TOLERANCE
    other = final_tokens(Engine(model), replace(edit, guidance=6.0))
    assert relative(other, theirs) > 10 * TOLERANCE, "guidance reaches the model"


def test_a_prompt_that_dev_would_cut_is_refused() -> None:
    """The stock pipeline leaves its end out in silence; the system message counts."""
    edit = Edit(tiny.photo(64, 64), PROMPT)
    count = tiny.model("Flux2Pipeline").count_tokens(PROMPT)
    fits = Engine(tiny.model("Flux2Pipeline", {"max_sequence_length": count}))
    assert fits.admit(edit).usage.tokens_text == count
    with pytest.raises(InvalidPrompt, match=f"has {count} tokens; this model reads {count - 1}"):
        Engine(tiny.model("Flux2Pipeline", {"max_sequence_length": count - 1})).admit(edit)


@pytest.mark.parametrize("name", ["Flux2KleinKVPipeline", "Flux2KleinInpaintPipeline"])
def test_the_bundled_checkpoint_equals_the_stock_pipelines(name: str) -> None:
    read, family = checkpoint.read(checkpoint.find("retouch-mini"), torch.float32)
    parts, inpaint = {part: read.components[part] for part in tiny.parts()}, "Inpaint" in name
    image, mask = tiny.photo(128, 96), np.zeros((128, 96), bool)
    mask[32:80, 16:64] = True
    if inpaint:
        edit = Edit(image, PROMPT, mask, seed=4, steps=4)
        white = Image.fromarray(mask.astype(np.uint8) * 255)
        extra = {"image": Image.fromarray(image), "mask_image": white, "strength": 1.0, "guidance_scale": 1.0}
    else:
        edit = Edit(image, PROMPT, references=(tiny.photo(64, 64, 1),), seed=4, steps=4)
        extra = {"height": 128, "width": 96}
    pipe = tiny.assembled(name, parts)
    model = Flux2(pipe, replace(family, cached=not inpaint), options=Options(whole=inpaint, halo=None, feather=0))
    theirs = stock(pipe, edit, model.count_tokens(PROMPT), **extra)
    assert relative(final_tokens(Engine(model), edit), theirs) < TOLERANCE
