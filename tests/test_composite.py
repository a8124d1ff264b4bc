"""The composite: pixels outside the mask are kept bit for bit, and its border fades in."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retouch.composite import composite, feather_weights
from retouch.picture import box_mask


@st.composite
def scenes(draw):
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = rng.random((height, width)) < draw(st.sampled_from([0.02, 0.5, 0.98, 1.0]))
    if draw(st.booleans()):
        x, y = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        mask |= box_mask((x, y, draw(st.integers(1, width - x)), draw(st.integers(1, height - y))), (width, height))
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    box = (x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height)))
    if draw(st.booleans()):
        box = (0, 0, width, height)
    original = rng.integers(0, 256, (height, width, draw(st.sampled_from([3, 4]))), dtype=np.uint8)
    edited = rng.integers(0, 256, (box[3] - box[1], box[2] - box[0], 3), dtype=np.uint8)
    if draw(st.booleans()):
        edited = rng.uniform(-20, 280, edited.shape).astype(np.float32)
    return original, edited, mask, box, draw(st.integers(0, 20))


@given(scenes())
def test_outside_the_mask_every_pixel_is_kept(scene):
    original, edited, mask, box, feather = scene
    before = original.copy()
    result = composite(original, edited, mask, box, feather)
    x0, y0, x1, y1 = box
    inside = np.zeros_like(mask)
    inside[y0:y1, x0:x1] = mask[y0:y1, x0:x1]
    assert result.shape == original.shape
    assert result.dtype == np.uint8
    assert np.array_equal(original, before)
    assert np.array_equal(result[~inside], original[~inside])
    assert np.array_equal(result[..., 3:], original[..., 3:])
    if feather == 0:
        whole = np.clip(np.rint(edited), 0, 255).astype(np.uint8)[inside[y0:y1, x0:x1]]
        assert np.array_equal(result[inside][:, :3], whole)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1), st.floats(0, 1), st.integers(0, 20))
def test_weights_are_zero_outside_and_reach_one_inside(height, width, seed, share, feather):
    mask = np.random.default_rng(seed).random((height, width)) < share
    weight = feather_weights(mask, feather)
    assert not weight[~mask].any()
    assert (weight[mask] >= 1 / (feather + 1) - 1e-6).all()
    assert weight.max(initial=0) == float(mask.any())


def test_feathering_is_a_ramp_from_the_border_inwards():
    mask = box_mask((10, 10, 40, 40), (60, 60))
    weight = feather_weights(mask, 4)
    assert weight[30, 8:18] == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])
    assert np.allclose(weight, weight.T)
    assert np.allclose(weight, weight[::-1])


def test_a_thin_mask_keeps_its_middle():
    for thickness in (1, 2, 3, 5):
        mask = box_mask((5, 10, 30, thickness), (40, 30))
        weight = feather_weights(mask, 12)
        assert weight[10 + thickness // 2, 20] == 1


def test_the_edge_of_the_picture_is_not_feathered():
    original, edited = np.zeros((40, 40, 3), np.uint8), np.full((40, 40, 3), 200, np.uint8)
    mask = box_mask((0, 0, 20, 40), (40, 40))
    result = composite(original, edited, mask, (0, 0, 40, 40), 4)
    assert (result[:, :15] == 200).all()
    assert (result[:, 19] < 60).all()
    assert (composite(original, edited, np.ones((40, 40), bool), (0, 0, 40, 40), 8) == 200).all()


def test_a_small_mask_is_composited_quickly():
    original = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    mask = box_mask((400, 400, 300, 300), (1024, 1024))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        composite(original, original, mask, (0, 0, 1024, 1024), 8)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1  # about 0.01 on an idle machine
