"""The loop: admit, pick, step, finish. Edits join and leave the packed step at every step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

from retouch.cache.store import Memory, Store
from retouch.edit import DeadlineTooSoon, Edit, Edited, QueueFull, Usage
from retouch.engine.scheduler import FirstCome, Policy, StepClock, Ticket, finish_time, pick
from retouch.models.base import Document, EditModel, Frame, Job, Prompt

Progress = Callable[[int, int], None]

MEMORY = 2 << 30
"""Bytes of encoded documents that an engine keeps by default."""


@dataclass(slots=True, eq=False)
class Submitted(Ticket):
    """An edit that the engine has taken on. `answer.cancel()` takes it back, up to its last step."""

    edit: Edit
    frame: Frame
    job: Job | None = None
    answer: Future[Edited] = field(default_factory=Future)


class Engine:
    """Runs edits on one model.

    `policy` says who comes first. `tokens` is the budget of a packed step, found from the measured step times where it is None.
    `documents` and `prompts` keep what is encoded (2 GiB and an eighth of it in memory), `queue` is how many edits may wait.
    `submit` may be called from any thread, `tick` from one at a time.
    """

    def __init__(
        self, model: EditModel, policy: Policy | None = None, tokens: int | None = None, queue: int = 1000,
        documents: Store[Document] | None = None, prompts: Store[Prompt] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.policy, self.queue = model, policy or FirstCome(), queue
        self.clock, self._tokens = StepClock(), tokens
        self.documents = Store(Memory("device", MEMORY)) if documents is None else documents
        self.prompts = Store(Memory("device", MEMORY // 8)) if prompts is None else prompts
        self._submitted: list[Submitted] = []
        self._changed = threading.Condition()

    @property
    def tokens(self) -> int:
        """What a packed step may hold."""
        return self.clock.budget() if self._tokens is None else self._tokens

    def edit(self, edits: Sequence[Edit], progress: Progress | None = None) -> list[Edited]:
        """All edits, answered in their order. `progress` hears (steps done, steps in all) after every packed step.

        Raises the typed error of the first edit that cannot be served; then none is answered.
        """
        submitted: list[Submitted] = []
        try:
            for edit in edits:
                while len(self._submitted) >= self.queue and self.tick():
                    pass
                submitted.append(self.submit(edit))
            total = sum(one.steps for one in submitted)
            while any(not one.answer.done() for one in submitted) and self.tick():
                failed = next((one for one in submitted if one.answer.done() and one.answer.exception()), None)
                if failed is not None:
                    break
                if progress:
                    progress(total - sum(one.steps for one in submitted), total)
            return [one.answer.result() for one in submitted]
        finally:
            for one in submitted:
                one.answer.cancel()

    def submit(self, edit: Edit) -> Submitted:
        """Take an edit on. Raises QueueFull, and DeadlineTooSoon with the estimate where it could not be done in time."""
        frame = self.model.frame(edit)
        tokens, steps = self.model.size(edit, frame)
        now = time.monotonic()
        deadline = None if edit.deadline is None else now + edit.deadline
        one = Submitted(edit.tenant, edit.priority, now, deadline, tokens, steps, edit, frame)
        with self._changed:
            if len(self._submitted) >= self.queue:
                raise QueueFull(f"{self.queue:,} edits wait already; try again later.")
            if edit.deadline is not None:
                expected = finish_time(one, self._submitted, self.policy, self.tokens, self.clock, now) - now
                if expected > edit.deadline:
                    raise DeadlineTooSoon(
                        f"it would take about {expected:.1f} s; {edit.deadline:.1f} s are given. Allow more, or leave it out."
                    )
            self._submitted.append(one)
            self._changed.notify_all()
        return one

    def tick(self) -> bool:
        """One round of the loop; false where there was nothing to do."""
        now = time.monotonic()
        with self._changed:
            self._submitted = [one for one in self._submitted if not one.answer.done()]
            picked = pick(self._submitted, self.policy, self.tokens, now)
        stepping = [one for one in picked if self._answered(one, self._admitted)]
        if stepping:
            self._stepped(stepping)
        for one in stepping:
            one.steps -= 1
            if one.steps == 0 and not one.answer.done():
                self._answered(one, self._finished)
        return bool(picked)

    def _stepped(self, together: Sequence[Submitted]) -> None:
        """What a packed step raises is the answer of everybody in it: their latents may be half-way."""
        started = time.perf_counter()
        try:
            self.step([one.job for one in together if one.job is not None])
        except Exception as error:
            for one in together:
                _settle(one.answer, error)
        self.clock.observe(sum(one.tokens for one in together), time.perf_counter() - started)

    def close(self) -> None:
        """Bring what is encoded to the slowest tier; where that is a disk, the next engine finds it there."""
        self.documents.sink()
        self.prompts.sink()

    def wait(self, seconds: float) -> None:
        """Until something is submitted, or for so long."""
        with self._changed:
            if not self._submitted:
                self._changed.wait(seconds)

    def _answered(self, one: Submitted, do: Callable[[Submitted], None]) -> bool:
        """Whether `do` succeeded; what it raises is this edit's answer, and nobody else's concern."""
        if one.answer.cancelled():
            return False
        try:
            do(one)
        except Exception as error:
            _settle(one.answer, error)
            return False
        return True

    def _admitted(self, one: Submitted) -> None:
        if one.job is None:
            one.job = self.admit(one.edit, one.frame)

    def _finished(self, one: Submitted) -> None:
        assert one.job is not None
        _settle(one.answer, self.finish(one.job))

    def admit(self, edit: Edit, frame: Frame | None = None) -> Job:
        """Encode what is not cached yet, and start the Job."""
        model, usage, hits = self.model, Usage(), []
        other = model.negative(edit)
        with self._timed(usage, "document"):
            frame = frame or model.frame(edit)
            document, hit = self.documents.get(frame.key, lambda: model.encode_document(frame))
            hits += ["document"] * hit
        prompts: list[Prompt] = []
        with self._timed(usage, "prompt"):
            for text in [edit.prompt] if other is None else [edit.prompt, other]:
                key = model.prompt_key(text, edit.tenant)
                prompt, hit = self.prompts.get(key, lambda text=text: model.encode_prompt(text, edit.tenant))  # type: ignore[misc]
                prompts.append(prompt)
                hits += ["prompt"] * hit
        with self._timed(usage, "start"):
            job = model.start(edit, frame, document, prompts[0], prompts[1] if other is not None else None)
        job.usage.seconds = usage.seconds
        job.usage.cache_hits = tuple(hits)
        return job

    def step(self, jobs: Sequence[Job]) -> None:
        """One packed step, its time shared out by the tokens each job has in it."""
        started = time.perf_counter()
        self.model.step(jobs)
        self.model.synchronize()
        seconds = time.perf_counter() - started
        tokens = [len(job.cells) + len(job.prompt.embedded) for job in jobs]
        for job, count in zip(jobs, tokens, strict=True):
            job.usage.add("step", seconds * count / sum(tokens))

    def finish(self, job: Job) -> Edited:
        with self._timed(job.usage, "finish"):
            image = self.model.finish(job)
        return Edited(image, job.edit.seed, job.usage)

    @contextmanager
    def _timed(self, usage: Usage, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.model.synchronize()
        usage.add(stage, time.perf_counter() - started)


def _settle(answer: Future[Edited], with_: Edited | Exception) -> None:
    """Give the one answer, unless it was taken back in the meantime."""
    if answer.set_running_or_notify_cancel():
        if isinstance(with_, Exception):
            answer.set_exception(with_)
        else:
            answer.set_result(with_)
