"""Requests of all sorts, drawn from a seed: small pictures, masks, prompts, variations, formats, clients that go away."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from retouch import picture
from retouch.edit import Edit

PHOTOS = Path(__file__).parent.parent / "photos"

WAYS = {"form": 5, "json": 2, "document": 2, "stream": 4, "job": 4, "generation": 2, "wrong": 1}
"""How a request is made, and how often."""

PROMPTS = ("a red apple", "a panda", "add a sunflower", "remove the object", "make the car blue", "replace it with a cat")


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """One request: its edits, the first of which is sent with `n`. `leave` is after how many seconds the client goes away or
    deletes its job, where it does.
    """

    number: int
    way: str
    edits: tuple[Edit, ...]
    form: str
    partials: int = 0
    leave: float | None = None

    @property
    def fields(self) -> dict[str, Any]:
        first = self.edits[0]
        asked: dict[str, Any] = {
            "prompt": first.prompt, "seed": first.seed, "n": len(self.edits), "output_format": self.form,
            "num_inference_steps": first.steps, "priority": first.priority,
        }  # fmt: skip
        if first.deadline is not None:
            asked["deadline_ms"] = round(1000 * first.deadline)
        if self.way == "stream":
            asked |= {"stream": True, "partial_images": self.partials}
        if self.way == "generation":
            asked["size"] = f"{first.image.shape[1]}x{first.image.shape[0]}"
        elif first.mask is not None:
            asked["mask_mode"] = "white"
        return asked


def asks(edits: int, seed: int) -> list[Ask]:
    """Requests with so many edits in all. One in five leaves, one in eight has a deadline, one in ten was made before."""
    dice = random.Random(seed)
    photos = [picture.read(path).pixels for path in sorted(PHOTOS.glob("*.jpg"))]
    documents = [_document(photos, dice) for _ in range(max(4, edits // 20))]
    made: list[Ask] = []
    while (left := edits - sum(len(ask.edits) for ask in made)) > 0:
        number = len(made)
        if made and dice.random() < 0.1 and len((before := dice.choice(made)).edits) <= left:
            made.append(replace(before, number=number, leave=None))
            continue
        way = dice.choices(list(WAYS), list(WAYS.values()))[0]
        image = dice.choice(documents)
        if way == "generation":
            image = np.zeros((16 * dice.randint(4, 9), 16 * dice.randint(4, 9), 3), np.uint8)
        mask = None if way == "generation" or dice.random() < 0.15 else _mask(image.shape[:2], dice)
        deadline = dice.choice([0.01, 1.0, 60.0]) if dice.random() < 0.125 else None
        first = Edit(
            image, dice.choice(PROMPTS), mask, seed=1000 * number, steps=dice.choice([1, 2, 4, 4, 4, 8]),
            priority=dice.randint(-2, 2), deadline=deadline, blank=way == "generation",
        )  # fmt: skip
        count = min(left, dice.choice([1, 1, 1, 2, 3]))
        form = dice.choice(["png", "png", "webp", "jpeg"] if image.shape[2] == 3 else ["png", "webp"])
        variations = tuple(replace(first, seed=first.seed + i) for i in range(count))
        leave = dice.choice([0.0, 0.05, 0.2, 1.0, 3.0]) if way != "wrong" and dice.random() < 0.2 else None
        made.append(Ask(number, way, variations, form, dice.randint(0, 3), leave))
    return made


def _document(photos: Sequence[np.ndarray], dice: random.Random) -> np.ndarray:
    photo = dice.choice(photos)
    height, width = dice.randint(64, 192), dice.randint(64, 192)
    y, x = dice.randint(0, photo.shape[0] - height), dice.randint(0, photo.shape[1] - width)
    pixels = photo[y : y + height, x : x + width]
    if dice.random() < 0.2:
        alpha = np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1))
        pixels = np.concatenate([pixels, alpha[..., None]], 2)
    return np.ascontiguousarray(pixels)


def _mask(size: tuple[int, ...], dice: random.Random) -> np.ndarray:
    """A box, a disc, or some strokes."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    cy, cx, radius = dice.randrange(height), dice.randrange(width), dice.randint(6, 50)
    match dice.randrange(3):
        case 0:
            mask = (abs(y - cy) <= radius) & (abs(x - cx) <= radius * dice.uniform(0.3, 2))
        case 1:
            mask = (y - cy) ** 2 + (x - cx) ** 2 <= radius**2
        case _:
            slopes = [dice.uniform(-2, 2) for _ in range(3)]
            mask = np.logical_or.reduce([abs((y - cy) - slope * (x - cx)) < 4 for slope in slopes])
    mask[cy, cx] = True
    return np.asarray(mask, bool)
