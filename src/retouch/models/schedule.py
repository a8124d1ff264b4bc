"""The noise schedules of flow matching, as the diffusers pipelines of FLUX.1, FLUX.2 and Qwen-Image set them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift


def flow_sigmas(config: Mapping[str, Any], steps: int, shift: float) -> tuple[float, ...]:
    """`steps` + 1 values from 1 down to 0 of a scheduler's `config`; `shift` is what the pipelines call mu."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    even = None if scheduler.config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
    scheduler.set_timesteps(steps, sigmas=even, mu=shift)
    return tuple(scheduler.sigmas.tolist())


def shift_of(config: Mapping[str, Any], tokens: int) -> float:
    """By the number of image tokens, as FLUX.1 and Qwen-Image have it."""
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    return float(calculate_shift(tokens, *(config[name] for name in names)))
