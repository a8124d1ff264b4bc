"""Partial steps: the schedule, what they compute, and that they change nothing where there are none."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from retouch import record
from retouch.edit import Edit, InvalidOption
from retouch.engine.engine import Engine
from retouch.models.adapter import Adapter
from retouch.models.base import Job
from retouch.models.checkpoint import FAMILIES
from retouch.models.options import Options
from retouch.models.refresh import Refresh

KLEIN, KV = "Flux2KleinPipeline", "Flux2KleinKVPipeline"
PACK_TOLERANCE = 1e-4


def model(refresh: str | None, name: str = KLEIN, **family: Any) -> Adapter:
    extra = {"is_distilled": False} if family.get("guidance") else {}
    options = Options(halo=None, feather=0, refresh=refresh, whole=True)
    return tiny.model(name, {"masked": False, **family}, options, **extra)


def edits(steps: int = 6) -> list[Edit]:
    """Of two sizes, one of them without a mask, one with a further picture."""
    first, second = tiny.photo(64, 80, 1), tiny.photo(96, 64, 2)
    mask, other = np.zeros((64, 80), bool), np.zeros((96, 64), bool)
    mask[20:44, 10:50], other[50:90, 3:30] = True, True
    return [
        Edit(first, "a red apple", mask, seed=1, steps=steps),
        Edit(second, "a cat", other, references=(tiny.photo(64, 64, 5),), seed=2, steps=steps),
        Edit(second, "an owl", None, seed=3, steps=steps),
    ]


def stepped(served: Adapter, asked: list[Edit], together: bool = False) -> list[Job]:
    engine = Engine(served)
    jobs = [engine.admit(edit) for edit in asked]
    for group in [jobs] if together else [[job] for job in jobs]:
        while running := [job for job in group if not job.done]:
            engine.step(running)
    return jobs


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_a_schedule_says_which_steps_are_full() -> None:
    plan = Refresh.parsed("2,4")
    assert [step for step in range(12) if plan.full(step)] == [0, 1, 5, 9]
    assert [step for step in range(5) if Refresh.parsed("1,2").full(step)] == [0, 2, 4]
    assert all(Refresh.parsed("1,1").full(step) for step in range(9))
    assert plan.count(12) == 4


@pytest.mark.parametrize("text", ["", "2", "0,4", "2,0", "two,4", "1,2,3", "-1,2"])
def test_other_schedules_are_refused(text: str) -> None:
    with pytest.raises(InvalidOption, match="refresh"):
        Options(refresh=text)


@pytest.mark.parametrize("guidance", [None, 4.0])
def test_with_every_step_full_it_is_the_whole_path_exactly(guidance: float | None) -> None:
    found, plain = (stepped(model(plan, guidance=guidance), edits()) for plan in ("1,1", None))
    for ours, whole in zip(found, plain, strict=True):
        assert torch.equal(ours.latents, whole.latents)
        assert ours.usage.tokens_computed == whole.usage.tokens_computed


def test_partial_steps_compute_the_masked_cells_alone() -> None:
    masked, referenced, open_ = stepped(model("2,3"), edits())
    full = Refresh.parsed("2,3").count(6)
    assert full == 3
    assert masked.usage.tokens_computed == full * 20 + 3 * 2 * 4
    assert referenced.usage.tokens_computed == full * 24 + 3 * 3 * 2
    assert open_.usage.tokens_computed == open_.usage.tokens_whole, "without a mask only the references are left out"
    for job in (masked, referenced, open_):
        assert not job.kept
        assert job.usage.kept_bytes > 0
    layers, wide = 4, 2 * 16
    assert masked.usage.kept_bytes == layers * 2 * 4 * wide * (20 - 8 + 20), "unmasked cells and the document in the sequence"


@pytest.mark.parametrize("guidance", [None, 4.0])
def test_it_is_near_the_whole_path_and_nearer_the_more_steps_are_full(guidance: float | None) -> None:
    whole = stepped(model(None, guidance=guidance), edits(8))
    off = {}
    for plan in ("1,8", "2,2"):
        found = stepped(model(plan, guidance=guidance), edits(8))
        off[plan] = [relative(a.latents, b.latents) for a, b in zip(found, whole, strict=True)]
    assert all(error > 0 for error in off["1,8"])
    assert sum(off["2,2"]) < sum(off["1,8"])
    assert max(off["2,2"]) < 0.5


def test_a_partial_step_is_the_full_one_where_nothing_has_changed_since() -> None:
    """Keys and values of the very same latents at the very same sigma: what a partial step computes is then exact."""
    served = model("1,9", guidance=4.0)
    whole, engine = model(None, guidance=4.0), Engine(served)
    for edit in edits(2):
        job = engine.admit(edit)
        before = job.latents.clone()
        engine.step([job])
        job.latents, job.sigmas = before, (job.sigmas[0], *job.sigmas[:2])
        engine.step([job])
        other = Engine(whole).admit(edit)
        Engine(whole).step([other])
        assert relative(job.latents[job.fresh], other.latents[job.fresh]) < 1e-5


@pytest.mark.parametrize(("name", "family"), [(KLEIN, {}), (KLEIN, {"guidance": 4.0}), (KV, {"cached": True})])
def test_full_and_partial_jobs_pack(name: str, family: dict[str, Any]) -> None:
    served = model("1,3", name, **family)
    alone = stepped(served, [replace(edit, steps=4 + i) for i, edit in enumerate(edits())])
    engine = Engine(served)
    jobs = [engine.admit(replace(edit, steps=4 + i)) for i, edit in enumerate(edits())]
    engine.step(jobs[:1])
    engine.step(jobs[:2])  # the first is partial here, the second full
    while running := [job for job in jobs if not job.done]:
        engine.step(running)
    for a, b in zip(alone, jobs, strict=True):
        assert relative(a.latents, b.latents) < PACK_TOLERANCE
        assert a.usage.tokens_computed == b.usage.tokens_computed


@pytest.mark.parametrize("refresh", [None, "1,2"])
def test_jobs_of_different_embedded_guidance_pack(refresh: str | None) -> None:
    """Each segment of a step has its own, whatever lies beside it."""
    served = model(refresh, "Flux2Pipeline")
    asked = [replace(edit, guidance=scale, steps=3) for edit, scale in zip(edits(), (1.5, 6.0, None), strict=True)]
    alone, packed = (stepped(served, asked, together) for together in (False, True))
    for a, b in zip(alone, packed, strict=True):
        assert relative(b.latents, a.latents) < PACK_TOLERANCE
    other = stepped(served, [replace(edit, guidance=3.0) for edit in asked], together=True)
    assert all(relative(a.latents, b.latents) > 10 * PACK_TOLERANCE for a, b in zip(packed, other, strict=True))


OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("Flux2Pipeline", {"masked": False}), ("FluxPipeline", {}), ("FluxFillPipeline", {}), ("FluxKontextInpaintPipeline", {}),
    ("FluxKontextPipeline", {}), ("QwenImageEditPipeline", {}), ("QwenImageEditPlusPipeline", {}),
    ("QwenImageEditPlusPipeline", {"zero_cond_t": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "family"), OTHERS)
def test_every_transformer_family_takes_it(name: str, family: dict[str, Any]) -> None:
    asked = [replace(edit, steps=3) for edit in edits()[: 1 if name == "FluxKontextPipeline" else 2]]
    if FAMILIES[name].references < 2:
        asked = [replace(edit, references=()) for edit in asked]
    if name == "FluxKontextPipeline":
        asked.append(edits(3)[2])
    plans = (None, "1,1", "1,3")
    made = {plan: tiny.of_family(name, Options(halo=None, feather=0, refresh=plan), **family) for plan in plans}
    whole, full, partial = (stepped(made[plan], asked) for plan in plans)
    packed = stepped(made["1,3"], asked, together=True)
    for a, b, c, d in zip(whole, full, partial, packed, strict=True):
        assert torch.equal(a.latents, b.latents)
        assert relative(d.latents, c.latents) < PACK_TOLERANCE
        masked = torch.arange(len(a.cells)) if a.known is None else (~a.known).nonzero()[:, 0]
        assert 0 < relative(c.latents[masked], a.latents[masked]) < 0.7
        assert c.usage.tokens_computed == len(a.cells) + 2 * len(masked)


def test_a_unet_computes_every_cell() -> None:
    with pytest.raises(InvalidOption, match="refresh"):
        tiny.of_family("StableDiffusionXLInpaintPipeline", Options(refresh="2,4"))


def test_it_is_said_and_outside_nothing_changes() -> None:
    edit = edits()[0]
    answer = Engine(model("2,4")).edit([edit])[0]
    assert answer.usage.approximate == ("masked tokens refreshed 2,4",)
    assert edit.mask is not None
    assert np.array_equal(answer.image[~edit.mask], edit.image[~edit.mask])
    assert Engine(model(None)).edit([edit])[0].usage.approximate == ()
    assert model("2,4").frame(edit).key != model("2,5").frame(edit).key != model(None).frame(edit).key


def test_references_alone_are_refreshed_where_cells_are_masked_ones_anyway() -> None:
    options = Options(halo=None, feather=0, refresh="1,2")
    served = tiny.model(KLEIN, {"masked": True, "cached": False}, options)
    job = stepped(served, edits()[:1])[0]
    assert served.approximate == ("references refreshed 1,2",)
    assert job.usage.tokens_computed == 6 * 8
    assert job.usage.kept_bytes == 4 * 2 * 4 * 32 * 20


def test_where_nothing_is_left_to_refresh_it_is_refused() -> None:
    with pytest.raises(InvalidOption, match="nothing to refresh"):
        tiny.model(KV, {"masked": True}, Options(refresh="2,4"))


PLANS = [
    (name, whole, refresh)
    for name, family in FAMILIES.items()
    for whole, refresh in ((None, None), (False, None), (True, "2,3"), (False, "2,3"))
    if (whole, refresh) == (None, None) or (family.adapter != "sdxl" and (whole or refresh is None or not family.cached))
]
"""Those that `Adapter` does not refuse."""


@pytest.mark.parametrize(("name", "whole", "refresh"), PLANS)
def test_the_estimated_size_is_that_of_the_steps_it_takes(name: str, whole: bool | None, refresh: str | None) -> None:
    """Of every family: with a second pass, with references that run along in full steps, and without either."""
    served = tiny.of_family(name, Options(halo=None, whole=whole, refresh=refresh))
    engine = Engine(served)
    pictures = edits()
    blank = Edit(tiny.photo(64, 64), "an owl", steps=6, blank=True)
    asked = [pictures[0], blank] if FAMILIES[name].references == 0 else [pictures[0], pictures[1], blank]
    for edit in asked:
        frame = served.frame(edit)
        tokens, steps = served.size(edit, frame)
        job, taken = engine.admit(edit, frame), 0
        texts = sum(len(prompt.embedded) for prompt in (job.prompt, job.negative) if prompt is not None)
        while not job.done:
            engine.step([job])
            taken += job.width - texts
        assert steps == job.steps
        assert tokens == -(-taken // steps)


def bench(name: str, out: Path, *options: str) -> list[record.Record]:
    sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
    assert importlib.import_module(name).main([*options, "--out", str(out)]) == 0
    rows = record.read(out)
    assert all(row.suite == name and row.value is not None and row.value >= 0 and not row.error for row in rows)
    return rows


def test_its_bench_makes_whole_rows(tmp_path: Path) -> None:
    options = ("--edits", "2", "--side", "128", "--steps", "2", "--schedules", "1,1", "1,2", "--dtype", "float32")
    rows = bench("refresh", tmp_path / "rows.jsonl", *options)
    at = {(row.extra["plan"], row.name): row.value for row in rows}
    assert at["1,1", "psnr_full"] == at["every step full", "psnr_full"] == 60
    assert at["masked alone", "tokens"] < at["1,2", "tokens"] < at["1,1", "tokens"] == 1
    assert at["1,2", "kept"] > 0


def test_the_bench_of_families_makes_whole_rows(tmp_path: Path) -> None:
    options = ("--families", "Flux2KleinPipeline", "StableDiffusionXLInpaintPipeline", "--side", "64", "--rounds", "1")
    rows = bench("families", tmp_path / "rows.jsonl", *options)
    at = {(row.extra["pipeline"], row.extra["mode"], row.name): row.value for row in rows}
    assert at["Flux2KleinPipeline", "whole", "difference"] < 1e-5
    assert ("Flux2KleinPipeline", "partial", "step") in at
    assert ("StableDiffusionXLInpaintPipeline", "whole", "speedup") in at
    for module in ("tiny", "test_sdxl"):  # which it has given larger parts
        importlib.import_module(module).parts.cache_clear()
