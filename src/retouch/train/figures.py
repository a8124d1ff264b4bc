"""What `retouch train judge` measures, each number with its target where one is set and its limits on both sides.

Beside what the model does stand what costs nothing (leaving the sticker, filling with the mean colour, drawing nothing) and
what its autoencoder allows at most (the true answer, encoded and decoded), so that the numbers mean something.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from retouch.edit import Edit, Edited
from retouch.models import framing, latents
from retouch.train.cases import REMOVALS, Case, main_hue, surround_mean
from retouch.train.classifier import Classifier, renders, tile
from retouch.train.data import Source
from retouch.train.distill import STEPS, TEACHER_STEPS

IDENTICAL = 60.0
"""The most dB said of two pictures: a quarter of a level apart. Equal ones would be infinite, and rule every mean."""

HALOS = (0, 8, 16, 32, 64)
"""Pixels."""
MASK_SHARE = 0.11
RENDERS = 8
"""Clean renders of each concept that the classifier itself is judged on, on average."""


class Editor(Protocol):
    """What is judged: an `Engine`. It comes from outside, as this room lies below the engine's."""

    model: Any

    def edit(self, edits: Sequence[Edit]) -> list[Edited]:
        """All edits, answered in their order."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One judged number: a mean over `n`. `spread` is half of its 95 % interval; `target` None where none is set."""

    name: str
    value: float
    target: float | None
    unit: str
    n: int
    spread: float


def decibels(name: str, values: Sequence[float], target: float | None = None) -> Figure:
    """The mean of `values` in dB."""
    spread = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Figure(name, float(np.mean(values)), target, "dB", len(values), spread)


def share(name: str, hits: Sequence[bool], target: float | None = None) -> Figure:
    """How many of `hits`, in percent; the interval is Wilson's, which is not empty where all hit or none does."""
    n, p, z = len(hits), float(np.mean(hits)), 1.96
    spread = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Figure(name, 100 * p, target, "%", n, 100 * spread)


def psnr(a: np.ndarray, b: np.ndarray, where: np.ndarray | None = None) -> float:
    """dB between pictures (H, W, 3) uint8, over `where` (H, W) bool or all of them."""
    error = a.astype(np.float64) - b
    mse = float(np.square(error if where is None else error[where]).mean())
    return min(IDENTICAL, 10 * math.log10(255**2 / mse)) if mse > 0 else IDENTICAL


@torch.inference_mode()
def encoded(model: Any, image: np.ndarray) -> Tensor:
    """Tokens (h, w, C) of (H, W, 3) uint8 whose sides are whole cells."""
    return latents.encode(model.vae, latents.pixels_of(image[None].copy(), model.device, model.vae.dtype))[0]


@torch.inference_mode()
def decoded(model: Any, tokens: Tensor) -> np.ndarray:
    pixels: np.ndarray = latents.pictures_of(latents.decode(model.vae, tokens[None]))[0]
    return pixels


def round_trip(model: Any, image: np.ndarray) -> np.ndarray:
    """Encoded and decoded: the best that any edit in these latents can draw."""
    return decoded(model, encoded(model, image))


def edited(engine: Editor, asked: Sequence[Case], steps: int) -> list[np.ndarray]:
    return [one.image for one in engine.edit([replace(case.edit, steps=steps) for case in asked])]


def crop_figures(model: Any, photos: Sequence[np.ndarray], seed: int) -> list[Figure]:
    """Crops decoded alone, with each halo, against the same pixels of the whole picture decoded."""
    agree: dict[int, list[float]] = {halo: [] for halo in HALOS}
    worst, lost = dict.fromkeys(HALOS, 0), {halo: list[float]() for halo in HALOS}
    for index, photo in enumerate(photos):
        tokens = encoded(model, photo)
        whole = decoded(model, tokens)
        region = _region(photo.shape[:2], np.random.default_rng([seed, 11, index]))
        rows, columns = slice(*region[:2]), slice(*region[2:])
        for halo in HALOS:
            crop = decode_crop(model, tokens, region, halo)
            agree[halo].append(psnr(crop, whole[rows, columns]))
            worst[halo] = max(worst[halo], int(np.abs(crop.astype(int) - whole[rows, columns]).max()))
            lost[halo].append(psnr(crop, photo[rows, columns]) - psnr(whole[rows, columns], photo[rows, columns]))
    figures = []
    for halo in HALOS:
        name = f"crop decode, halo {halo} px"
        figures.append(decibels(f"{name}: against the whole decode", agree[halo]))
        figures.append(decibels(f"{name}: gain over it, against the photo", lost[halo]))
        figures.append(Figure(f"{name}: largest difference", worst[halo], None, "levels", len(photos), 0.0))
    return figures


def _region(size: Sequence[int], rng: np.random.Generator) -> framing.Region:
    """The pixels of a box of MASK_SHARE of the picture."""
    first, last = [], []
    for side in size:
        length = max(1, round(side * MASK_SHARE**0.5))
        first.append(int(rng.integers(side - length + 1)))
        last.append(first[-1] + length)
    return first[0], last[0], first[1], last[1]


def decode_crop(model: Any, tokens: Tensor, region: framing.Region, halo: int) -> np.ndarray:
    """The pixels of `region` of tokens (h, w, C), decoded with `halo` pixels around it."""
    made: np.ndarray
    made, top, left = model.decode(tokens, region, halo)
    return made[region[0] - top : region[1] - top, region[2] - left : region[3] - left]


def removal_figures(kind: str, model: Any, asked: Sequence[Case], answers: Sequence[np.ndarray], target: float) -> list[Figure]:
    """Inside the mask, against the background that was there."""

    def against_truth(pictures: Sequence[np.ndarray]) -> list[float]:
        return [psnr(one, case.truth, case.edit.mask) for one, case in zip(pictures, asked, strict=True)]

    return [
        decibels(kind, against_truth(answers), target),
        decibels(f"{kind}: sticker left there", against_truth([case.edit.image for case in asked])),
        decibels(f"{kind}: mean colour around", against_truth([surround_mean(c.edit.image, mask_of(c)) for c in asked])),
        decibels(f"{kind}: truth through the autoencoder", against_truth([round_trip(model, case.truth) for case in asked])),
    ]


def mask_of(case: Case) -> np.ndarray:
    assert case.edit.mask is not None
    return case.edit.mask


def seen_as(classifier: Classifier, asked: Sequence[Case], pictures: Sequence[np.ndarray]) -> list[list[str]]:
    """For each picture the names of what lies in its mask's box, best first."""
    tiles = np.stack([tile(one, mask_of(case)) for one, case in zip(pictures, asked, strict=True)])
    return [[classifier.names[i] for i in row] for row in classifier.ranked(tiles)]


def named(classifier: Classifier, asked: Sequence[Case], pictures: Sequence[np.ndarray], top: int = 1) -> list[bool]:
    """Whether the asked concept is among the `top` names of each picture."""
    ranked = seen_as(classifier, asked, pictures)
    return [case.after is not None and case.after.concept in names[:top] for case, names in zip(asked, ranked, strict=True)]


def insertion_figures(model: Any, classifier: Classifier, asked: Sequence[Case], answers: Sequence[np.ndarray]) -> list[Figure]:
    truths = [case.truth for case in asked]
    return [
        share("insert, top-1", named(classifier, asked, answers), 60),
        share("insert, top-5", named(classifier, asked, answers, 5), 80),
        share("insert, top-1: nothing drawn", named(classifier, asked, [case.edit.image for case in asked])),
        share("insert, top-5: nothing drawn", named(classifier, asked, [case.edit.image for case in asked], 5)),
        share("insert, top-1: truth", named(classifier, asked, truths)),
        share("insert, top-1: truth through the autoencoder", named(classifier, asked, [round_trip(model, t) for t in truths])),
    ]


def change_figures(
    classifier: Classifier, asked: Mapping[str, Sequence[Case]], answers: Mapping[str, Sequence[np.ndarray]]
) -> list[Figure]:
    """Replacing by the name of what is there now, recolouring by the hue that most of its vivid pixels have."""
    figures = []
    old = [case.edit.image for case in asked["replace"]]
    figures.append(share("replace, top-1 of the new", named(classifier, asked["replace"], answers["replace"])))
    figures.append(share("replace, top-1 of the new: old left there", named(classifier, asked["replace"], old)))
    turned = asked["recolour"]
    states = {
        "": answers["recolour"],
        ": old left there": [case.edit.image for case in turned],
        ": truth": [case.truth for case in turned],
    }
    for name, pictures in states.items():
        hits = [coloured(one, case) for one, case in zip(pictures, turned, strict=True)]
        figures.append(share(f"recolour, asked hue{name}", hits))
    figures.append(share("recolour, still the same thing, top-1", named(classifier, turned, answers["recolour"])))
    return figures


def coloured(image: np.ndarray, case: Case) -> bool:
    """Whether most vivid pixels of the thing have the asked hue: inside the mask, and not where the ground shows through."""
    assert case.after is not None
    return main_hue(image, mask_of(case) & case.cover) == case.after.colour


def classifier_figures(classifier: Classifier, source: Source, seed: int) -> list[Figure]:
    """The judge judged, on clean renders of the seen concepts over the held-out photos."""
    tiles, labels = renders(
        source, classifier.names, np.random.default_rng([seed, 12]), RENDERS * len(classifier.names), rough=False
    )
    ranked = classifier.ranked(tiles)
    return [
        share("classifier, top-1 on clean renders", (ranked[:, 0] == labels).tolist()),
        share("classifier, top-5 on clean renders", (ranked[:, :5] == labels[:, None]).any(1).tolist()),
    ]


def teacher_figures(
    teacher: Editor, classifier: Classifier, asked: Mapping[str, Sequence[Case]], answers: Mapping[str, Sequence[np.ndarray]],
    who: str,
) -> list[Figure]:  # fmt: skip
    """Few steps beside many over the same noise: how good the many are, and how far the few agree with them."""
    many = TEACHER_STEPS
    figures = []
    for kind in REMOVALS:
        slow = edited(teacher, asked[kind], many)
        pairs = list(zip(slow, answers[kind], asked[kind], strict=True))
        figures.append(decibels(f"{kind}: {who} at {many} steps", [psnr(s, c.truth, c.edit.mask) for s, _, c in pairs]))
        gains = [psnr(f, c.truth, c.edit.mask) - psnr(s, c.truth, c.edit.mask) for s, f, c in pairs]
        figures.append(decibels(f"{kind}: {STEPS} steps gain over {who} at {many}", gains))
        figures.append(
            decibels(f"{kind}: {STEPS} steps against {who} at {many}", [psnr(f, s, c.edit.mask) for s, f, c in pairs])
        )
    inserts = asked["insert"]
    slow = edited(teacher, inserts, many)
    figures += [share(f"insert, top-{top}: {who} at {many} steps", named(classifier, inserts, slow, top)) for top in (1, 5)]
    same = [a[0] == b[0] for a, b in zip(*(seen_as(classifier, inserts, p) for p in (answers["insert"], slow)), strict=True)]
    figures.append(share(f"insert: {STEPS} steps named as {who} at {many}", same))
    return figures
