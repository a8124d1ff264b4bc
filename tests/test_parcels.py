"""What the server's end says and what the process's end makes of it: edits arrive as they were, pictures once."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retouch.edit import Edit
from retouch.engine.parcels import Asked, Packer


class Ends:
    """Both ends, with a pipe between them that counts what goes through it."""

    def __init__(self, budget: int = 1 << 20) -> None:
        self.packer, self.shelf, self.bytes = Packer(budget), dict[int, np.ndarray](), 0

    def send(self, edit: Edit) -> Edit:
        message = pickle.dumps(self.packer.packed(edit))
        self.bytes = len(message)
        asked: Asked = pickle.loads(message)
        opened = asked.opened(self.shelf)
        assert sum(picture.nbytes for picture in self.shelf.values()) == self.packer.bytes <= self.packer.budget
        return opened


def photo(seed: int = 0, side: int = 64, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side + 1, channels), np.uint8)


def same(one: Edit, other: Edit) -> bool:
    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, np.ndarray) else [plain(v) for v in value] if type(value) is tuple else value

    return all(plain(getattr(one, f.name)) == plain(getattr(other, f.name)) for f in fields(Edit))


def test_an_edit_arrives_as_it_was() -> None:
    image = photo(channels=4)
    mask = np.random.default_rng(1).random(image.shape[:2]) < 0.3
    edit = Edit(
        image[3:40, 5:50], "a cat", mask[3:40, 5:50], (photo(2), image, photo(3)[::2]), seed=7, steps=3, guidance=1.5,
        priority=-2, deadline=3.5, tenant="studio", reuse=False, negative="dogs", adapters=(("ink", 0.5),),
    )  # fmt: skip
    ends = Ends()
    for _ in range(2):
        assert same(ends.send(edit), edit)
    assert same(ends.send(Edit(photo(4), "a dog", blank=True)), Edit(photo(4), "a dog", blank=True))


def test_pixels_are_sent_once() -> None:
    ends, image = Ends(), photo()
    first = ends.send(Edit(image, "a cat"))
    assert ends.bytes > image.nbytes
    for variation in range(1, 4):
        again = ends.send(Edit(image[:, :], "a cat", image[..., 0] > 9, seed=variation))
        assert again.image is first.image
        assert ends.bytes < image.nbytes / 4
    with pytest.raises(ValueError, match="read-only"):
        first.image[0, 0] = 0
    ends.send(Edit(image[1:], "a cat"))
    assert ends.bytes > image.nbytes, "another crop is another picture"


def test_what_nobody_has_here_any_more_is_forgotten_there() -> None:
    """Though the next picture may lie at the very same address."""
    ends = Ends()
    for seed in range(20):
        image = photo(seed)
        assert same(ends.send(Edit(image[1:60], "a cat")), Edit(image[1:60], "a cat"))
        assert len(ends.shelf) <= 2
        del image
    ends.send(Edit(photo(side=8), "a cat"))
    assert len(ends.shelf) == 1


def test_what_was_used_longest_ago_goes_first() -> None:
    images = [photo(seed) for seed in range(4)]
    ends = Ends(3 * images[0].nbytes)
    for number in (0, 1, 2, 0, 3, 0, 2):
        ends.send(Edit(images[number], "a cat"))
    assert ends.bytes < images[0].nbytes
    ends.send(Edit(images[1], "a cat"))
    assert ends.bytes > images[0].nbytes


def test_a_picture_above_the_budget_is_sent_each_time() -> None:
    image, ends = photo(), Ends(100)
    for _ in range(2):
        assert same(ends.send(Edit(image, "a cat", references=(image,))), Edit(image, "a cat", references=(image,)))
        assert image.nbytes < ends.bytes < 2 * image.nbytes
    assert not ends.shelf


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans()), max_size=40), st.integers(0, 40_000))
def test_whatever_comes_and_goes_both_ends_agree(turns: list[tuple[int, int, bool]], budget: int) -> None:
    ends, pictures = Ends(budget), [photo(seed, 40 + seed) for seed in range(6)]
    for number, (one, other, renew) in enumerate(turns):
        if renew:
            pictures[one] = photo(100 + number, 40 + one)
        edit = Edit(pictures[one], "a cat", references=(pictures[other][:20], pictures[other]))
        assert same(ends.send(replace(edit, seed=number)), replace(edit, seed=number))
