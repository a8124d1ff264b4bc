"""FLUX.1 Fill, Kontext, and drawing from text: each is its diffusers pipeline, and packs, caches and refuses as it should."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux import pipeline_flux_inpaint
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

import retouch
import tiny
from retouch.edit import CheckpointMismatch, Edit, InvalidMask, InvalidOption, InvalidPrompt
from retouch.engine.engine import Engine
from retouch.models import codec
from retouch.models.checkpoint import FAMILIES
from retouch.models.flux1 import Flux1
from retouch.models.options import Options

PROMPT = "replace the car with a red apple"
TOLERANCE = 1e-3
PACK_TOLERANCE = 1e-4
LONGEST = 20
FILL, KONTEXT, INPAINT, DRAW = "FluxFillPipeline", "FluxKontextPipeline", "FluxKontextInpaintPipeline", "FluxPipeline"
PIPELINES = {c.__name__: c for c in (FluxFillPipeline, FluxKontextPipeline, FluxKontextInpaintPipeline, FluxPipeline)}
EXACT = Options(halo=None, feather=0)


def clip_tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    made = CLIPTokenizer({piece: i for i, piece in enumerate(pieces)}, [])
    made.model_max_length = 16
    return made


def t5_tokenizer() -> T5TokenizerFast:
    words = [(f"\u2581{word}", -3.0) for word in (*PROMPT.split(), "cat", "owl", "remove")]
    letters = [(letter, -8.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words, *letters], extra_ids=0)


@lru_cache
def parts(fills: bool = False, guided: bool = True) -> dict[str, Any]:
    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16 + (16 + 256 if fills else 0), out_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=16, guidance_embeds=guided,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    for parameter in transformer.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    for module in transformer.modules():
        if isinstance(module, torch.nn.RMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(4, 4, 8, 8),
        layers_per_block=1, latent_channels=4, norm_num_groups=2, scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    of_clip = CLIPTextConfig(
        vocab_size=len(clip), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    of_t5 = T5Config(vocab_size=len(t5), d_model=24, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    encoder = T5EncoderModel(of_t5).eval()  # which drops out in training
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guided else 1.0, use_dynamic_shifting=guided, base_image_seq_len=16, max_image_seq_len=64
        ),
        "vae": vae, "text_encoder": CLIPTextModel(of_clip), "tokenizer": clip, "text_encoder_2": encoder,
        "tokenizer_2": t5, "transformer": transformer,
    }  # fmt: skip


def pipeline(name: str, guided: bool = True) -> Any:
    made = PIPELINES[name](**parts(name == FILL, guided))
    made.set_progress_bar_config(disable=True)
    return made


def model(name: str, options: Options = EXACT, guided: bool = True, **settings: Any) -> Flux1:
    said = {"max_sequence_length": LONGEST, "max_side": 512, **({} if guided else {"embeds_guidance": False, "guidance": None})}
    return Flux1(pipeline(name, guided), replace(FAMILIES[name], **{**said, **settings}), name, options)


def box(height: int, width: int, top: int, left: int, h: int, w: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[top : top + h, left : left + w] = True
    return mask


def white(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * 255)


def stock(pipe: Any, edit: Edit, **extra: Any) -> torch.Tensor:
    """A stock pipeline's final tokens, (h * w, C), or its picture as an array."""
    if edit.guidance is not None:
        extra["guidance_scale"] = edit.guidance
    out = pipe(
        prompt=edit.prompt, num_inference_steps=edit.steps, generator=torch.Generator().manual_seed(edit.seed),
        max_sequence_length=LONGEST, **{"output_type": "latent", **extra},
    ).images[0]  # fmt: skip
    return out if isinstance(out, torch.Tensor) else torch.from_numpy(np.array(out).astype(int))


def sides(edit: Edit) -> dict[str, int]:
    return {"height": edit.image.shape[0], "width": edit.image.shape[1]}


def as_kontext(edit: Edit) -> dict[str, Any]:
    """The picture in its own size, instead of one of the pipeline's."""
    height, width = edit.image.shape[:2]
    return {"image": Image.fromarray(edit.image), "max_area": height * width, "_auto_resize": False, **sides(edit)}


def final_tokens(engine: Engine, edit: Edit) -> torch.Tensor:
    job = engine.admit(edit)
    while not job.done:
        engine.step([job])
    return job.latents


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 112)])
@pytest.mark.parametrize("masked", [False, True])
def test_fill_equals_the_stock_pipeline(height: int, width: int, masked: bool) -> None:
    mask = box(height, width, 19, 21, 26, 25) if masked else None
    edit = Edit(tiny.photo(height, width), PROMPT, mask, seed=3, steps=3, guidance=12.5)
    given = white(np.ones((height, width), bool) if mask is None else mask)
    theirs = stock(pipeline(FILL), edit, image=Image.fromarray(edit.image), mask_image=given, **sides(edit))
    assert relative(final_tokens(Engine(model(FILL)), edit), theirs) < TOLERANCE
    assert relative(final_tokens(Engine(model(FILL)), replace(edit, guidance=40.0)), theirs) > 10 * TOLERANCE


def test_fills_picture_equals_the_stock_pipelines() -> None:
    edit = Edit(tiny.photo(64, 96), PROMPT, box(64, 96, 10, 20, 33, 41), seed=2, steps=2)
    given = {"image": Image.fromarray(edit.image), "mask_image": white(edit.mask), "output_type": "pil"}
    theirs = stock(pipeline(FILL), edit, **given, **sides(edit)).numpy()
    ours = Engine(model(FILL)).edit([edit])[0].image
    assert np.abs(ours.astype(int) - theirs)[edit.mask].max() <= 1
    assert np.array_equal(ours[~edit.mask], edit.image[~edit.mask])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 112)])
def test_kontext_equals_the_stock_pipeline(height: int, width: int) -> None:
    edit = Edit(tiny.photo(height, width), PROMPT, seed=3, steps=3, guidance=2.5)
    theirs = stock(pipeline(KONTEXT), edit, **as_kontext(edit))
    assert relative(final_tokens(Engine(model(KONTEXT)), edit), theirs) < TOLERANCE
    assert relative(final_tokens(Engine(model(KONTEXT)), replace(edit, guidance=6.0)), theirs) > 10 * TOLERANCE


def test_kontexts_picture_equals_the_stock_pipelines() -> None:
    edit = Edit(tiny.photo(64, 96), PROMPT, seed=2, steps=2)
    theirs = stock(pipeline(KONTEXT), edit, output_type="pil", **as_kontext(edit)).numpy()
    assert np.abs(Engine(model(KONTEXT)).edit([edit])[0].image.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 112)])
@pytest.mark.parametrize("references", [0, 1])
def test_kontext_inpainting_equals_the_stock_loop(height: int, width: int, references: int) -> None:
    further = (tiny.photo(48, 80, 1),) * references
    edit = Edit(tiny.photo(height, width), PROMPT, box(height, width, 16, 32, 32, 16), further, seed=5, steps=4)
    extra = as_kontext(edit) | {"mask_image": white(edit.mask), "strength": 1.0}
    if references:
        extra["image_reference"] = Image.fromarray(further[0])
    theirs = stock(pipeline(INPAINT), edit, **extra)
    assert relative(final_tokens(Engine(model(INPAINT)), edit), theirs) < TOLERANCE
    assert relative(final_tokens(Engine(model(KONTEXT)), edit), theirs) < TOLERANCE


@pytest.mark.parametrize("guided", [True, False])
def test_a_picture_from_nothing_equals_the_stock_pipeline(guided: bool) -> None:
    blank = Edit(np.zeros((64, 96, 3), np.uint8), PROMPT, seed=4, steps=3, guidance=2.0 if guided else None, blank=True)
    theirs = stock(pipeline(DRAW, guided), blank, **sides(blank))
    assert relative(final_tokens(Engine(model(DRAW, guided=guided)), blank), theirs) < TOLERANCE


def test_kontext_and_fill_draw_from_nothing_as_the_stock_pipelines() -> None:
    blank = Edit(tiny.photo(64, 64), PROMPT, seed=4, steps=2, blank=True)
    theirs = stock(pipeline(KONTEXT), blank, max_area=64 * 64, **sides(blank))
    assert relative(final_tokens(Engine(model(KONTEXT)), blank), theirs) < TOLERANCE
    hidden = {"image": Image.fromarray(tiny.photo(64, 64, 1)), "mask_image": white(np.ones((64, 64), bool))}
    theirs = stock(pipeline(FILL), blank, **hidden, **sides(blank))
    assert relative(final_tokens(Engine(model(FILL)), blank), theirs) < TOLERANCE


def test_a_masked_edit_that_draws_from_text_equals_the_stock_inpainting_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given its noise, and its picture's mean latents: the stock loop draws both in another order."""
    edit = Edit(tiny.photo(64, 96), PROMPT, box(64, 96, 16, 32, 32, 16), seed=5, steps=3)
    monkeypatch.setattr(pipeline_flux_inpaint, "retrieve_latents", lambda encoded, generator: encoded.latent_dist.mode())
    ours = model(DRAW)
    pipe = FluxInpaintPipeline(**parts())
    pipe.set_progress_bar_config(disable=True)
    noise = ours._draw(edit.seed, (4, 6, 16), 0)
    given = {"image": Image.fromarray(edit.image), "mask_image": white(edit.mask), "strength": 1.0, "latents": noise}
    theirs = stock(pipe, edit, guidance_scale=ours.family.guidance, **given, **sides(edit))
    assert relative(final_tokens(Engine(ours), edit), theirs) < TOLERANCE


def ragged(name: str) -> list[Edit]:
    """Different documents, sizes, masks, prompts, seeds, steps and guidance; two share a document."""
    first, second = tiny.photo(64, 64, 1), tiny.photo(80, 112, 2)
    further = (tiny.photo(48, 64, 9),) if FAMILIES[name].references else ()
    edits = [
        Edit(first, "a red apple", box(64, 64, 3, 5, 20, 17), seed=1, steps=4, guidance=2.0),
        Edit(second, "remove the car", box(80, 112, 40, 60, 30, 40), seed=2, steps=2),
        Edit(first, "a cat", box(64, 64, 33, 30, 9, 30), seed=3, steps=3, guidance=9.0),
        Edit(second, "owl", box(80, 112, 0, 0, 16, 16), further, seed=5, steps=1),
    ]
    return edits if name == DRAW else [*edits, Edit(tiny.photo(96, 64, 3), "an owl", None, seed=4, steps=4)]


def latents_of(name: str, together: bool, options: Options = EXACT) -> list[torch.Tensor]:
    engine = Engine(model(name, options, pad_prompts=False))
    jobs = [engine.admit(edit) for edit in ragged(name)]
    assert len({len(job.prompt.embedded) for job in jobs}) > 1
    for group in [jobs] if together else [[job] for job in jobs]:
        while running := [job for job in group if not job.done]:
            engine.step(running)
    return [job.latents for job in jobs]


@pytest.mark.parametrize("name", [FILL, KONTEXT, DRAW])
@pytest.mark.parametrize("options", [EXACT, replace(EXACT, whole=False)])
def test_a_packed_batch_of_ragged_jobs_equals_one_at_a_time(name: str, options: Options) -> None:
    for alone, packed in zip(latents_of(name, False, options), latents_of(name, True, options), strict=True):
        assert relative(packed, alone) < PACK_TOLERANCE


@pytest.mark.parametrize("name", [FILL, KONTEXT, DRAW])
@pytest.mark.parametrize("options", [Options(), Options(whole=False, halo=0), Options(refresh="1,2")])
def test_pixels_outside_the_mask_are_bit_identical(name: str, options: Options) -> None:
    """Of sides that are no multiple of a cell, scaled down or not, with alpha."""
    image, mask = tiny.photo(70, 101, channels=4), box(70, 101, 41, 60, 29, 41)
    mask[5, 7] = True
    for side in (512, 64):
        engine = Engine(model(name, options, max_side=side))
        answer = engine.edit([Edit(image, PROMPT, mask, seed=1, steps=3)])[0]
        assert np.array_equal(answer.image[~mask], image[~mask])
        assert np.array_equal(answer.image[..., 3], image[..., 3])
        assert not np.array_equal(answer.image[mask], image[mask])
        assert bool(answer.usage.approximate) == (options != Options())
        assert (answer.usage.tokens_saved > 0) == (options != Options())


@pytest.mark.parametrize("name", [FILL, KONTEXT, DRAW])
def test_previews_and_the_shared_document(name: str) -> None:
    image, seen = tiny.photo(64, 80), []
    mask = box(64, 80, 16, 16, 20, 30)
    engine = Engine(model(name))
    edit = Edit(image, PROMPT, mask, steps=4)
    watched = engine.submit(edit, watch=lambda step, rough: seen.append((step, rough)), previews=2)
    while engine.tick():
        pass
    assert watched.answer.result().usage.cache_hits == ()
    rough = [picture for _, picture in seen if picture is not None]
    assert len(rough) == 2
    assert all(np.array_equal(picture[~mask], image[~mask]) for picture in rough)
    (other,) = engine.edit([Edit(image, PROMPT, box(64, 80, 0, 40, 16, 16), seed=2, steps=1)])
    assert set(other.usage.cache_hits) == {"document", "prompt"}


@pytest.mark.parametrize("name", [FILL, KONTEXT])
def test_documents_and_prompts_come_back_from_disk(name: str) -> None:
    ours, cpu = model(name), torch.device("cpu")
    edit = Edit(tiny.photo(64, 80), PROMPT, box(64, 80, 16, 16, 20, 30), seed=2, steps=2)
    frame = ours.frame(edit)
    document = ours.encode_document(frame)
    prompt = ours.encode_prompt("key", edit.prompt, document)
    again = codec.load_document(codec.dump_document(document), cpu), codec.load_prompt(codec.dump_prompt(prompt), cpu)
    made = []
    for encoded, read in ((document, prompt), again):
        job = ours.start(edit, frame, encoded, read, None)
        while not job.done:
            ours.step([job])
        made.append(ours.finish(job))
    assert np.array_equal(*made)
    assert again[1].bytes == prompt.bytes == prompt.embedded.nbytes + 16 * 4


def saved(folder: Path, name: str, guided: bool = True) -> str:
    pipeline(name, guided).save_pretrained(folder)
    (folder / "retouch.json").write_text(json.dumps({"max_sequence_length": LONGEST, "max_side": 128}))
    return str(folder)


@pytest.mark.parametrize("name", [FILL, KONTEXT, INPAINT])
def test_a_saved_checkpoint_loads_and_edits_as_the_live_one(name: str, tmp_path: Path) -> None:
    engine = retouch.load(saved(tmp_path, name), dtype="float32", device="cpu", options=EXACT)
    assert engine.model.family == replace(FAMILIES[name], max_sequence_length=LONGEST, max_side=128)
    edit = Edit(tiny.photo(64, 64), PROMPT, box(64, 64, 16, 16, 20, 30), seed=3, steps=2)
    assert np.array_equal(engine.edit([edit])[0].image, Engine(model(name)).edit([edit])[0].image)


def test_a_checkpoint_without_guidance_is_distilled(tmp_path: Path) -> None:
    engine = retouch.load(saved(tmp_path, DRAW, guided=False), dtype="float32", device="cpu")
    family = engine.model.family
    assert (family.steps, family.guidance, family.embeds_guidance) == (4, None, False)
    blank = Edit(np.zeros((64, 64, 3), np.uint8), PROMPT, blank=True)
    assert engine.edit([blank])[0].usage.steps == 4
    with pytest.raises(InvalidOption, match="no guidance"):
        engine.edit([replace(blank, guidance=3.0)])


def test_what_the_models_cannot_do_is_refused() -> None:
    image, mask = tiny.photo(64, 64), box(64, 64, 16, 16, 20, 30)
    with pytest.raises(InvalidOption, match="no further pictures"):
        Engine(model(FILL)).edit([Edit(image, PROMPT, mask, references=(image,))])
    with pytest.raises(InvalidOption, match="at most 1"):
        Engine(model(KONTEXT)).edit([Edit(image, PROMPT, mask, references=(image, image))])
    with pytest.raises(InvalidMask, match="document's place"):
        Engine(model(KONTEXT)).edit([Edit(image, PROMPT, references=(image,))])
    with pytest.raises(InvalidMask, match="draws from text"):
        Engine(model(DRAW)).edit([Edit(image, PROMPT)])
    with pytest.raises(InvalidOption, match="negative prompt"):
        Engine(model(FILL)).edit([Edit(image, PROMPT, mask, negative="owl")])
    with pytest.raises(InvalidPrompt, match=f"reads {LONGEST}"):
        Engine(model(FILL)).edit([Edit(image, "apple " * LONGEST, mask)])


def test_parts_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(CheckpointMismatch, match="channels"):
        Flux1(pipeline(KONTEXT), FAMILIES[FILL])
    with pytest.raises(CheckpointMismatch, match="guidance_embeds"):
        Flux1(pipeline(KONTEXT, guided=False), FAMILIES[KONTEXT])
