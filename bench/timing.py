"""What one run of a variant took, stage by stage, and how runs are summed up."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

STAGES = ("encode", "denoise", "finish")


@dataclass(frozen=True, slots=True)
class Sample:
    """One run: seconds and matrix-product FLOPs of each stage. `tokens` are the image tokens that its last step computed."""

    seconds: dict[str, float]
    flops: dict[str, int]
    tokens: int

    @classmethod
    def of(cls, marks: list[float], flops: tuple[int, int, int], tokens: int) -> Sample:
        """`marks` are the four times around the three stages. The whole edit is their sum."""
        spans = [after - before for before, after in pairwise(marks)]
        seconds = dict(zip(STAGES, spans, strict=True)) | {"edit": marks[-1] - marks[0]}
        return cls(seconds, dict(zip(STAGES, flops, strict=True)) | {"edit": sum(flops)}, tokens)


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds at which the device has done all that it was given."""

    device: torch.device

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, p10 and p90 of `n` values."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low, median, high = np.percentile(values, [10, 50, 90])
        return cls(float(median), float(low), float(high), len(values))
