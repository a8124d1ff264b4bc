"""The part of a picture that is worked on: it lies in the picture and holds the mask, whatever their sizes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from retouch.boxes import around, working_crop
from retouch.picture import box_mask


@given(st.data())
def test_the_crop_lies_in_the_picture_and_holds_the_mask(data):
    width, height = data.draw(st.integers(1, 1500)), data.draw(st.integers(1, 1500))
    target = data.draw(st.sampled_from([64, 256, 512]))
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    w, h = data.draw(st.integers(1, width - x)), data.draw(st.integers(1, height - y))
    (x0, y0, x1, y1), scale = working_crop(box_mask((x, y, w, h), (width, height)), (width, height), target)
    assert 0 <= x0 <= x < x + w <= x1 <= width
    assert 0 <= y0 <= y < y + h <= y1 <= height
    longer = max(x1 - x0, y1 - y0)
    if max(width, height) <= target:
        assert (x1 - x0, y1 - y0, scale) == (width, height, 1.0)
    else:
        assert longer >= target
        assert scale == target / longer
        margin = min(64, -(-max(w, h) // 2))
        assert x1 - x0 >= min(width, w + 2 * margin)
        assert y1 - y0 >= min(height, h + 2 * margin)


def test_the_crop_of_a_24_megapixel_photo():
    mask = box_mask((3000, 2000, 1000, 400), (6000, 4000))
    assert working_crop(mask, (6000, 4000), 512) == ((2500, 1500, 4500, 2900), 512 / 2000)
    corner = box_mask((5990, 0, 10, 10), (6000, 4000))
    assert working_crop(corner, (6000, 4000), 512) == ((5488, 0, 6000, 512), 1.0)
    strip = box_mask((100, 0, 10, 100), (4000, 100))
    assert working_crop(strip, (4000, 100), 512) == ((0, 0, 512, 100), 1.0)


@given(
    st.integers(1, 90), st.integers(1, 90), st.integers(0, 89), st.integers(0, 89), st.integers(0, 60),
    st.sampled_from([1.0, 8.0, 16.0, 20.5]),
)  # fmt: skip
def test_around_holds_the_mask_and_its_context(width, height, x, y, context, cell):
    mask = np.zeros((height, width), bool)
    x, y = x % width, y % height
    mask[y, x] = True
    x0, y0, x1, y1 = around(mask, (0, 0, width, height), context, cell)
    assert 0 <= x0 <= max(0, x - context)
    assert min(width, x + 1 + context) <= x1 <= width
    assert 0 <= y0 <= max(0, y - context)
    assert min(height, y + 1 + context) <= y1 <= height
    assert max(0, x - context) - x0 <= cell
    assert x1 - min(width, x + 1 + context) <= cell
