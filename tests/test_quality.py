"""Quality against known truths: zones, metrics, the edit set, the gate, and the command."""

import asyncio
import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from retouch import cli, record
from retouch.edit import Edit, InvalidImage, InvalidMask, InvalidOption, Usage
from retouch.measure import cases as edit_sets
from retouch.measure import floor, gate, metrics, quality, quality_command
from retouch.measure.cases import Case, InvalidCases
from retouch.measure.gate import FAIL, PASS, UNDECIDED, Bounds, pair_losses
from retouch.measure.quality import Answers, Scores, answers, compare, score, scored, sheet
from retouch.measure.targets import Failed, Served
from retouch.measure.zones import SEAM, box_of, mirrored, zones_of
from retouch.train.cases import main_hue

PIXELS = np.random.default_rng(0)
KINDS = {"remove on photos": 12, "remove on flat": 12, "recolour": 16, "insert": 16, "replace": 8}


def case(size=(96, 80), name="one", kind="insert", seed=3, colour=""):
    """A smooth picture with a square to be changed in the middle."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    image = np.stack([x * 2 % 256, y * 2 % 256, (x + y) % 256], 2).astype(np.uint8)
    mask = np.zeros(size, bool)
    mask[30:62, 24:56] = True
    truth = image.copy()
    truth[mask] = (200, 40, 40)
    return Case(Edit(image, "a red square", mask, seed=seed), truth, kind, name, colour=colour)


def noisy(one, sigma, seed=0):
    """The truth with noise inside the mask."""
    shown = one.truth.astype(np.float64)
    shown[one.mask] += np.random.default_rng(seed).normal(0, sigma, shown[one.mask].shape)
    return np.clip(shown, 0, 255).round().astype(np.uint8)


# Zones


def test_zones_are_apart_and_the_seam_lies_across_the_border():
    zones = zones_of(case().mask)
    assert (zones.inside ^ zones.outside).all()
    ys, xs = np.nonzero(zones.seam)
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == (30 - SEAM, 61 + SEAM, 24 - SEAM, 55 + SEAM)
    assert (zones.seam & zones.inside).any()
    assert (zones.seam & zones.outside).any()
    assert not zones.seam[45, 40]


def test_the_seam_does_not_follow_the_edge_of_the_picture():
    mask = np.zeros((32, 32), bool)
    mask[:, :10] = True
    assert set(np.nonzero(zones_of(mask).seam)[1]) == set(range(10 - SEAM, 10 + SEAM))


def test_a_mask_of_the_whole_picture_has_one_zone_and_an_empty_one_none():
    assert list(zones_of(np.ones((8, 8), bool)).named()) == ["inside"]
    with pytest.raises(InvalidMask, match="empty"):
        zones_of(np.zeros((8, 8), bool))


def test_the_crop_stays_in_the_picture_and_is_mirrored_to_size():
    mask = np.zeros((40, 50), bool)
    mask[0:5, 45:50] = True
    assert box_of(mask, 4) == (41, 0, 50, 9)
    small = PIXELS.integers(0, 256, (9, 30, 3)).astype(np.uint8)
    large = mirrored(small, 64)
    assert min(large.shape[:2]) >= 64
    assert (large[9:18, :30] == small[::-1]).all()
    assert large.mean() == pytest.approx(small.mean())


# Metrics


def test_the_truth_itself_is_perfect_by_every_metric():
    one = case()
    scores = score(one, one.truth)
    assert scores.inside["psnr"] == metrics.IDENTICAL
    assert scores.inside["ssim"] == pytest.approx(1)
    assert scores.inside["flip"] == 0
    assert scores.inside["ssimulacra2"] == 100
    assert scores.changed_outside == 0
    assert scores.outside == {"psnr": metrics.IDENTICAL}
    assert set(scores.seam) == {"psnr", "ssim", "flip"}


def test_psnr_is_what_it_is_by_definition():
    truth = np.full((10, 10, 3), 100, np.uint8)
    answer = truth.copy()
    answer[:5] += 10
    where = np.zeros((10, 10), bool)
    where[:5] = True
    assert metrics.psnr(truth, answer, where) == pytest.approx(20 * math.log10(255 / 10))
    assert metrics.psnr(truth, answer, ~where) == metrics.IDENTICAL
    assert metrics.psnr(truth, answer, where | True) == pytest.approx(20 * math.log10(255 / 10) + 10 * math.log10(2))


def test_ssim_agrees_with_that_of_scikit_image():
    structural = pytest.importorskip("skimage.metrics").structural_similarity
    truth, answer = (PIXELS.integers(0, 256, (40, 53, 3)).astype(np.uint8) for _ in range(2))
    answer = (truth // 2 + answer // 2).astype(np.uint8)
    luma = [picture.astype(float) @ (0.299, 0.587, 0.114) for picture in (truth, answer)]
    _, known = structural(
        *luma, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )  # fmt: skip
    np.testing.assert_allclose(metrics.ssim_map(truth, answer), known, atol=1e-9)


def test_more_noise_is_worse_by_every_metric_and_only_where_it_is():
    one = case()
    weak, strong = (score(one, noisy(one, sigma)) for sigma in (6, 24))
    for name in weak.inside:
        sign = -1 if name in gate.LOWER_IS_BETTER else 1
        assert sign * weak.inside[name] > sign * strong.inside[name], name
    assert weak.changed_outside == strong.changed_outside == 0
    assert weak.outside["psnr"] == metrics.IDENTICAL


def test_an_error_deep_inside_is_none_of_the_seams():
    one = case()
    shown = one.truth.copy()
    shown[44:48, 38:42] = 0
    scores = score(one, shown)
    assert scores.seam["psnr"] == metrics.IDENTICAL
    assert scores.inside["psnr"] < 40


def test_pixels_changed_outside_are_counted():
    one = case()
    shown = one.truth.copy()
    shown[0, :5] ^= 1
    assert score(one, shown).changed_outside == 5


def test_what_is_small_is_scored_too():
    y = np.full((5, 5, 3), 90, np.uint8)
    mask = np.zeros((5, 5), bool)
    mask[2, 2] = True
    truth = y.copy()
    truth[2, 2] = 0
    scores = score(Case(Edit(y, "a dot", mask), truth, "insert", "dot"), y)
    assert scores.inside["psnr"] == pytest.approx(20 * math.log10(255 / 90))
    assert np.isfinite(list(scores.flat().values())).all()


@pytest.mark.parametrize("shape", [(96, 81, 3), (80, 96, 3), (96, 80), (96, 80, 1)])
def test_an_answer_of_another_size_is_refused(shape):
    with pytest.raises(InvalidImage, match=r"wrong size|is to be"):
        score(case(), np.zeros(shape, np.uint8))


def test_a_metric_whose_package_is_not_there_is_named():
    metrics.imported.cache_clear()
    missing = metrics.missing()
    known = {name for name in ("piq", "pycvvdp") if metrics.imported(name)[1]}
    assert {"fsim", "gmsd"} <= set(missing) or "piq" not in known
    assert all("install" in why for why in missing.values())
    rows = quality.records("p", {("one", 0): score(case(), case().truth)}, None, {})
    errors = {row.name: row.error for row in rows if row.error}
    assert {f"inside {name}" for name in missing} == set(errors)


def test_packages_that_are_there_are_asked(monkeypatch):
    """piq and cvvdp, as far as this project sees them."""
    seen = []

    class Display:
        def __init__(self, display_name, device):
            assert display_name == "standard_4k"

        def predict(self, answer, truth, dim_order):
            seen.append((answer.shape, truth.dtype, dim_order))
            return torch.tensor(9.5), {}

    def measured(answer, truth):
        assert answer.shape == truth.shape
        assert answer.shape[:2] == (1, 3)
        assert min(answer.shape[2:]) >= 225
        assert 0 <= float(answer.min()) <= float(answer.max()) <= 1
        return (answer - truth).abs().mean()

    names = ("multi_scale_ssim", "fsim", "vsi", "gmsd", "mdsi")
    for module, has in (("piq", dict.fromkeys(names, measured)), ("pycvvdp", {"cvvdp": Display})):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        vars(sys.modules[module]).update(has)
    metrics.imported.cache_clear()
    metrics._display.cache_clear()
    try:
        scores = score(case(), noisy(case(), 9))
        assert scores.inside["cvvdp"] == 9.5
        assert scores.inside["gmsd"] > 0
        assert seen[0][2] == "HWC"
        assert not metrics.missing()
    finally:
        metrics.imported.cache_clear()
        metrics._display.cache_clear()


def test_a_recoloured_thing_is_right_by_its_hue():
    one = case(kind="recolour", colour="red")
    assert score(one, one.truth).right
    shown = one.truth.copy()
    shown[one.mask] = (40, 40, 220)
    assert score(one, shown).right is False
    assert score(case(), one.truth).right is None


# The edit set


@pytest.fixture(scope="module")
def bundled():
    return edit_sets.load()


def test_the_bundled_set_is_what_it_says(bundled):
    kinds = [one.kind for one in bundled]
    assert {kind: kinds.count(kind) for kind in KINDS} == KINDS
    assert len({one.name for one in bundled}) == len(bundled)
    assert len({one.edit.seed for one in bundled}) == len(bundled)
    for one in bundled:
        assert one.truth.shape == one.edit.image.shape
        assert max(one.truth.shape) <= 256
        assert 0.005 < one.mask.mean() < 0.6, one.name
        assert not one.edit.reuse
    folder = edit_sets.BUNDLED
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1.4e6
    credited = (folder / "ATTRIBUTION.md").read_text()
    assert all(f"`{one.ground}`" in credited for one in bundled if one.ground.endswith(".jpg"))


def test_truths_are_their_documents_outside_of_the_mask_and_not_inside(bundled):
    for one in bundled:
        changed = (one.truth != one.edit.image).any(2)
        assert not (changed & ~one.mask).any(), one.name
        assert changed.any(), one.name
        if one.kind == "recolour":
            hues = [main_hue(picture, changed) for picture in (one.edit.image, one.truth)]
            assert hues[0] != hues[1] == one.colour, one.name


def test_a_set_reads_as_it_was_written(tmp_path):
    made = [case(name="a"), case(name="b", seed=9, kind="recolour", colour="red")]
    edit_sets.write(tmp_path, made, "two")
    read = edit_sets.load(tmp_path)
    for one, other in zip(made, read, strict=True):
        for picture in ("truth", "mask"):
            np.testing.assert_array_equal(getattr(one, picture), getattr(other, picture))
        np.testing.assert_array_equal(one.edit.image, other.edit.image)
        assert (one.name, one.kind, one.colour, one.edit.seed) == (other.name, other.kind, other.colour, other.edit.seed)


def test_kinds_and_counts_choose(bundled):
    assert {one.kind for one in edit_sets.load(kinds=["recolour"])} == {"recolour"}
    few = edit_sets.load(count=8)
    assert len(few) == 8
    assert len({one.kind for one in few}) >= 4
    with pytest.raises(InvalidCases, match="no kind repaint"):
        edit_sets.load(kinds=["repaint"])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "index.json").write_text("{"), "no index"),
        (lambda folder: (folder / "index.json").unlink(), "no index"),
        (lambda folder: _index(folder, format=9), "format 9"),
        (lambda folder: _index(folder, cases=[{"name": "a"}]), "no index"),
        (lambda folder: (folder / "a.webp").write_bytes(b"RIFF"), "case a"),
        (lambda folder: (folder / "a-truth.webp").unlink(), "case a"),
        (lambda folder: Image.new("RGB", (9, 9)).save(folder / "a-truth.webp", lossless=True), "another size"),
        (lambda folder: Image.new("RGB", (80, 96)).save(folder / "a.webp", lossless=True), "no alpha"),
    ],
)
def test_a_damaged_set_is_refused(tmp_path, spoil, said):
    edit_sets.write(tmp_path, [case(name="a")])
    spoil(tmp_path)
    with pytest.raises(InvalidCases, match=said):
        edit_sets.load(tmp_path)


def _index(folder, **changed):
    told = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**told, **changed}))


def test_a_truth_that_differs_outside_is_not_written(tmp_path):
    one = case()
    one.truth[0, 0] ^= 1
    with pytest.raises(InvalidCases, match="outside"):
        edit_sets.write(tmp_path, [one])


# The gate


def pairs(losses, seeds=2, **more):
    """Plain and fast Scores of as many cases; the loss of each case lies around what is given, in dB."""
    plain, fast = {}, {}
    for index, loss in enumerate(losses):
        for seed in range(seeds):
            key, wobble = (f"case {index}", seed), 0.01 * (seed - (seeds - 1) / 2)
            base = 20.0 + index
            plain[key] = Scores({"psnr": base, "ssimulacra2": base}, {}, {}, 0)
            values = {"psnr": base - loss + wobble, "ssimulacra2": base - loss + wobble}
            fast[key] = Scores(values, {}, {}, more.get("changed", 0))
    return plain, fast


def losses_of(mean, spread, n=40, seed=0):
    drawn = np.random.default_rng(seed).normal(0, spread, n)
    return drawn - drawn.mean() + mean


@pytest.mark.parametrize(
    ("mean", "spread", "verdict"),
    [(0.0, 0.3, PASS), (-2.0, 1.0, PASS), (0.45, 1.0, UNDECIDED), (0.7, 1.5, UNDECIDED), (1.5, 0.5, FAIL)],
)
def test_the_gate_has_three_answers(mean, spread, verdict):
    found = compare(*pairs(losses_of(mean, spread)))
    assert found.verdict == verdict, found.reasons
    assert (verdict == PASS) == (not found.reasons)
    loss = found.losses["inside psnr"]
    assert loss.low < loss.mean < loss.high
    assert loss.mean == pytest.approx(mean)
    assert (loss.n, loss.seeds) == (40, 2)


def test_too_few_cases_or_seeds_are_never_a_pass():
    assert compare(*pairs(losses_of(-5, 0.1, n=8))).verdict == UNDECIDED
    assert compare(*pairs(losses_of(-5, 0.1), seeds=1)).verdict == UNDECIDED
    assert compare({}, {}).verdict == UNDECIDED
    assert compare(*pairs([0.0])).losses["inside psnr"].high == math.inf
    assert compare(*pairs(losses_of(9, 0.1, n=8))).verdict == UNDECIDED


def test_one_changed_pixel_outside_fails_however_few_they_are():
    plain, fast = pairs([0.0, 0.0])
    fast["case 1", 0] = Scores(fast["case 1", 0].inside, {}, {}, 1)
    found = compare(plain, fast)
    assert found.verdict == FAIL
    assert "case 1, seed 0" in found.reasons[0]
    assert found.worst[0] == ("case 1", 0)


def test_an_edit_that_one_path_did_not_answer_is_not_left_out_silently():
    plain, fast = pairs(losses_of(-1, 0.1))
    del fast["case 3", 1]
    found = compare(plain, fast)
    assert found.verdict == UNDECIDED
    assert found.unpaired == (("case 3", 1),)


def test_a_gated_metric_that_was_not_measured_decides_nothing():
    plain, fast = pairs(losses_of(-1, 0.1))
    for side in (plain, fast):
        for key, one in side.items():
            side[key] = Scores({"psnr": one.inside["psnr"]}, {}, {}, 0)
    found = compare(plain, fast)
    assert found.verdict == UNDECIDED
    assert "inside ssimulacra2 was measured in 0 of 40 cases" in found.reasons


def test_what_the_plain_path_does_to_itself_is_allowed_for():
    plain, fast = pairs(losses_of(0.3, 0.2))
    assert compare(plain, fast).verdict == PASS
    assert compare(plain, fast, floor={"inside psnr": 0.01}).verdict == PASS
    unsure = compare(plain, fast, floor={"inside psnr": 0.2})
    assert unsure.verdict == UNDECIDED
    assert "moves by 0.2" in unsure.reasons[0]
    plain, fast = pairs(losses_of(1.5, 0.2))
    assert compare(plain, fast, floor={"inside psnr": 2.0, "inside ssimulacra2": 2.0}).verdict == UNDECIDED


def test_of_a_metric_whose_less_is_better_more_is_a_loss():
    bounds = Bounds({"inside flip": 0.1})
    plain = {(f"{i}", s): Scores({"flip": 0.1}, {}, {}, 0) for i in range(30) for s in (0, 1)}
    fast = {key: Scores({"flip": 0.3}, {}, {}, 0) for key in plain}
    found = compare(plain, fast, bounds)
    assert found.losses["inside flip"].mean == pytest.approx(0.2)
    assert found.verdict == FAIL


def test_the_worst_come_first():
    plain, fast = pairs([0.1, 3.0, -1.0, 0.5] * 10)
    found = compare(plain, fast)
    assert {int(name.split()[1]) % 4 for name, _ in found.worst[:20]} == {1}
    losses = pair_losses(*({key: one.flat() for key, one in side.items()} for side in (plain, fast)), ["inside psnr"])
    assert losses[found.worst[0]]["inside psnr"] == pytest.approx(3.0, abs=0.01)


@pytest.mark.parametrize(
    "wrong", [{"limits": {}}, {"limits": {"inside psnr": 0}}, {"limits": {"inside psnr": math.nan}}, {"level": 1}, {"cases": 1}]
)
def test_bounds_that_bound_nothing_are_refused(wrong):
    with pytest.raises(InvalidOption):
        Bounds(**wrong)


def test_students_t_is_that_of_the_tables():
    for level, freedom, known in ((0.95, 1, 6.313752), (0.95, 5, 2.015048), (0.975, 10, 2.228139), (0.95, 63, 1.669402)):
        assert gate.student(level, freedom) == pytest.approx(known, abs=2e-6)


@pytest.mark.parametrize("draw", ["normal", "skewed", "few"])
def test_an_upper_bound_covers_the_mean_as_often_as_it_says(draw, monkeypatch):
    """95 % each side, over 250 samples: no fewer than 91 % cover (three standard errors), but for very skewed ones 87 %."""
    monkeypatch.setattr(gate, "RESAMPLES", 1000)
    rng, covered = np.random.default_rng(1), []
    for seed in range(250):
        n = 20 if draw == "few" else 64
        values = rng.exponential(1.0, n) - 1 if draw == "skewed" else rng.normal(0, 1, n)
        low, high = gate.interval(values, 0.95, seed)
        covered.append((low <= 0, high >= 0))
    assert np.mean(covered, 0).min() >= (0.87 if draw == "skewed" else 0.91)
    assert np.mean(covered, 0).max() < 1


def test_an_interval_is_the_same_every_time():
    values = np.random.default_rng(5).normal(0, 1, 30)
    assert gate.interval(values, 0.95) == gate.interval(values, 0.95)
    assert gate.interval(np.zeros(30), 0.95) == (0, 0)


# Asking a target


class Painter:
    """Answers with the truth of the case it is asked for, or does as it is told."""

    name = "painter"

    def __init__(self, cases, wrong=None):
        self.truths = {one.edit.image.tobytes(): one.truth for one in cases}
        self.wrong, self.sent, self.brought = wrong, [], 0

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        return None

    async def document(self, image, tenant):
        self.brought += 1
        return image

    async def kept(self, made, tenant):
        return made

    def prepare(self, call):
        return call.drawn()

    async def send(self, call, prepared, document):
        await asyncio.sleep(0)
        self.sent.append(call.seed)
        made = self.truths[document.tobytes()]
        if self.wrong is not None:
            made = self.wrong(made)
        return Served(0.0, made if isinstance(made, list) else [made], usage=Usage())


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


# The command


def test_the_engine_is_held_against_the_whole_path(tmp_path, capsys):
    """On a tenth of the set: undecided, with everything shown; outside identical on real weights."""
    out, page = tmp_path / "rows.jsonl", tmp_path / "worst.png"
    asked = ["quality", "--engine", "--dtype", "float32", "--against", "whole", "--cases", "2", "--seeds", "1"]
    code = cli.main([*asked, "--out", str(out), "--sheet", str(page)])
    printed = capsys.readouterr().out
    assert code == quality_command.UNSURE, printed
    assert "undecided" in printed
    assert "2 cases are too few" in printed
    rows = record.read(out)
    by_path = {row.extra["path"]: row.value for row in rows if row.name == "inside psnr" and not row.extra["kind"]}
    assert set(by_path) == {"whole", "engine"}
    assert all(row.value == 0 for row in rows if row.name == "edits changed outside")
    assert Image.open(page).width > 1000


@pytest.mark.usefixtures("quick")
def test_a_gate_that_fails_is_exit_code_1(monkeypatch, tmp_path, capsys):
    """Two painters in place of engines: what one paints wrong is certain."""
    cases = [case((64, 60), f"{i}", seed=i) for i in range(20)]
    edit_sets.write(tmp_path, cases)
    sides = {"http://plain": None, "http://fast": lambda made: np.clip(made.astype(int) + 30, 0, 255).astype(np.uint8)}
    monkeypatch.setattr(quality_command, "Endpoint", lambda url, **_: Painter(cases, sides[url]))
    base = ["quality", "--edits", str(tmp_path), "--against", "http://plain", "--limit", "inside psnr=0.5"]
    assert cli.main([*base, "--url", "http://fast"]) == 1
    assert "changed pixels outside" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*base, "--url", "http://plain", "--floor"]) == 0
    assert "pass" in capsys.readouterr().out
    assert cli.main([*base, "--url", "http://plain", "--seeds", "1"]) == 3


def test_a_server_that_is_down_is_one_error_and_exit_code_1(capsys):
    pytest.importorskip("httpx")
    assert cli.main(["quality", "--url", "http://127.0.0.1:9", "--cases", "2", "--seeds", "1"]) == 1
    assert "nothing was answered: unreachable" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--seeds", "0"], "at least 1"),
        (["--kind", "repaint"], "no kind"),
        (["--limit", "psnr=1"], "ZONE METRIC"),
        (["--limit", "inside psnr=x"], "ZONE METRIC"),
        (["--limit", "inside psnr=-1"], "above 0"),
        (["--level", "2"], "level"),
        (["--sheet", "a.png"], "--against"),
        (["--edits", "nowhere"], "no index"),
        (["--lpips", "a", "b"], "cannot be read"),
    ],
)
def test_bad_options_are_refused(wrong, said, capsys):
    assert cli.main(["quality", "--engine", *wrong]) == 2
    assert said in capsys.readouterr().err


def test_options_of_an_engine_are_not_a_servers(capsys):
    assert cli.main(["quality", "--url", "http://127.0.0.1:9", "--keys", "int8"]) == 2
    assert "options of --engine" in capsys.readouterr().err
