"""The edit set: what it is said to be, read as it was written, and refused where it is damaged."""

import json

import numpy as np
import pytest
from PIL import Image

from judged import case
from retouch.measure import cases as edit_sets
from retouch.measure.cases import InvalidCases
from retouch.train.cases import main_hue

KINDS = {"remove on photos": 12, "remove on flat": 12, "recolour": 16, "insert": 16, "replace": 8}


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
