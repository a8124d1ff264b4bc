"""What tells two pictures apart: PSNR and SSIM, which are here, and the metrics of packages that may be installed or not.

A metric is a map, averaged over the pixels of a zone, or a number of a whole picture, which is taken of a crop: the mask's box
with a rim around it. The rim and the box's corners outside of the mask are the same in both pictures, so such a score is milder
the less of its box a mask fills: compare it between answers to one edit, not between edits.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
from PIL import Image

from retouch.measure.zones import SEAM, Zones, box_of, cut, mirrored
from retouch.train.figures import IDENTICAL, psnr

__all__ = ["IDENTICAL", "METRICS", "UNITS", "Metric", "by_zone", "imported", "missing", "psnr", "ssim_map"]

REACH = 32
"""Pixels around the zones that the maps look at."""

Pictures = tuple[np.ndarray, np.ndarray]
"""Truth and answer, (H, W, 3) uint8."""


@dataclass(frozen=True, slots=True)
class Metric:
    """`map` makes (H, W) of two pictures, `whole` a number of two crops. `package` is what it needs to be imported."""

    name: str
    unit: str
    package: str = ""
    install: str = ""
    map: Callable[[Any, np.ndarray, np.ndarray], np.ndarray] | None = None
    whole: Callable[[Any, np.ndarray, np.ndarray], float] | None = None


def ssim_map(truth: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """(H, W): structural similarity around each pixel, of luma, with the Gaussian window of 11 pixels and sigma 1.5.

    Wang, Bovik, Sheikh and Simoncelli, Image quality assessment: from error visibility to structural similarity, 2004.
    """
    x, y = (pixels.astype(np.float64) @ (0.299, 0.587, 0.114) for pixels in (truth, answer))
    mean_x, mean_y, xx, yy, xy = (_blurred(plane) for plane in (x, y, x * x, y * y, x * y))
    small, large = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    level = (2 * mean_x * mean_y + small) / (mean_x**2 + mean_y**2 + small)
    spread = (xx - mean_x**2) + (yy - mean_y**2) + large
    return level * (2 * (xy - mean_x * mean_y) + large) / spread


def _blurred(plane: np.ndarray) -> np.ndarray:
    weights = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    for axis in (0, 1):
        padded = np.pad(plane, [(5, 5) if side == axis else (0, 0) for side in (0, 1)], mode="symmetric")
        length = plane.shape[axis]
        plane = sum(weight * padded.take(range(at, at + length), axis) for at, weight in enumerate(weights))
    return plane


def _flip(package: Any, truth: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """(H, W): 0 for what cannot be told apart by alternating the two, up to 1. At 67 pixels a degree, its authors' default."""
    scaled = (np.ascontiguousarray(pixels, np.float32) / 255 for pixels in (truth, answer))
    error, _, _ = package.evaluate(*scaled, "LDR", applyMagma=False, computeMeanError=False)
    return error[..., 0]


def _ssimulacra2(package: Any, truth: np.ndarray, answer: np.ndarray) -> float:
    """100 for the same picture, 90 visually lossless, 70 hard to notice; without a lower end. It reads files."""
    return float(package.compute_ssimulacra2(_png(truth), _png(answer)))


def _png(pixels: np.ndarray) -> io.BytesIO:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    buffer.seek(0)
    return buffer


def _cvvdp(package: Any, truth: np.ndarray, answer: np.ndarray) -> float:
    """Just objectionable differences: 10 for no visible one. Of a 30-inch 4K display at 0.75 m."""
    return float(_display(package).predict(answer, truth, dim_order="HWC")[0])


@lru_cache
def _display(package: Any) -> Any:
    return package.cvvdp(display_name="standard_4k", device=import_module("torch").device("cpu"))


def _piq(name: str) -> Callable[[Any, np.ndarray, np.ndarray], float]:
    def measured(package: Any, truth: np.ndarray, answer: np.ndarray) -> float:
        torch = import_module("torch")
        planes = (torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255 for pixels in (answer, truth))
        return float(getattr(package, name)(*planes))

    return measured


TORCHVISION = "it needs a torchvision that was built for this torch"
METRICS = (
    Metric("ssim", "", map=lambda _, truth, answer: ssim_map(truth, answer)),
    Metric("flip", "", "flip_evaluator", "pip install 'retouch[quality]'", map=_flip),
    Metric("ssimulacra2", "points", "ssimulacra2", "pip install 'retouch[quality]'", whole=_ssimulacra2),
    Metric("cvvdp", "JOD", "pycvvdp", f"pip install cvvdp; {TORCHVISION}", whole=_cvvdp),
    *(
        Metric(name, "", "piq", f"pip install piq; {TORCHVISION}", whole=_piq(of))
        for name, of in (
            ("ms-ssim", "multi_scale_ssim"),
            ("fsim", "fsim"),
            ("vsi", "vsi"),
            ("gmsd", "gmsd"),
            ("mdsi", "mdsi"),
        )
    ),
)
UNITS: Mapping[str, str] = {"psnr": "dB", "lpips": "", "clip": "points", **{metric.name: metric.unit for metric in METRICS}}
"""Of everything that may be measured, also of what needs weights (`learned.py`)."""


@lru_cache
def imported(name: str) -> tuple[Any, str]:
    """A package, or why it cannot be had. What a package raises while it is imported is anything."""
    if not name:
        return None, ""
    try:
        return import_module(name), ""
    except ModuleNotFoundError as error:
        return None, "not installed" if error.name == name else f"it needs {error.name}"
    except Exception as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def missing() -> dict[str, str]:
    """The metrics that cannot be measured here, and why."""
    return {metric.name: f"{why} ({metric.install})" for metric in METRICS if (why := imported(metric.package)[1])}


def by_zone(truth: np.ndarray, answer: np.ndarray, zones: Zones) -> dict[str, dict[str, float]]:
    """{zone: {metric: value}} of two pictures (H, W, 3) uint8: PSNR everywhere, maps inside and in the seam, and numbers of
    whole pictures of the crop around the inside.
    """
    found = {name: {"psnr": psnr(truth, answer, zone)} for name, zone in zones.named().items()}
    around = box_of(zones.inside, SEAM + REACH)
    near = cut(truth, around), cut(answer, around)
    box = box_of(zones.inside, SEAM)
    crops = mirrored(cut(truth, box)), mirrored(cut(answer, box))
    for metric in METRICS:
        package, why = imported(metric.package)
        if why:
            continue
        if metric.map is not None:
            values = metric.map(package, *near)
            for name in found.keys() & {"inside", "seam"}:
                found[name][metric.name] = float(values[cut(getattr(zones, name), around)].mean())
        if metric.whole is not None:
            found["inside"][metric.name] = metric.whole(package, *crops)
    return found
