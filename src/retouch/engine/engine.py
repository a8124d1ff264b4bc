"""The loop: admit, step, finish. Edits join and leave the packed step at every step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from retouch.cache.store import Store
from retouch.edit import Edit, Edited, Usage
from retouch.models.base import Document, EditModel, Job, Prompt

Progress = Callable[[int, int], None]


class Engine:
    """Runs edits on one model. `max_jobs` share a packed step; `budget` is the bytes kept of encoded documents and prompts."""

    def __init__(self, model: EditModel, max_jobs: int = 16, budget: int = 2 << 30) -> None:
        self.model, self.max_jobs = model, max_jobs
        self.documents: Store[Document] = Store(budget)
        self.prompts: Store[Prompt] = Store(budget // 8)

    def edit(self, edits: Sequence[Edit], progress: Progress | None = None) -> list[Edited]:
        """All edits, answered in their order. `progress` hears (steps done, steps in all) after every packed step.

        Raises the typed error of the first edit that cannot be served; then none is answered.
        """
        waiting = deque(enumerate(edits))
        running: list[tuple[int, Job]] = []
        answers: dict[int, Edited] = {}
        done, total = 0, 0
        while waiting or running:
            while waiting and len(running) < self.max_jobs:
                index, edit = waiting.popleft()
                job = self.admit(edit)
                running.append((index, job))
                total += job.steps
            self.step([job for _, job in running])
            done += len(running)
            if progress:
                upcoming = running[0][1].steps * len(waiting)
                progress(done, total + upcoming)
            answers |= {index: self.finish(job) for index, job in running if job.done}
            running = [(index, job) for index, job in running if not job.done]
        return [answers[index] for index in range(len(edits))]

    def admit(self, edit: Edit) -> Job:
        """Encode what is not cached yet, and start the Job."""
        model, usage, hits = self.model, Usage(), []
        other = model.negative(edit)
        with _timed(usage, "document"):
            frame = model.frame(edit)
            document, hit = self.documents.get(frame.key, lambda: model.encode_document(frame))
            hits += ["document"] * hit
        prompts: list[Prompt] = []
        with _timed(usage, "prompt"):
            for text in [edit.prompt] if other is None else [edit.prompt, other]:
                key = model.prompt_key(text, edit.tenant)
                prompt, hit = self.prompts.get(key, lambda text=text: model.encode_prompt(text, edit.tenant))  # type: ignore[misc]
                prompts.append(prompt)
                hits += ["prompt"] * hit
        with _timed(usage, "start"):
            job = model.start(edit, frame, document, prompts[0], prompts[1] if other is not None else None)
        job.usage.seconds = usage.seconds
        job.usage.cache_hits = tuple(hits)
        return job

    def step(self, jobs: Sequence[Job]) -> None:
        """One packed step, its time shared out by the tokens each job has in it."""
        started = time.perf_counter()
        self.model.step(jobs)
        seconds = time.perf_counter() - started
        tokens = [len(job.cells) + len(job.prompt.embedded) for job in jobs]
        for job, count in zip(jobs, tokens, strict=True):
            job.usage.add("step", seconds * count / sum(tokens))

    def finish(self, job: Job) -> Edited:
        with _timed(job.usage, "finish"):
            image = self.model.finish(job)
        return Edited(image, job.edit.seed, job.usage)


@contextmanager
def _timed(usage: Usage, stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    usage.add(stage, time.perf_counter() - started)
