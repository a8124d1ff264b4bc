"""The Qwen-Image family against its own pipelines, on tiny random weights made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_inpaint, pipeline_qwenimage_edit_plus
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

import retouch
import tiny
from retouch.edit import Edit, InvalidMask, InvalidOption, InvalidPrompt
from retouch.engine.engine import Engine
from retouch.models import checkpoint, codec, qwen
from retouch.models.options import Options
from retouch.models.qwen import Qwen

PROMPT = "replace the car with a red apple"
TOLERANCE = 1e-4
EDIT, PLUS, INPAINT = "QwenImageEditPipeline", "QwenImageEditPlusPipeline", "QwenImageEditInpaintPipeline"
DRAW, REDRAW = "QwenImagePipeline", "QwenImageInpaintPipeline"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


class Processor(Qwen2VLProcessor):
    """Without the part for videos, which wants torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer)


@lru_cache
def parts(zero_cond_t: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)
    letters = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2TokenizerFast(vocab=letters, merges=[], additional_special_tokens=SPECIAL)
    names = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "rope_theta": 100.0,
            "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 100.0},
            "initializer_range": 0.4, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "spatial_patch_size": 4,
            "window_size": 16, "out_hidden_size": 16, "fullatt_block_indexes": [1], "initializer_range": 0.4,
        },
        image_token_id=names["<|image_pad|>"], video_token_id=names["<|video_pad|>"],
        vision_start_token_id=names["<|vision_start|>"], vision_end_token_id=names["<|vision_end|>"],
        initializer_range=0.4, tie_word_embeddings=False,
    )  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
    looks = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 16 * 16, "longest_edge": 128 * 128})
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6), zero_cond_t=zero_cond_t,
    )  # fmt: skip
    for parameter in transformer.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.5, 0.8, 1.0],
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return {
        "scheduler": scheduler, "vae": vae.eval(), "text_encoder": encoder, "tokenizer": tokenizer,
        "transformer": transformer.eval(), "processor": Processor(looks, tokenizer),
    }  # fmt: skip


def pipeline(name: str, zero_cond_t: bool = False) -> Any:
    of = dict(parts(zero_cond_t))
    if "Edit" not in name:
        del of["processor"]
    made = getattr(diffusers, name)(**of)
    made.set_progress_bar_config(disable=True)
    return made


def model(name: str, options: Options | None = None, zero_cond_t: bool = False, **family: Any) -> Qwen:
    settings = {"guidance": 1.0, "max_side": 512, **family}
    return Qwen(
        pipeline(name, zero_cond_t), replace(checkpoint.FAMILIES[name], **settings), name,
        options or Options(halo=None, feather=0),
    )  # fmt: skip


def box(height: int, width: int, top: int, left: int, h: int, w: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[top : top + h, left : left + w] = True
    return mask


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def final_tokens(engine: Engine, edit: Edit) -> torch.Tensor:
    job = engine.admit(edit)
    while not job.done:
        engine.step([job])
    return job.latents


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls a stock pipeline on an edit, with what qwen.py says it does otherwise taken out of it."""

    def placed(encoder: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kinds = (kwargs["input_ids"] == encoder.config.image_token_id).int()
        return args, kwargs | ({} if kwargs.get("pixel_values") is None else {"mm_token_type_ids": kinds})

    def call(name: str, edit: Edit, zero_cond_t: bool = False, output_type: str = "latent", **extra: Any) -> Any:
        pipe, (height, width) = pipeline(name, zero_cond_t), edit.image.shape[:2]
        wanted = pipeline_qwenimage_edit.calculate_dimensions
        for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_inpaint):
            monkeypatch.setattr(module, "calculate_dimensions", lambda _, ratio: wanted(height * width, ratio))
        monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", height * width)
        monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", qwen.LOOK)
        monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda found, generator=None: found.mode())
        images = [Image.fromarray(picture) for picture in (edit.image, *edit.references)]
        given: dict[str, Any] = {} if name == DRAW else {"image": images if name == PLUS else images[0]}
        if name in (PLUS, DRAW, REDRAW):
            given |= {"height": height, "width": width}
        if "Inpaint" in name:
            mask = np.ones((height, width), bool) if edit.mask is None else edit.mask
            given |= {"mask_image": Image.fromarray(mask.astype(np.uint8) * 255), "strength": 1.0}
        hook = pipe.text_encoder.register_forward_pre_hook(placed, with_kwargs=True)
        guidance = 1.0 if edit.guidance is None else edit.guidance
        out = pipe(
            prompt=edit.prompt, negative_prompt=edit.negative or " ", true_cfg_scale=guidance, output_type=output_type,
            num_inference_steps=edit.steps, generator=torch.Generator().manual_seed(edit.seed), **given, **extra,
        ).images[0]  # fmt: skip
        hook.remove()
        return out

    monkeypatch.setattr(qwen, "LOOK", 64 * 64)
    return call


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96)])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_an_edit_equals_the_stock_pipeline(stock: Callable[..., Any], height: int, width: int, guidance: float) -> None:
    negative = "blurred" if guidance > 1 else ""
    edit = Edit(tiny.photo(height, width), PROMPT, seed=3, steps=3, guidance=guidance, negative=negative)
    assert relative(final_tokens(Engine(model(EDIT)), edit), stock(EDIT, edit)) < TOLERANCE


@pytest.mark.parametrize("references", [0, 1, 2])
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_several_pictures_equal_the_stock_pipeline(stock: Callable[..., Any], references: int, zero_cond_t: bool) -> None:
    further = (tiny.photo(96, 64, 1), tiny.photo(64, 96, 2))[:references]
    edit = Edit(tiny.photo(64, 96), PROMPT, references=further, seed=3, steps=3, guidance=3.0)
    ours = final_tokens(Engine(model(PLUS, zero_cond_t=zero_cond_t)), edit)
    assert relative(ours, stock(PLUS, edit, zero_cond_t)) < TOLERANCE


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64)])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", [INPAINT, REDRAW])
def test_masks_equal_the_stock_inpainting_loop(
    stock: Callable[..., Any], name: str, height: int, width: int, guidance: float
) -> None:
    mask = box(height, width, 16, 16, 32, 16)
    edit = Edit(tiny.photo(height, width), PROMPT, mask, seed=5, steps=4, guidance=guidance)
    assert relative(final_tokens(Engine(model(name)), edit), stock(name, edit)) < TOLERANCE


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_picture_from_text_equals_the_stock_pipeline(stock: Callable[..., Any], guidance: float) -> None:
    edit = Edit(np.zeros((64, 96, 3), np.uint8), PROMPT, blank=True, seed=2, steps=3, guidance=guidance)
    assert relative(final_tokens(Engine(model(DRAW)), edit), stock(DRAW, edit)) < TOLERANCE


def test_pictures_equal_the_stock_pipelines(stock: Callable[..., Any]) -> None:
    edit = Edit(tiny.photo(64, 96), PROMPT, seed=2, steps=2)
    theirs = np.asarray(stock(EDIT, edit, output_type="pil")).astype(int)
    assert np.abs(Engine(model(EDIT)).edit([edit])[0].image.astype(int) - theirs).max() <= 1


def ragged() -> list[Edit]:
    """Different pictures, sizes, numbers of references, masks, prompts, seeds, steps and guidance; two share a document."""
    first, second = tiny.photo(64, 64, 1), tiny.photo(80, 112, 2)
    return [
        Edit(first, "a red apple", box(64, 64, 3, 5, 20, 17), seed=1, steps=4, guidance=4.0),
        Edit(second, "remove it", box(80, 112, 40, 60, 30, 50), seed=2, steps=2),
        Edit(first, "make the car blue", box(64, 64, 33, 30, 9, 30), seed=3, steps=3, guidance=2.0, negative="red"),
        Edit(tiny.photo(96, 64, 3), "a cat", references=(second,), seed=4, steps=3),
        Edit(second, "an owl", box(80, 112, 0, 0, 16, 16), references=(first, tiny.photo(33, 70, 9)), seed=5, steps=1),
    ]


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("whole", [None, False])
def test_a_packed_batch_of_ragged_jobs_equals_one_at_a_time(zero_cond_t: bool, whole: bool | None) -> None:
    served = model(PLUS, Options(whole=whole), zero_cond_t)
    engine = Engine(served)
    jobs, alone = [engine.admit(edit) for edit in ragged()], [final_tokens(engine, edit) for edit in ragged()]
    while running := [job for job in jobs if not job.done]:
        engine.step(running)
    for job, single in zip(jobs, alone, strict=True):
        assert relative(job.latents, single) < TOLERANCE
    assert served.approximate == (() if whole is None else ("masked tokens",))


@pytest.mark.parametrize("name", [PLUS, REDRAW])
@pytest.mark.parametrize("options", [Options(), Options(whole=False, halo=0), Options(refresh="1,2")])
def test_pixels_outside_the_mask_are_bit_identical(name: str, options: Options) -> None:
    image, mask = tiny.photo(70, 90, channels=4), box(70, 90, 20, 11, 25, 40)
    engine = Engine(model(name, options, max_side=80))
    answer = engine.edit([Edit(image, "a cat", mask, seed=1, steps=3, guidance=3.0)])[0].image
    assert np.array_equal(answer[~mask], image[~mask])
    assert np.array_equal(answer[..., 3:], image[..., 3:])
    assert not np.array_equal(answer[mask], image[mask])


def test_a_job_in_flight_has_a_preview() -> None:
    engine = Engine(model(PLUS))
    job = engine.admit(ragged()[3])
    engine.step([job])
    assert engine.model.preview(job).shape == (96, 64, 3)


@pytest.mark.parametrize("name", [EDIT, PLUS, DRAW])
def test_a_picture_from_nothing_takes_its_size_alone(name: str) -> None:
    engine = Engine(model(name))
    edit = Edit(np.zeros((48, 70, 3), np.uint8), "a cat", blank=True, steps=2)
    first, second = engine.edit([edit, replace(edit, image=edit.image + np.uint8(9))])
    assert first.image.shape == (48, 70, 3)
    assert np.array_equal(first.image, second.image)


def test_pictures_are_looked_at_once_and_a_further_text_reads_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    served = model(PLUS, guidance=4.0)
    looks, read, vision = [], [], served.text_encoder.model
    language, visual = vision.language_model.forward, vision.visual.forward
    monkeypatch.setattr(vision.visual, "forward", lambda *args, **given: looks.append(1) or visual(*args, **given))
    monkeypatch.setattr(
        vision.language_model, "forward",
        lambda *args, **given: read.append(given["inputs_embeds"].shape[1]) or language(*args, **given),
    )  # fmt: skip
    engine = Engine(served)
    one = Edit(tiny.photo(64, 64), "a cat", references=(tiny.photo(64, 96, 1),), steps=1)
    first, second = (engine.edit([edit])[0] for edit in (one, replace(one, prompt="a longer text", negative="a dog")))
    closing = len(served.tokenizer(served.after)["input_ids"])
    assert len(looks) == 1
    assert read[1:] == [closing + len(text) for text in ("a cat", " ", "a longer text", "a dog")], "letters are tokens here"
    assert "document" in second.usage.cache_hits
    assert "document" not in first.usage.cache_hits
    engine.edit([replace(one, image=tiny.photo(64, 64, 2))])
    assert (len(looks), len(read)) == (2, 8), "the same text on another picture is another prompt"


def test_documents_and_prompts_come_back_from_disk_as_they_were() -> None:
    served, cpu = model(PLUS), torch.device("cpu")
    edit = ragged()[4]
    frame = served.frame(edit)
    document = served.encode_document(frame)
    again = codec.load_document(codec.dump_document(document), cpu)
    assert again.bytes == document.bytes
    assert len(again.prefix) == len(document.prefix) > 0
    for one, other in zip((*again.prefix, again.reference), (*document.prefix, document.reference), strict=True):
        assert torch.equal(one, other)
    prompt = served.encode_prompt(served.prompt_key("an owl", "", frame), "an owl", document)
    kept = codec.load_prompt(codec.dump_prompt(served.encode_prompt(prompt.key, "an owl", codec.moved(again, cpu))), cpu)
    assert kept.key == prompt.key
    assert torch.equal(kept.embedded, prompt.embedded)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as it lies on the hub: the processor with its settings for pictures and for videos apart."""
    folder = tmp_path_factory.mktemp("checkpoint") / "qwen"
    pipeline(PLUS, zero_cond_t=True).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"processor": ["transformers", "Qwen2VLProcessor"]}))
    looks = json.loads((folder / "processor" / "processor_config.json").read_text())["image_processor"]
    (folder / "processor" / "processor_config.json").unlink()
    (folder / "processor" / "preprocessor_config.json").write_text(json.dumps(looks))
    (folder / "processor" / "video_preprocessor_config.json").write_text('{"video_processor_type": "Qwen2VLVideoProcessor"}')
    return folder


def test_a_saved_checkpoint_loads_and_edits_as_the_live_one(saved: Path) -> None:
    edit = replace(ragged()[4], steps=2, guidance=3.0)
    engine = retouch.load(str(saved), dtype="float32", device="cpu")
    live = Engine(model(PLUS, engine.model.options, zero_cond_t=True))
    assert np.array_equal(engine.edit([edit])[0].image, live.edit([edit])[0].image)
    half = retouch.load(str(saved), dtype="bfloat16", device="cpu").edit([edit])[0].image
    assert half.shape == edit.image.shape


def test_what_it_does_not_take_is_refused() -> None:
    image = tiny.photo(64, 64)
    with pytest.raises(InvalidOption, match="no further pictures"):
        Engine(model(EDIT)).edit([Edit(image, "a", references=(image,))])
    with pytest.raises(InvalidOption, match="at most 2"):
        Engine(model(PLUS)).edit([Edit(image, "a", references=(image,) * 3)])
    with pytest.raises(InvalidOption, match="negative"):
        Engine(model(EDIT)).edit([Edit(image, "a", guidance=1.0, negative="b")])
    with pytest.raises(InvalidMask, match="does not look"):
        Engine(model(DRAW)).edit([Edit(image, "a")])
    with pytest.raises(InvalidPrompt, match="tokens"):
        Engine(model(EDIT)).edit([Edit(image, "apple " * 600)])
    with pytest.raises(InvalidOption, match="distilled"):
        Engine(model(EDIT, guidance=None)).edit([Edit(image, "a", guidance=3.0)])
