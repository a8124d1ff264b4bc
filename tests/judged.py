"""Shared pieces of the tests of quality: a case, an answer with noise in it, Scores of two paths, who answers with truths."""

import asyncio

import numpy as np

from retouch.edit import Edit, Usage
from retouch.measure.cases import Case
from retouch.measure.quality import Scores
from retouch.measure.targets import Served


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
