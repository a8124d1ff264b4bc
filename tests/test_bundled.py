"""Real weights behind the engine: beside the loop as in it, previews that show what is coming, pictures from nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import retouch
import tiny
from retouch import picture
from retouch.edit import Edit
from retouch.engine import Engine

PHOTOS = Path(__file__).parent.parent / "photos"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return retouch.load(dtype="float32", beside=0)


def photo(name: str, height: int = 160, width: int = 160) -> np.ndarray:
    return picture.read(PHOTOS / f"{name}.jpg").pixels[:height, :width]


def asked(seed: int, **more: Any) -> Edit:
    names, prompts = ("meadow", "stream", "mountain"), ("a red apple", "remove the object", "a very large green balloon")
    image = photo(names[seed % 3], 96 + 16 * (seed % 3), 128)
    mask = None if seed == 4 else picture.box_mask((16 + 5 * seed, 20, 50, 40), image.shape[1::-1])
    references = (photo("fig", 64, 64),) if seed == 3 else ()
    return Edit(image, prompts[seed % 3], mask, references, seed=seed, steps=1 + seed % 4, **more)


@pytest.fixture(scope="module")
def serial(engine: Engine) -> list[np.ndarray]:
    return [engine.edit([asked(seed)])[0].image for seed in range(6)]


@pytest.mark.parametrize("beside", [1, 2])
def test_beside_the_loop_every_bit_is_the_same(engine: Engine, serial: list[np.ndarray], beside: int) -> None:
    other = Engine(engine.model, beside=beside)
    try:
        for seed, image in enumerate(serial):
            assert (other.edit([asked(seed)])[0].image == image).all()
            again = other.submit(asked(seed, reuse=False), lambda step, image: None, 3)
            while other.tick():
                pass
            assert (again.answer.result(0).image == image).all(), "previews are looks at it, and nothing more"
    finally:
        other.close()


@pytest.mark.parametrize("beside", [0, 2])
def test_packed_beside_the_loop_answers_differ_by_rounding(engine: Engine, serial: list[np.ndarray], beside: int) -> None:
    other = Engine(engine.model, beside=beside)
    try:
        for answer, image in zip(other.edit([asked(seed) for seed in range(6)]), serial, strict=True):
            assert np.abs(answer.image.astype(int) - image).max() <= 1
    finally:
        other.close()


def test_prompts_of_many_threads_are_those_of_one(engine: Engine) -> None:
    """The tokenizer is one object, and is set to each prompt's length."""
    texts = ["a red apple " * (1 + i % 9) + f"number {i}" for i in range(30)]
    alone = [engine.model.encode_prompt("", text, None).embedded for text in texts]
    with ThreadPoolExecutor(3) as pool:
        together = pool.map(lambda text: engine.model.encode_prompt("", text, None).embedded, texts * 2)
        assert all(torch.equal(a, b) for a, b in zip(together, alone * 2, strict=True))


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.astype(float).ravel(), b.astype(float).ravel())[0, 1])


@pytest.mark.parametrize(("name", "prompt"), [("meadow", "a red apple"), ("stream", "a strawberry"), ("sunset", "a panda")])
def test_previews_show_what_is_coming(engine: Engine, name: str, prompt: str) -> None:
    image, seen = photo(name), []
    mask = picture.box_mask((40, 48, 72, 72), image.shape[1::-1])
    one = engine.submit(Edit(image, prompt, mask, seed=1), lambda step, look: seen.append(look), 3)
    while engine.tick():
        pass
    final = one.answer.result(0).image
    looks = [look for look in seen if look is not None]
    assert len(looks) == 3
    for look in looks:
        assert look.shape == image.shape
        assert look.dtype == np.uint8
        assert (look[~mask] == image[~mask]).all()
    alike = [likeness(look[mask], final[mask]) for look in looks]
    assert min(alike) > likeness(image[mask], final[mask])
    assert alike[-1] > 0.9
    assert alike[-1] > alike[0]


def test_a_picture_from_nothing(engine: Engine) -> None:
    nothing = Edit(np.zeros((96, 128, 3), np.uint8), "a red apple", seed=3, blank=True, reuse=False)
    white = Edit(np.full((96, 128, 3), 255, np.uint8), "a red apple", seed=3, blank=True, reuse=False)
    looks: list[np.ndarray | None] = []
    one = engine.submit(nothing, lambda step, look: looks.append(look), 1)
    while engine.tick():
        pass
    made, same = one.answer.result(0).image, engine.edit([white])[0].image
    assert made.shape == (96, 128, 3)
    assert made.std() > 5
    assert (made == same).all(), "the pixels give the size alone"
    assert likeness(looks[-1], made) > 0.5  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["Flux2KleinKVPipeline", "Flux2KleinPipeline", "Flux2Pipeline"])
def test_a_picture_from_nothing_where_no_document_is_needed(name: str) -> None:
    model = tiny.model(name)
    assert not model.family.grey
    engine = Engine(model)
    nothing = Edit(np.zeros((48, 80, 3), np.uint8), "a cat", seed=1, steps=2, blank=True)
    document = model.encode_document(model.frame(nothing))
    assert not document.keys
    assert len(document.reference) == len(document.positions) == 0
    edit = Edit(tiny.photo(48, 80), "a cat", seed=1, steps=2)
    made, other, edited = engine.edit([nothing, Edit(nothing.image, "a dog", seed=1, steps=2, blank=True), edit])
    assert made.image.shape == (48, 80, 3)
    assert (made.image != other.image).any()
    assert (made.image != edited.image).any()
    alone = Engine(model).edit([nothing])[0].image
    assert np.abs(alone.astype(int) - made.image).max() <= 1, "packed with an edit that has a document"
