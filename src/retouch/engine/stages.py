"""What an edit goes through on a model, one stage after the other; when, is the loop's business (`engine.py`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np

from retouch.cache.store import Store
from retouch.cache.tier import Sized
from retouch.edit import Edit, Edited, Usage
from retouch.models.base import Document, EditModel, Frame, Job, Prompt

V = TypeVar("V", bound=Sized)


class Stages:
    """What is encoded is kept in `documents` and `prompts`; each job's usage says what it took."""

    def __init__(self, model: EditModel, documents: Store[Document], prompts: Store[Prompt]) -> None:
        self.model, self.documents, self.prompts = model, documents, prompts
        self._off_loop: dict[str, float] = {}

    def admit(self, edit: Edit, frame: Frame | None = None) -> Job:
        """Encode what is not cached yet, and start the Job."""
        model, usage, hits = self.model, Usage(), []
        texts = self._texts(edit)
        with self._timed(usage, "document"):
            frame = frame or model.frame(edit)
        document, hit = self._kept(usage, "document", self.documents, frame.key, model.encode_document, frame)
        hits += ["document"] * hit
        prompts: list[Prompt] = []
        for text in texts:
            key = model.prompt_key(text, edit.tenant, frame)
            prompt, hit = self._kept(usage, "prompt", self.prompts, key, model.encode_prompt, key, text, document)
            prompts.append(prompt)
            hits += ["prompt"] * hit
        with self._timed(usage, "start"):
            job = model.start(edit, frame, document, prompts[0], prompts[1] if len(prompts) > 1 else None)
        job.usage.seconds = usage.seconds
        job.usage.cache_hits, job.usage.tokens_text = tuple(hits), len(prompts[0].embedded)
        job.usage.approximate = model.approximate
        return job

    def _texts(self, edit: Edit) -> list[str]:
        """What is encoded as prompts: one text, or two where a second pass guides."""
        other = self.model.negative(edit)
        return [edit.prompt] if other is None else [edit.prompt, other]

    def _kept(
        self, usage: Usage, stage: str, store: Store[V], key: str, make: Callable[..., V], *args: Any
    ) -> tuple[V, bool]:  # fmt: skip
        """The value of `key` and whether it was there, on the bill of who makes it or fetches it from a tier.

        Who finds that another thread is making it waits for that, which is no work of the device: nothing is added.
        """
        known, started = key in store, time.perf_counter()
        value, hit = store.get(key, partial(self._made, make, *args))
        self.model.synchronize()
        seconds = time.perf_counter() - started
        usage.add(stage, 0.0 if hit and not known else seconds)
        if not hit:
            self._learn(stage, seconds)
        return value, hit

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

    def aside(self, new: Iterable[tuple[Edit, Frame]], begun: int) -> float:
        """Seconds that edits take together apart from their steps, as far as is known: `new` ones, and `begun` ones, which are
        encoded. What is cached takes none, and what several share is made once.
        """
        new = list(new)
        documents = {frame.key for _, frame in new}
        prompts = {self.model.prompt_key(text, edit.tenant, frame) for edit, frame in new for text in self._texts(edit)}
        counts = {
            "document": sum(key not in self.documents for key in documents),
            "prompt": sum(key not in self.prompts for key in prompts),
            "finish": len(new) + begun,
        }
        return sum(count * self._off_loop.get(stage, 0.0) for stage, count in counts.items())

    def _learn(self, stage: str, seconds: float) -> None:
        self._off_loop[stage] = 0.9 * self._off_loop.get(stage, seconds) + 0.1 * seconds

    @contextmanager
    def _timed(self, usage: Usage, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.model.synchronize()
        usage.add(stage, time.perf_counter() - started)
