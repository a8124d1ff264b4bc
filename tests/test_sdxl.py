"""The UNet family equals the stock Stable Diffusion pipelines, and batches by size without changing anybody's picture."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import tiny
from retouch.edit import CheckpointMismatch, Edit, InvalidOption, InvalidPrompt
from retouch.engine.build import load
from retouch.engine.engine import Engine
from retouch.models import checkpoint
from retouch.models.checkpoint import FAMILIES
from retouch.models.families import adapter_of
from retouch.models.options import Options

PROMPT, NEGATIVE, TOLERANCE = "a red apple", "blurry, grey", 1e-3
INPAINT = "StableDiffusionXLInpaintPipeline"


def tokenizer() -> CLIPTokenizer:
    """Letters alone: each is a token, and one more at the end of a word."""
    letters = [chr(c) for c in range(33, 127) if not 65 <= c <= 90]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=24)


def text_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer()), hidden_size=width, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        projection_dim=16, max_position_embeddings=24, bos_token_id=0, eos_token_id=1, initializer_range=0.5,
    )  # fmt: skip


@lru_cache
def parts(channels: int = 9, prediction: str = "epsilon", xl: bool = True) -> dict[str, Any]:
    torch.manual_seed(0)
    further = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64,
    } if xl else {}  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 1), use_linear_projection=True,
        cross_attention_dim=40 if xl else 24, **further,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=2,
        block_out_channels=(4, 4, 8, 8), latent_channels=4, sample_size=64, scaling_factor=0.13,
    )  # fmt: skip
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": prediction}
    scheduler = EulerDiscreteScheduler(**schedule, timestep_spacing="leading", steps_offset=1)
    made = {
        "unet": unet, "vae": vae, "scheduler": scheduler, "tokenizer": tokenizer(),
        "text_encoder": CLIPTextModel(text_config(24)).eval(),
    }  # fmt: skip
    if xl:
        return made | {"tokenizer_2": tokenizer(), "text_encoder_2": CLIPTextModelWithProjection(text_config(16)).eval()}
    return made | {"safety_checker": None, "feature_extractor": None}


def pipeline(*of: Any, **extra: Any) -> Any:
    made = parts(*of)
    kind = StableDiffusionXLInpaintPipeline if "text_encoder_2" in made else StableDiffusionInpaintPipeline
    pipe = kind(**made, **(extra if "text_encoder_2" in made else {"requires_safety_checker": False}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def model(*of: Any, name: str = INPAINT, options: Options | None = None, **extra: Any) -> Any:
    family = replace(FAMILIES[name], max_side=512)
    return adapter_of(family)(pipeline(*of, **extra), family, name, options or Options(halo=None, feather=0))


def painted(height: int, width: int) -> np.ndarray:
    """A mask whose border lies inside cells."""
    mask = np.zeros((height, width), bool)
    mask[11:45, 22 : width - 5] = True
    return mask


def final(engine: Engine, edit: Edit) -> torch.Tensor:
    job = engine.admit(edit)
    while not job.done:
        engine.step([job])
    return job.latents


def stock(pipe: Any, edit: Edit, guidance: float = 1.0, **extra: Any) -> Any:
    mask = np.ones(edit.image.shape[:2], bool) if edit.mask is None else edit.mask
    height, width = mask.shape
    return pipe(
        prompt=edit.prompt, image=Image.fromarray(edit.image), mask_image=Image.fromarray(mask.astype(np.uint8) * 255),
        height=height, width=width, strength=1.0, num_inference_steps=edit.steps, guidance_scale=guidance,
        negative_prompt=edit.negative or None, generator=torch.Generator().manual_seed(edit.seed), **extra,
    ).images  # fmt: skip


def stock_latents(*given: Any) -> torch.Tensor:
    return stock(*given, output_type="latent")[0].flatten(1).T


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 112)])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("masked", [True, False])
def test_nine_channels_equal_the_stock_pipeline(height: int, width: int, guidance: float, masked: bool) -> None:
    mask = painted(height, width) if masked else None
    negative = NEGATIVE if guidance > 1 and masked else ""
    edit = Edit(tiny.photo(height, width), PROMPT, mask, seed=3, steps=4, guidance=guidance, negative=negative)
    theirs = stock_latents(pipeline(), edit, guidance)
    assert relative(final(Engine(model()), edit), theirs) < TOLERANCE
    if masked:
        other = final(Engine(model()), replace(edit, mask=~edit.mask))
        assert relative(other, theirs) > 10 * TOLERANCE, "the mask reaches the model"


@pytest.mark.parametrize("of", [(9, "v_prediction"), (4, "epsilon"), (4, "v_prediction"), (9, "epsilon", False)])
def test_other_predictions_and_channels_equal_the_stock_pipelines(of: tuple[Any, ...]) -> None:
    mask = np.zeros((64, 96), bool)
    mask[16:48, 32:72] = True
    edit = Edit(tiny.photo(64, 96), PROMPT, mask, seed=5, steps=3, guidance=4.0, negative=NEGATIVE)
    assert relative(final(Engine(model(*of)), edit), stock_latents(pipeline(*of), edit, 4.0)) < TOLERANCE


def test_an_empty_negative_prompt_is_zeros_only_where_the_checkpoint_says_so() -> None:
    edit = Edit(tiny.photo(64, 64), PROMPT, painted(64, 64), seed=1, steps=2, guidance=5.0)
    ours = {}
    for zeros in (True, False):
        ours[zeros] = final(Engine(model(force_zeros_for_empty_prompt=zeros)), edit)
        theirs = stock_latents(pipeline(force_zeros_for_empty_prompt=zeros), edit, 5.0)
        assert relative(ours[zeros], theirs) < TOLERANCE
    assert relative(ours[True], ours[False]) > 10 * TOLERANCE


def test_a_picture_from_nothing_equals_the_stock_text_to_image_pipeline() -> None:
    name, made = "StableDiffusionXLPipeline", parts(4)
    pipe = StableDiffusionXLPipeline(**made)
    pipe.set_progress_bar_config(disable=True)
    family = replace(FAMILIES[name], max_side=512)
    edit = Edit(np.zeros((64, 96, 3), np.uint8), PROMPT, seed=6, steps=3, guidance=5.0, blank=True)
    ours = final(Engine(adapter_of(family)(pipe, family, name)), edit)
    theirs = pipe(
        prompt=PROMPT, height=64, width=96, num_inference_steps=3, guidance_scale=5.0, output_type="latent",
        generator=torch.Generator().manual_seed(6),
    ).images  # fmt: skip
    assert relative(ours, theirs[0].flatten(1).T) < TOLERANCE


def test_the_picture_equals_the_stock_pipelines_and_outside_the_mask_the_original() -> None:
    edit = Edit(tiny.photo(64, 96), PROMPT, painted(64, 96), seed=2, steps=2, guidance=3.0)
    theirs = np.asarray(stock(pipeline(), edit, 3.0)[0]).astype(int)
    ours = Engine(model()).edit([edit])[0].image
    assert np.abs(ours.astype(int) - theirs)[edit.mask].max() <= 1
    assert np.array_equal(ours[~edit.mask], edit.image[~edit.mask])


@pytest.mark.parametrize("channels", [4, 9])
def test_batches_of_mixed_steps_sizes_and_guidance_equal_one_at_a_time(channels: int) -> None:
    wide, square = tiny.photo(64, 96), tiny.photo(64, 64, 1)
    edits = [
        Edit(wide, PROMPT, painted(64, 96), seed=1, steps=4, guidance=5.0),
        Edit(wide, "a blue pear", painted(64, 96), seed=2, steps=3, guidance=1.0),
        Edit(square, PROMPT, painted(64, 64), seed=3, steps=2, guidance=2.0, negative=NEGATIVE),
        Edit(tiny.photo(64, 96, 4), PROMPT, seed=4, steps=3, guidance=3.0),
    ]
    engine = Engine(model(channels))
    alone = [final(engine, edit) for edit in edits]
    jobs = [engine.admit(edit) for edit in edits]
    while live := [job for job in jobs if not job.done]:
        engine.step(live)
    for job, one in zip(jobs, alone, strict=True):
        assert relative(job.latents, one) < 1e-5


def test_equal_sizes_are_one_call_of_the_unet_and_a_mask_is_encoded_once() -> None:
    served = model()
    calls: list[int] = []
    handle = served.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    edit = Edit(tiny.photo(64, 64), PROMPT, painted(64, 64), steps=1, guidance=2.0)
    engine = Engine(served, tokens=1000)
    answers = engine.edit([replace(edit, seed=seed) for seed in range(3)])
    handle.remove()
    assert calls == [6]
    assert [answer.usage.cache_hits for answer in answers[1:]] == [("document", "prompt", "prompt")] * 2
    assert answers[0].usage.approximate == ()


def test_sides_that_the_unet_cannot_halve_are_padded_and_large_pictures_cropped() -> None:
    served = model()
    edit = Edit(tiny.photo(61, 75), PROMPT, painted(61, 75), steps=2)
    assert served.frame(edit).pixels.shape == (64, 80, 3)
    ours = Engine(served).edit([edit])[0].image
    assert ours.shape == edit.image.shape
    assert np.array_equal(ours[~edit.mask], edit.image[~edit.mask])
    large = Edit(tiny.photo(700, 900), PROMPT, painted(700, 900), steps=1, guidance=1.0)
    ours = Engine(served).edit([large])[0].image
    assert np.array_equal(ours[~large.mask], large.image[~large.mask])
    assert not np.array_equal(ours[large.mask], large.image[large.mask])


@pytest.mark.parametrize("channels", [9, 4])
def test_whole_cells_of_padding_are_no_part_of_the_mask(channels: int) -> None:
    """56 rows are seven cells, of which the UNet wants eight."""
    served = model(channels)
    mask = np.zeros((56, 72), bool)
    mask[40:, 50:] = True
    edit = Edit(tiny.photo(56, 72), PROMPT, mask, steps=2)
    frame = served.frame(edit)
    assert frame.pixels.shape == (64, 80, 3)
    job = Engine(served).admit(edit)
    assert int((~job.known).sum()) == served._masked_cells(edit, frame).sum() == 2 * 3
    ours = Engine(served).edit([edit])[0].image
    assert np.array_equal(ours[~mask], edit.image[~mask])
    assert not np.array_equal(ours[mask], edit.image[mask])


@pytest.mark.parametrize("xl", [True, False])
def test_a_saved_directory_loads_and_gives_the_same(tmp_path: Path, xl: bool) -> None:
    pipe = pipeline(9, "epsilon", xl)
    pipe.save_pretrained(tmp_path / "made")
    edit = Edit(tiny.photo(64, 64), PROMPT, painted(64, 64), seed=7, steps=2, guidance=5.0, negative=NEGATIVE)
    engine = load(str(tmp_path / "made"), dtype="float32", cache=tmp_path / "cache")
    assert relative(final(engine, edit), stock_latents(pipe, edit, 5.0)) < TOLERANCE
    engine.close()
    again = load(str(tmp_path / "made"), dtype="float32", cache=tmp_path / "cache").edit([edit])[0]
    assert again.usage.cache_hits == ("document", "prompt", "prompt")
    rough = load(str(tmp_path / "made"), dtype="bfloat16").edit([edit])[0].image
    assert np.abs(rough.astype(int) - again.image).mean() < 8


def test_what_does_not_go_is_refused() -> None:
    with pytest.raises(InvalidOption, match="every cell"):
        model(options=Options(whole=False))
    with pytest.raises(CheckpointMismatch, match="aesthetic score"):
        model(requires_aesthetics_score=True)
    with pytest.raises(InvalidPrompt, match="reads 24"):
        Engine(model()).edit([Edit(tiny.photo(64, 64), "long " * 9, steps=1)])
    with pytest.raises(InvalidOption, match="no further pictures"):
        Engine(model()).edit([Edit(tiny.photo(64, 64), PROMPT, references=(tiny.photo(64, 64),), steps=1)])
    changed = pipeline()
    changed.scheduler = EulerDiscreteScheduler.from_config(changed.scheduler.config, timestep_spacing="trailing")
    odd = adapter_of(FAMILIES[INPAINT])(changed, FAMILIES[INPAINT])
    with pytest.raises(InvalidOption, match="has no 61 steps"):
        Engine(odd).edit([Edit(tiny.photo(64, 64), PROMPT, steps=61)])
    changed.unet = parts(5)["unet"]
    family = checkpoint.FAMILIES[INPAINT]
    with pytest.raises(CheckpointMismatch, match="served are 4 and 9"):
        adapter_of(family)(changed, family)


def test_another_solver_than_the_checkpoints_is_said() -> None:
    pipe = pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    family = FAMILIES[INPAINT]
    assert adapter_of(family)(pipe, family).approximate == ("Euler steps",)
