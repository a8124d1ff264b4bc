"""The one training loop: seeded by step, resumable after a kill, with a progress line and sample sheets as it goes."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from retouch.train import kept
from retouch.train.muon import Muon

log = logging.getLogger(__name__)

Batch = Any


@dataclass(frozen=True, slots=True)
class Stage:
    """How long and how fast one stage trains. `samples` a step are only for the printed rate.

    `muon`, if not 0, is the learning rate of Muon for matrices and kernels inside blocks, beside AdamW's `lr` for the rest.
    `after`: what else its weights depend on, such as the checkpoint that it starts from; of no use to the stage itself.
    """

    name: str
    steps: int
    lr: float
    samples: int
    warmup: int = 100
    weight_decay: float = 0.01
    ema: float = 0.999
    save_every: float = 120.0
    sheet_every: int = 500
    clip: float = 1.0
    muon: float = 0.0
    after: kept.Settings = field(default_factory=dict)

    def made_with(self, seed: int) -> kept.Settings:
        """All that its weights depend on."""
        own = {name: getattr(self, name) for name in ("steps", "lr", "muon", "warmup", "weight_decay", "ema", "clip")}
        return {"seed": seed, **self.after, **own}

    def rate_at(self, step: int) -> float:
        """Share of the peak rate: a linear warm-up, then a cosine down to 2 %."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def optimizers(self, modules: torch.nn.Module) -> list[torch.optim.Optimizer]:
        trained = [(name, p) for name, p in modules.named_parameters() if p.requires_grad]
        inside = [p for name, p in trained if self.muon and p.ndim >= 2 and "block" in name]
        chosen = {id(p) for p in inside}
        rest = [p for _, p in trained if id(p) not in chosen]
        adamw = torch.optim.AdamW(rest, self.lr, betas=(0.9, 0.99), weight_decay=self.weight_decay, fused=True)
        return [adamw, Muon(inside, self.muon, weight_decay=self.weight_decay)] if inside else [adamw]


class Ema:
    """Exponential moving average of parameters, with the usual warm-up of its own."""

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.shadow = [p.detach().clone() for p in parameters]

    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averaged weights stand in the modules while this is open."""
        trained = [p.detach().clone() for p in self.parameters]
        self._put(self.shadow)
        try:
            yield
        finally:
            self._put(trained)

    def _put(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)


def train(
    stage: Stage,
    modules: torch.nn.ModuleDict,
    batch_at: Callable[[np.random.Generator, float], Batch],
    loss_of: Callable[[Batch, torch.Generator], tuple[torch.Tensor, dict[str, float]]],
    folder: Path,
    sheet: Callable[[Path], None] | None = None,
    seed: int = 0,
) -> None:
    """Train `modules` for `stage.steps`; on return they hold the averaged weights.

    `batch_at` hears what share of the stage is done, for curricula.

    Step k draws its data and its noise from (seed, stage, k) alone, so a killed run goes on as if nothing had happened:
    the last state lies in `folder/<stage>.pt`, and `folder/<stage>-<step>.png` are what `sheet` drew.

    Raises InvalidOption where that state is of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizers = stage.optimizers(modules)
    ema = Ema(parameters, stage.ema)
    path = folder / f"{stage.name}.pt"
    made_with = stage.made_with(seed)
    first = _resume(path, made_with, modules, optimizers, ema)
    if first >= stage.steps:
        ema._put(ema.shadow)
        return
    stage_seed = sum(map(ord, stage.name))

    def batch_of(step: int) -> Batch:
        return batch_at(np.random.default_rng([seed, stage_seed, step]), step / stage.steps)

    saved, average, noise = time.monotonic(), 0.0, torch.Generator()
    with _progress(stage) as (bar, task):
        bar.update(task, completed=first)
        upcoming = batch_of(first)
        started = time.monotonic()
        for step in range(first, stage.steps):
            batch = upcoming
            for optimizer, peak in zip(optimizers, (stage.lr, stage.muon), strict=False):
                for group in optimizer.param_groups:
                    group["lr"] = peak * stage.rate_at(step)
            loss, metrics = loss_of(batch, noise.manual_seed(hash((seed, stage_seed, step)) % 2**63))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, stage.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            ema.update(step)
            upcoming = batch_of(step + 1)  # while a GPU is busy; no thread: its OpenMP team would slow a CPU by half
            average = float(loss.detach()) if step == first else 0.98 * average + 0.02 * float(loss.detach())
            rate = (step + 1 - first) * stage.samples / (time.monotonic() - started)
            bar.update(task, completed=step + 1, loss=f"{average:.4f}", rate=f"{rate:.1f}/s")
            if (step + 1) % 50 == 0:
                detail = " ".join(f"{k} {v:.4f}" for k, v in metrics.items())
                log.info("%s %d/%d loss %.4f %s %.1f samples/s", stage.name, step + 1, stage.steps, average, detail, rate)
            if time.monotonic() - saved > stage.save_every or step + 1 == stage.steps:
                _save(path, made_with, step + 1, modules, optimizers, ema)
                saved = time.monotonic()
            if sheet and ((step + 1) % stage.sheet_every == 0 or step + 1 == stage.steps):
                with ema.applied(), torch.no_grad():
                    sheet(folder / f"{stage.name}-{step + 1:06d}.png")
    ema._put(ema.shadow)


@contextmanager
def _progress(stage: Stage) -> Iterator[tuple[Progress, Any]]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns) as bar:
        yield bar, bar.add_task(stage.name, total=stage.steps, loss="-", rate="-")


def _resume(
    path: Path, made_with: kept.Settings, modules: torch.nn.Module, optimizers: list[torch.optim.Optimizer], ema: Ema
) -> int:
    state = kept.load(path, made_with)
    if state is None:
        return 0
    modules.load_state_dict(state["modules"])
    for optimizer, before in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(before)
    ema.shadow = [value.to(p.device) for value, p in zip(state["ema"], ema.parameters, strict=True)]
    log.info("%s: going on from step %d", path.name, state["step"])
    return int(state["step"])


def _save(
    path: Path, made_with: kept.Settings, step: int, modules: torch.nn.Module, optimizers: list[torch.optim.Optimizer], ema: Ema
) -> None:
    states = [optimizer.state_dict() for optimizer in optimizers]
    kept.save(path, {"step": step, "modules": modules.state_dict(), "optimizers": states, "ema": ema.shadow}, made_with)
