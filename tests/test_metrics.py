"""Zones of an edit and the metrics over them: what they are by definition, and where they look."""

import math
import sys
import types

import numpy as np
import pytest
import torch

from judged import case, noisy
from retouch.edit import Edit, InvalidImage, InvalidMask
from retouch.measure import gate, metrics, quality
from retouch.measure.cases import Case
from retouch.measure.quality import score
from retouch.measure.zones import SEAM, box_of, mirrored, zones_of

PIXELS = np.random.default_rng(0)


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
