"""Packing, caching and compositing change nothing they must not change."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from retouch.edit import Edit, InvalidOption, InvalidPrompt
from retouch.engine.engine import Engine
from retouch.kernels.attention import Span, attend, attend_reference
from retouch.models.flux2 import Flux2
from retouch.models.latents import cells_of
from retouch.models.options import Options
from retouch.models.packing import Packed

KV, KLEIN = "Flux2KleinKVPipeline", "Flux2KleinPipeline"
PACK_TOLERANCE = 1e-4
"""Largest relative difference of a job's latents, float32, packed with others against alone."""


def box(height: int, width: int, top: int, left: int, h: int, w: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[top : top + h, left : left + w] = True
    return mask


def ragged() -> list[Edit]:
    """Different documents, sizes, masks, prompts, seeds, steps and numbers of references; two share a document."""
    first, second, third = tiny.photo(64, 64, 1), tiny.photo(80, 128, 2), tiny.photo(96, 64, 3)
    return [
        Edit(first, "a red apple", box(64, 64, 3, 5, 20, 17), seed=1, steps=4),
        Edit(second, "remove the object", box(80, 128, 40, 60, 30, 50), seed=2, steps=2),
        Edit(first, "make the car blue", box(64, 64, 33, 30, 9, 30), seed=3, steps=3),
        Edit(third, "a cat", None, seed=4, steps=4),
        Edit(second, "an owl", box(80, 128, 0, 0, 16, 16), references=(tiny.photo(64, 64, 9),), seed=5, steps=1),
    ]


def latents_of(model: Flux2, edits: list[Edit], together: bool) -> list[torch.Tensor]:
    engine = Engine(model)
    jobs = [engine.admit(edit) for edit in edits]
    for group in [jobs] if together else [[job] for job in jobs]:
        while running := [job for job in group if not job.done]:
            engine.step(running)
    return [job.latents for job in jobs]


@pytest.mark.parametrize("name", [KV, KLEIN])
def test_a_packed_batch_of_ragged_jobs_equals_one_at_a_time(name: str) -> None:
    model = tiny.model(name)
    alone, packed = latents_of(model, ragged(), False), latents_of(model, ragged(), True)
    for a, b in zip(alone, packed, strict=True):
        assert float((a - b).norm() / a.norm()) < PACK_TOLERANCE


def test_guided_jobs_pack_with_each_other() -> None:
    model = tiny.model(KLEIN, family={"guidance": 4.0}, is_distilled=False)
    alone, packed = latents_of(model, ragged()[:3], False), latents_of(model, ragged()[:3], True)
    for a, b in zip(alone, packed, strict=True):
        assert float((a - b).norm() / a.norm()) < PACK_TOLERANCE


@pytest.mark.parametrize(("name", "guidance"), [(KV, None), (KLEIN, None), (KLEIN, 4.0)])
def test_a_steps_time_is_shared_by_all_the_tokens_in_it(name: str, guidance: float | None) -> None:
    """References that run along, and the second pass of guidance, are tokens too."""
    more = {} if guidance is None else {"is_distilled": False}
    model = tiny.model(name, family={"guidance": guidance}, **more)
    engine = Engine(model)
    jobs = [engine.admit(edit) for edit in ragged()[:3]]
    packed = [Packed(model._segments(job)) for job in jobs]
    engine.step(jobs)
    assert [job.width for job in jobs] == [pack.tokens for pack in packed]
    seconds = [job.usage.seconds["step"] for job in jobs]
    assert np.allclose(np.array(seconds) / sum(seconds), [pack.tokens / sum(p.tokens for p in packed) for pack in packed])


def test_a_prompts_key_tells_tenants_apart() -> None:
    model = tiny.model(KV)
    frame = model.frame(ragged()[0])
    assert model.prompt_key("eu|a red car", "acme", frame) != model.prompt_key("a red car", "acme|eu", frame)


def test_a_picture_many_times_longer_than_the_model_sees_is_edited() -> None:
    """Its feather, in its own pixels, would be wider than can be counted."""
    photo = tiny.photo(32, 2400)
    (edited,) = Engine(tiny.model(KV, {"max_side": 32}, Options())).edit([Edit(photo, "a red apple", steps=1)])
    assert edited.image.shape == photo.shape


def test_jobs_join_and_leave_at_any_step() -> None:
    model = tiny.model(KV)
    engine = Engine(model)
    first, second = (engine.admit(edit) for edit in ragged()[:2])
    engine.step([first])
    engine.step([first, second])
    engine.step([second])
    engine.step([first])
    engine.step([first])
    for job, alone in zip((first, second), latents_of(model, ragged()[:2], False), strict=True):
        assert job.done
        assert float((job.latents - alone).norm() / alone.norm()) < PACK_TOLERANCE


def test_a_cached_document_is_the_fresh_one_exactly() -> None:
    model = tiny.model(KV)
    warm = Engine(model)
    warm.edit([Edit(ragged()[0].image, "something else", seed=9, steps=1)])
    again, fresh = warm.edit([ragged()[0]])[0], Engine(model).edit([ragged()[0]])[0]
    assert "document" in again.usage.cache_hits
    assert "document" not in fresh.usage.cache_hits
    assert np.array_equal(again.image, fresh.image)


def test_document_key_depends_on_pixels_references_and_tenant_but_not_on_the_edit() -> None:
    model = tiny.model(KV)
    image = tiny.photo(64, 64)
    other = image.copy()
    other[0, 0, 0] ^= 1
    base = model.frame(Edit(image, "a", seed=1)).key
    assert model.frame(Edit(image, "b", box(64, 64, 0, 0, 9, 9), seed=2, steps=9)).key == base
    different = [Edit(other, "a"), Edit(image, "a", references=(other,)), Edit(image, "a", tenant="acme")]
    keys = {model.frame(edit).key for edit in different}
    assert len(keys | {base}) == 4


@pytest.mark.parametrize(("dilate", "cells"), [(0, 1), (1, 9)])
def test_only_masked_cells_are_computed(dilate: int, cells: int) -> None:
    edit = Edit(tiny.photo(128, 128), "a cat", box(128, 128, 33, 33, 14, 14), steps=2)
    answer = Engine(tiny.model(KV, options=Options(dilate=dilate))).edit([edit])[0]
    assert answer.usage.tokens_computed == 2 * cells
    assert answer.usage.tokens_saved == 2 * (64 - cells)


def test_cells_are_those_the_mask_touches() -> None:
    mask = box(50, 40, 17, 15, 1, 2)
    touched = np.argwhere(cells_of(mask, 16)).tolist()
    assert touched == [[1, 0], [1, 1]]
    assert cells_of(mask, 16, dilate=1).sum() == 3 * 3


@settings(max_examples=25)
@given(
    height=st.integers(20, 90), width=st.integers(20, 90), seed=st.integers(0, 10**6), channels=st.sampled_from([3, 4]),
    name=st.sampled_from([KV, KLEIN]), whole=st.booleans(), halo=st.sampled_from([None, 0, 1]), feather=st.integers(0, 6),
    context=st.sampled_from([None, 0, 24]),
    side=st.sampled_from([64, 512]),
)  # fmt: skip
def test_pixels_outside_the_mask_are_bit_identical(
    height: int,
    width: int,
    seed: int,
    channels: int,
    name: str,
    whole: bool,
    halo: int | None,
    feather: int,
    side: int,
    context: int | None,
) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    mask = rng.random((height, width)) < rng.choice([0.001, 0.05, 0.9])
    top, left = rng.integers(height), rng.integers(width)
    mask[top : top + rng.integers(1, 40), left : left + rng.integers(1, 40)] = True
    model = tiny.model(name, {"max_side": side}, Options(whole=whole, halo=halo, feather=feather, context=context))
    answer = Engine(model).edit([Edit(image, "a cat", mask, seed=seed, steps=1)])[0].image
    assert answer.shape == image.shape
    assert np.array_equal(answer[~mask], image[~mask])
    assert np.array_equal(answer[..., 3:], image[..., 3:])
    assert not np.array_equal(answer[mask], image[mask])


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(1, 17), min_size=1, max_size=6), seed=st.integers(0, 10**6))
def test_ragged_attention_is_its_reference(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    q, k, v = torch.randn(3, total, 2, 16, generator=generator)
    starts = np.cumsum([0, *lengths])
    own = [Span(int(a), int(b)) for a, b in pairwise(starts)]
    wide = [Span(0, own[len(own) // 2].stop), *own[len(own) // 2 + 1 :]]
    shared = [(span, *torch.randn(2, 23, 2, 16, generator=generator)) for span in wide[: max(1, len(wide) - 1)]]
    torch.testing.assert_close(attend(q, k, v, own, shared), attend_reference(q, k, v, own, shared), rtol=1e-4, atol=1e-5)


def test_guidance_on_a_distilled_checkpoint_is_refused() -> None:
    with pytest.raises(InvalidOption, match="distilled"):
        Engine(tiny.model(KV)).edit([Edit(tiny.photo(64, 64), "a", guidance=3.0)])


def test_a_prompt_longer_than_the_model_reads_is_refused() -> None:
    with pytest.raises(InvalidPrompt, match="tokens"):
        Engine(tiny.model(KV)).edit([Edit(tiny.photo(64, 64), "apple " * 600)])


def test_mirrored_and_read_only_pictures_are_taken() -> None:
    image = tiny.photo(64, 80)[:, ::-1]
    image.flags.writeable = False
    answer = Engine(tiny.model(KV)).edit([Edit(image, "a cat", box(64, 80, 8, 8, 16, 16), steps=1)])[0]
    assert answer.image.shape == image.shape


def test_with_context_the_model_sees_the_surroundings_of_the_mask_alone() -> None:
    model = tiny.model(KV, options=Options(context=20))
    photo = tiny.photo(128, 160)
    near, nearer, far = (np.zeros((128, 160), bool) for _ in range(3))
    near[50:70, 60:80], nearer[51:68, 62:79], far[100:120, 130:150] = True, True, True
    frames = [model.frame(Edit(photo, "a red apple", mask)) for mask in (near, nearer, far)]
    assert frames[0].box == (32, 16, 112, 96)
    assert frames[0].key == frames[1].key != frames[2].key
    changed = photo.copy()
    changed[:10, :10] = 0
    assert model.frame(Edit(changed, "a red apple", near)).key == frames[0].key
    (answer,) = Engine(model).edit([Edit(photo, "a red apple", near)])
    assert answer.usage.approximate == ("context of 20 px",)
    assert np.array_equal(answer.image[~near], photo[~near])
    assert model.frame(Edit(photo, "a red apple")).box == (0, 0, 160, 128)
    with pytest.raises(InvalidOption, match="context is -1"):
        Options(context=-1)
