"""Shared pieces of the tests of quality: a case, an answer with noise in it, and Scores of two paths."""

import numpy as np

from retouch.edit import Edit
from retouch.measure.cases import Case
from retouch.measure.quality import Scores


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
