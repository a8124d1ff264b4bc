"""Quality of a target: it is asked for every case, its losses become rows and a sheet."""

import asyncio
import json

import numpy as np
import pytest
import torch

from judged import Painter, case, losses_of, noisy, pairs
from retouch.edit import InvalidOption
from retouch.measure import floor, metrics, quality
from retouch.measure.gate import PASS, Bounds
from retouch.measure.quality import Answers, answers, compare, score, scored, sheet
from retouch.measure.targets import Failed

# Asking a target


def asked(target, cases, **more):
    async def run():
        async with target:
            return await answers(target, cases, **more)

    return asyncio.run(run())


def test_every_case_is_asked_with_every_seed_and_its_document_brought_once():
    cases = [case(name="a", seed=10), case(size=(96, 90), name="b", seed=20)]
    target = Painter(cases)
    found = asked(target, cases, seeds=(0, 1, 5), clients=4)
    assert set(found.pictures) == {(name, seed) for name in "ab" for seed in (0, 1, 5)}
    assert sorted(target.sent) == [10, 11, 15, 20, 21, 25]
    assert target.brought == 2
    assert all(one.inside["psnr"] == metrics.IDENTICAL for one in scored(cases, found).values())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda made: made[:-1], "wrong size"),
        (lambda made: made[..., 0], "is to be"),
        (lambda made: np.dstack([made, made[..., :1]]), "transparent"),
        (lambda made: b"no picture", "no picture"),
        (lambda made: [made, made], "2 came"),
        (lambda made: [], "0 came"),
    ],
)
def test_a_target_that_lies_has_failed_with_its_reason(wrong, said):
    cases = [case()]
    found = asked(Painter(cases, wrong), cases)
    assert not found.pictures
    assert all(said in reason for reason in found.failed.values())
    rows = quality.records("liar", scored(cases, found), compare({}, {}), {}, failed=found.failed)
    assert any(said in row.error for row in rows)
    assert {row.name: row.value for row in rows}["failed edits"] == 2


def test_a_target_that_fails_at_times_is_scored_where_it_answers():
    cases, calls = [case(name="a"), case(size=(96, 90), name="b")], []

    def sometimes(made):
        calls.append(1)
        if len(calls) == 2:
            raise Failed("busy", "come again", 429)
        return made

    found = asked(Painter(cases, sometimes), cases)
    assert len(found.pictures) == 3
    assert list(found.failed.values()) == ["busy: come again"]


def test_an_opaque_alpha_is_no_lie():
    cases = [case()]
    found = asked(Painter(cases, lambda made: np.dstack([made, np.full(made.shape[:2], 255, np.uint8)])), cases)
    assert next(iter(found.pictures.values())).shape == cases[0].truth.shape


# Floor, rows, sheet


@pytest.fixture
def quick(monkeypatch):
    """Without the packages' metrics."""
    monkeypatch.setattr(metrics, "METRICS", metrics.METRICS[:1])


@pytest.mark.usefixtures("quick")
def test_the_floor_is_how_far_equal_runs_are_apart():
    cases = [case(name=f"{i}", seed=i) for i in range(4)]
    first = Answers({(one.name, seed): noisy(one, 8, seed) for one in cases for seed in (0, 1)})
    again = Answers({key: image.copy() for key, image in first.pictures.items()})
    moved = Answers({(one.name, seed): noisy(one, 9, seed) for one in cases for seed in (0, 1)})
    both = {
        name: (answered, scored(cases, answered)) for name, answered in (("first", first), ("again", again), ("moved", moved))
    }
    bounds = Bounds()
    same = floor.variant("again", cases, both["first"], both["again"], bounds)
    other = floor.variant("moved", cases, both["first"], both["moved"], bounds)
    assert (same.same, same.most, same.agree) == (8, 0, metrics.IDENTICAL)
    assert other.same < 8
    assert floor.floor_of([same], bounds) == {"inside psnr": 0, "inside ssimulacra2": 0}
    assert 0.5 < floor.floor_of([same, other], bounds)["inside psnr"] < 1.5
    assert floor.variant("none", cases, both["first"], (Answers(), {}), bounds) is None
    rows = floor.records("plain", [same, other], {}, floor.between_seeds(both["first"][1]), {"compiled": "no compiler"})
    assert [row.extra["variant"] for row in rows if row.error] == ["compiled"]
    assert next(row.extra["identical"] for row in rows if "agreement" in row.name) == 8
    assert floor.between_seeds({("a", 0): both["first"][1]["0", 0]}) is None


def test_rows_say_the_losses_the_verdict_and_the_worst():
    plain, fast = pairs(losses_of(-1, 0.2))
    verdict = compare(plain, fast)
    rows = {row.name: row for row in quality.records("fast", fast, verdict, {}, {f"case {i}": "insert" for i in range(40)})}
    loss = rows["loss of inside psnr"]
    assert loss.low < loss.value < loss.high < 0
    assert loss.extra["limit"] == 0.5
    assert rows["the gate"].extra["verdict"] == PASS
    assert rows["the gate"].value == 1
    assert "case" in rows["the gate"].extra["worst"]
    assert rows["edits changed outside"].value == 0
    assert all(json.dumps(row.flat(), allow_nan=False) for row in rows.values())


def test_the_sheet_shows_the_worst_pairs():
    cases = [case(name="a"), case(size=(128, 90), name="b")]
    plain, fast = ({(one.name, 0): noisy(one, sigma) for one in cases} for sigma in (2, 20))
    verdict = compare(*(scored(cases, Answers(side)) for side in (plain, fast)))
    page = sheet(cases, plain, fast, verdict, count=2, losses={("a", 0): {"inside psnr": 3.0}})
    assert page.dtype == np.uint8
    assert page.shape[2] == 3
    taller = sheet(cases, plain, fast, verdict, count=1).shape[0]
    assert page.shape[0] > taller


# What needs weights


def test_lpips_is_zero_for_the_same_and_grows_with_what_is_seen(tmp_path):
    from retouch.measure.learned import Learned

    torch.manual_seed(0)
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    body = {f"features.{at}.weight": torch.randn(o, i, k, k) / (i * k * k) ** 0.5 for at, (o, i, k) in shapes.items()}
    body |= {f"features.{at}.bias": torch.zeros(o) for at, (o, _, _) in shapes.items()}
    linear = {f"lin{at}.model.1.weight": torch.rand(1, o, 1, 1) for at, (o, _, _) in enumerate(shapes.values())}
    torch.save(body, tmp_path / "alexnet.pth")
    torch.save(linear, tmp_path / "lpips.pth")
    look = Learned(lpips=(tmp_path / "alexnet.pth", tmp_path / "lpips.pth"))
    one = case()
    values = [score(one, shown, look).inside["lpips"] for shown in (one.truth, noisy(one, 10), noisy(one, 60))]
    assert values[0] == 0 < values[1] < values[2]
    with pytest.raises(InvalidOption, match="missing"):
        Learned(lpips=(tmp_path / "lpips.pth", tmp_path / "alexnet.pth"))
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(InvalidOption, match="cannot be read"):
        Learned(lpips=(tmp_path / "bad.pth", tmp_path / "lpips.pth"))


def test_clip_scores_by_the_cosine_of_what_it_is_given(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    from retouch.measure.learned import Learned
    from retouch.train.text import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
    heads = {"num_attention_heads": 2}
    CLIPModel(CLIPConfig(text_config={**text, **heads}, vision_config={**vision, **heads}, projection_dim=8)).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    look = Learned(clip=tmp_path)
    value = score(case(), case().truth, look).inside["clip"]
    assert 0 <= value <= 100
    assert value == score(case(), case().truth, look).inside["clip"]
    with pytest.raises(InvalidOption, match="no folder"):
        Learned(clip=tmp_path / "nothing")


def test_a_judge_that_was_not_trained_is_refused(tmp_path):
    from retouch.measure.learned import Learned

    with pytest.raises(InvalidOption, match="no finished judge"):
        Learned(judge=tmp_path)
