"""Four steps from sixteen: the student learns the mean velocity of its teacher over each of its own long steps.

From a noised sample at the student's sigma the teacher walks its finer schedule down to the student's next one; the straight
line between the two is what the student shall say. No adversary, one student pass a sample.

Source: progressive distillation (https://arxiv.org/abs/2202.00512), all halvings at once, in flow matching's velocity form.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

from retouch.train.flow import SHIFT, Noised, Velocity, draw, noised
from retouch.train.loop import Stage, train
from retouch.train.scenes import Batch, Scenes

STEPS, FINER = 4, 4
"""Steps of the student, and teacher steps within each of them: 16 in all."""

TEACHER_STEPS = 28
"""Of the teacher when it is run by itself."""

TOKENS = 1800


def schedule(steps: int) -> list[float]:
    """`steps` + 1 sigmas from 1 to 0, as the checkpoint's scheduler sets them."""
    even = [1 - i / steps for i in range(steps + 1)]
    return [SHIFT * u / (1 + (SHIFT - 1) * u) for u in even]


def train_distilled(
    transformer: Flux2Transformer2DModel, encoder: Qwen3ForCausalLM, tokenizer: Qwen2TokenizerFast, scenes: Scenes,
    stage: Stage, folder: Path, device: torch.device, sheet: Callable[[Path], None], seed: int = 0,
) -> None:  # fmt: skip
    """Train the transformer in place; the text encoder stays as it is, so that prompts cached for one serve the other."""
    transformer.to(device).train()
    encoder.to(device).eval().requires_grad_(False)
    teacher = Velocity(copy.deepcopy(transformer).eval().requires_grad_(False), encoder, tokenizer)
    student = Velocity(transformer, encoder, tokenizer)
    coarse = torch.tensor(schedule(STEPS))
    fine = torch.tensor(schedule(STEPS * FINER))

    def loss_of(drawn: tuple[Batch, str], noise: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batch, mode = drawn
        count = batch.target.shape[0] * batch.target.shape[1]
        index = torch.randint(STEPS, (count,), generator=noise)
        step = noised(batch, mode, coarse[index], noise, device)
        with torch.no_grad():
            text = student.prompts(batch.prompts)
            target = _mean_velocity(teacher, batch, step, mode, text, fine.to(device), index.to(device))
        out = student(batch, step, mode, text)
        loss = (out - target).square().mean(-1)[step.valid].mean()
        return loss, {mode: float(loss.detach())}

    modules = torch.nn.ModuleDict({"transformer": transformer})
    train(stage, modules, lambda rng, done: draw(scenes, rng, tokens=TOKENS), loss_of, folder, sheet, seed)


def _mean_velocity(
    teacher: Velocity, batch: Batch, step: Noised, mode: str, text: tuple[Tensor, Tensor], fine: Tensor, index: Tensor
) -> Tensor:
    """Of the teacher over the student's step `index` (E,), from step.x; (E, N, C)."""
    x, keys = step.x, teacher.reference(batch, step.x.device) if mode != "joint" else []
    for finer in range(FINER):
        sigma, following = fine[index * FINER + finer], fine[index * FINER + finer + 1]
        velocity = teacher(batch, step.at(x, sigma), mode, text, keys)
        x = x + (following - sigma)[:, None, None] * velocity
    end = fine[(index + 1) * FINER]
    return (step.x - x) / (step.sigma - end)[:, None, None]
