"""What an edit goes through on a model, one stage after the other; when, is the loop's business (`engine.py`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np

from retouch.cache.store import Store
from retouch.edit import Edit, Edited, Usage
from retouch.models.base import Document, EditModel, Frame, Job, Prompt

V = TypeVar("V")


class Stages:
    """What is encoded is kept in `documents` and `prompts`; each job's usage says what it took."""

    def __init__(self, model: EditModel, documents: Store[Document], prompts: Store[Prompt]) -> None:
        self.model, self.documents, self.prompts = model, documents, prompts
        self._off_loop: dict[str, float] = {}

    def admit(self, edit: Edit, frame: Frame | None = None) -> Job:
        """Encode what is not cached yet, and start the Job."""
        model, usage, hits = self.model, Usage(), []
        other = model.negative(edit)
        with self._timed(usage, "document"):
            frame = frame or model.frame(edit)
            document, hit = self.documents.get(frame.key, partial(self._made, model.encode_document, frame))
            hits += ["document"] * hit
        prompts: list[Prompt] = []
        with self._timed(usage, "prompt"):
            for text in [edit.prompt] if other is None else [edit.prompt, other]:
                key = model.prompt_key(text, edit.tenant, frame)
                prompt, hit = self.prompts.get(key, partial(self._made, model.encode_prompt, key, text, document))
                prompts.append(prompt)
                hits += ["prompt"] * hit
        with self._timed(usage, "start"):
            job = model.start(edit, frame, document, prompts[0], prompts[1] if other is not None else None)
        if "document" not in hits:
            self._learn("document", usage.seconds["document"])
        job.usage.seconds = usage.seconds
        job.usage.cache_hits, job.usage.tokens_text = tuple(hits), len(prompts[0].embedded)
        job.usage.approximate = model.approximate
        return job

    def _made(self, make: Callable[..., V], *args: Any) -> V:
        """Once the device is done with it: another thread may take it out of its store, and waits for its own work alone."""
        value = make(*args)
        self.model.synchronize()
        return value

    def step(self, jobs: Sequence[Job]) -> None:
        """One packed step, its time shared out by all the tokens that each job has in it."""
        held = [job.latents for job in jobs]  # made on another stream, whose memory must not go back while this one reads it
        started = time.perf_counter()
        self.model.step(jobs)
        self.model.synchronize()
        seconds = time.perf_counter() - started
        del held
        tokens = sum(job.width for job in jobs)
        for job in jobs:
            job.usage.add("step", seconds * job.width / tokens)

    def preview(self, job: Job) -> np.ndarray:
        with self._timed(job.usage, "preview"):
            return self.model.preview(job)

    def finish(self, job: Job) -> Edited:
        with self._timed(job.usage, "finish"):
            image = self.model.finish(job)
        self._learn("finish", job.usage.seconds["finish"])
        return Edited(image, job.edit.seed, job.usage)

    def around(self, frame: Frame) -> float:
        """Seconds that an edit takes apart from its steps, as far as is known."""
        new = 0.0 if frame.key in self.documents else self._off_loop.get("document", 0.0)
        return new + self._off_loop.get("finish", 0.0)

    def _learn(self, stage: str, seconds: float) -> None:
        self._off_loop[stage] = 0.9 * self._off_loop.get(stage, seconds) + 0.1 * seconds

    @contextmanager
    def _timed(self, usage: Usage, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.model.synchronize()
        usage.add(stage, time.perf_counter() - started)
