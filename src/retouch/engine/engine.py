"""The loop: admit, pick, step, finish. Edits join and leave the packed step at every step."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from copy import copy
from functools import partial
from typing import Any

from retouch.cache.memory import Memory
from retouch.cache.store import Store
from retouch.edit import DeadlineTooSoon, Edit, Edited, QueueFull, WorkerLost
from retouch.engine.parcels import Changed
from retouch.engine.results import finished, key_of
from retouch.engine.scheduler import FirstCome, Policy, StepClock, finish_time, fitting
from retouch.engine.sides import Sides
from retouch.engine.stages import Stages
from retouch.engine.submitted import Submitted, Watch, expire, hand_on, recall, same, settle
from retouch.models.base import Document, EditModel, Job, Prompt

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

MEMORY = 2 << 30
"""Bytes of encoded documents that an engine keeps by default; an eighth of it for prompts, as much for finished results."""

AHEAD = 2
"""Steps' worth of edits that are encoded before they are needed, where encoding runs beside the loop."""

RECENT = 64
"""Steps that the figures of `Engine.stats` look back on."""


class Engine(Stages):
    """Runs edits on one model.

    `policy` says who comes first. `tokens` is the budget of a packed step, found from the measured step times where it is None.
    `documents`, `prompts` and `results` keep what was made (2 GiB and twice an eighth of it in memory), `queue` is how many
    edits may wait. `beside` threads encode and decode while the loop steps; with 0 they take turns.
    `submit` may be called from any thread, `tick` from one at a time.
    """

    def __init__(
        self, model: EditModel, policy: Policy | None = None, tokens: int | None = None, queue: int = 1000,
        documents: Store[Document] | None = None, prompts: Store[Prompt] | None = None,
        results: Store[Changed] | None = None, beside: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(
            model,
            Store(Memory("device", MEMORY)) if documents is None else documents,
            Store(Memory("device", MEMORY // 8)) if prompts is None else prompts,
        )
        self.policy, self.queue = policy or FirstCome(), queue
        self.clock, self._tokens = StepClock(), tokens
        self.results = Store(Memory("host", MEMORY // 8)) if results is None else results
        self._submitted: list[Submitted] = []
        self._changed = threading.Condition()
        self._sides = Sides(model, beside, self._changed)
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=RECENT)
        self.scheduling = self.stepping = 0.0

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
                    failed.answer.result()
                if progress:
                    progress(total - sum(one.steps for one in submitted), total)
            return [one.answer.result() for one in submitted]
        finally:
            for one in submitted:
                one.answer.cancel()

    def submit(
        self, edit: Edit, watch: Watch | None = None, previews: int = 0, answer: Future[Edited] | None = None
    ) -> Submitted:
        """Take an edit on. `watch` hears of `previews` of its steps, evenly spread; `answer` is what the answer goes to.

        Where the very same edit is on its way, and may be reused, this one waits for its answer and is not computed.
        Raises QueueFull, and DeadlineTooSoon with the estimate where it could not be done in time.
        """
        frame = self.model.frame(edit)
        tokens, steps = self.model.size(edit, frame)
        now = time.monotonic()
        deadline = None if edit.deadline is None else now + edit.deadline
        one = Submitted(edit.tenant, edit.priority, now, deadline, tokens, steps, edit, frame, watch, previews)
        one.answer = one.answer if answer is None else answer
        one.result_key = key_of(edit, frame, steps) if edit.reuse else ""
        if edit.reuse and (known := self.results.find(one.result_key)):
            recall(one, known)
            return one
        with self._changed:
            waiting = [other for other in self._submitted if not other.answer.done()]
            if len(waiting) >= self.queue:
                work = sum(other.work for other in waiting if other.awaits is None)
                soon = self.clock.seconds(self.tokens) * work / max(1, self.tokens)
                raise QueueFull(f"{self.queue:,} edits wait already; try again later.", retry_after=max(1.0, soon / 4))
            one.awaits = same(one, waiting, self.policy)
            if edit.deadline is not None:
                expected = self._expected(one.awaits or one, waiting, now)
                if expected > edit.deadline:
                    raise DeadlineTooSoon(
                        f"it would take about {expected:.1f} s; {edit.deadline:.1f} s are given. Allow more, or leave it out."
                    )
            self._submitted.append(one)
            self._changed.notify_all()
        return one

    def _expected(self, one: Submitted, waiting: Sequence[Submitted], now: float) -> float:
        """Seconds until `one`'s answer."""
        others = [other for other in waiting if other is not one and other.awaits is None]
        beside = self._sides.threads
        return finish_time(one, others, self.policy, self.tokens, self.clock, now, self._aside, beside) - now

    def _aside(self, those: Sequence[Submitted]) -> float:
        new = [(one.edit, one.frame) for one in those if one.job is None]
        return self.aside(new, len(those) - len(new))

    def tick(self) -> bool:
        """One round of the loop; false where there was nothing to do."""
        live, order, owed = self._standing()
        if not owed:
            self._sides.catch_up(self._owes)
        self._encode(owed or order)
        expire(live)
        started = time.perf_counter()
        stepping = self._next(order, owed)
        self.policy.charge(stepping)
        self.scheduling += time.perf_counter() - started
        if stepping:
            self._stepped(stepping)
        elif live:
            self._wait_for_sides(live)
        for one in stepping:
            self._after_step(one, one in owed)
        if not owed:
            self._sides.catch_up(self._owes)
        return bool(live)

    def _standing(self) -> tuple[list[Submitted], list[Submitted], list[Submitted]]:
        """Those without an answer; of them those with steps to go, most urgent first; and of these the ones that are owed."""
        started = time.perf_counter()
        with self._changed:
            self._submitted = live = [one for one in self._submitted if not one.answer.done()]
        hand_on(live, self.policy)
        expire(live)
        with self._changed:  # `submit` asks the policy too, from other threads
            stepping = [one for one in live if one.steps and one.awaits is None and not one.answer.done()]
            order = self.policy.order(stepping, time.monotonic())
        owed = self.policy.owed(order)
        self.scheduling += time.perf_counter() - started
        return live, order, owed

    def _owes(self) -> bool:
        return bool(self._standing()[2])

    def _next(self, order: Sequence[Submitted], owed: Sequence[Submitted]) -> list[Submitted]:
        """Who steps together."""
        ready = [one for one in order if one.job is not None and not one.answer.done()]
        first = sum(one.tokens for one in fitting([one for one in ready if one in owed], self.tokens))
        return fitting(ready, min(self.tokens, self.clock.room(first)) if first else self.tokens)

    def _encode(self, order: Sequence[Submitted]) -> None:
        """Those that come next: at once where nothing runs beside the loop, else some steps ahead of it."""
        for one in fitting(order, self.tokens * (AHEAD if self._sides.beside else 1)):
            if one.job is None and one.side is None:
                self._sides.start(one, self._admitted)

    def _stepped(self, together: Sequence[Submitted]) -> None:
        """What a packed step raises is the answer of everybody in it: their latents may be half-way."""
        started, tokens = time.perf_counter(), sum(one.tokens for one in together)
        try:
            self.step([one.job for one in together if one.job is not None])
        except Exception as error:
            log.exception("a step of %d edits failed", len(together))
            for one in together:
                settle(one.answer, error)
            return  # how long it took says nothing of those to come
        seconds = time.perf_counter() - started
        self.clock.observe(tokens, seconds)
        self.stepping += seconds
        self._recent.append((seconds, tokens, len(together)))

    def _after_step(self, one: Submitted, owed: bool) -> None:
        one.steps -= 1
        if one.answer.done():
            return
        start = self._sides.start if owed else self._sides.put_off
        if one.steps == 0:
            start(one, self._finished)
        elif one.job is not None and one.shows:
            start(one, partial(self._watched, job=copy(one.job)))

    def _wait_for_sides(self, live: Sequence[Submitted]) -> None:
        with self._changed:
            if not any(one.answer.done() or (one.steps and one.job) for one in live):
                self._changed.wait(0.05)

    def _admitted(self, one: Submitted) -> None:
        one.job = self.admit(one.edit, one.frame)
        if one.watch is not None and not one.answer.done():
            one.watch(0, None)

    def _watched(self, one: Submitted, job: Job) -> None:
        """`job` as it was after the step that is shown, while the loop may be on with the next."""
        assert one.watch is not None
        image = self.preview(job)
        if not one.answer.done():
            one.watch(job.step, image)

    def _finished(self, one: Submitted) -> None:
        assert one.job is not None
        edited = self.finish(one.job)
        if one.edit.reuse:
            one.made = finished(one.edit, edited)
            self.results.put(one.result_key, one.made, sum(edited.usage.seconds.values()))
        settle(one.answer, edited)

    def close(self) -> None:
        """Bring what is encoded to the slowest tier; where that is a disk, the next engine finds it there.

        Edits without an answer get WorkerLost. Not while a `tick` runs.
        """
        for one in self._submitted:
            settle(one.answer, WorkerLost("the engine was closed before the edit was done; send it again."))
        self._sides.close()
        self.documents.sink()
        self.prompts.sink()

    def wait(self, seconds: float) -> None:
        """Until something is submitted, or for so long."""
        with self._changed:
            if not self._submitted:
                self._changed.wait(seconds)

    def stats(self) -> dict[str, Any]:
        """How it stands: the queue, the recent steps, the caches. Plain values."""
        live = [one for one in self._submitted if not one.answer.done()]
        running = sum(one.job is not None for one in live)
        recent = list(self._recent)
        means = [sum(column) / len(recent) for column in zip(*recent, strict=True)] if recent else [None] * 3
        caches: dict[str, Store[Any]] = {"documents": self.documents, "prompts": self.prompts, "results": self.results}
        return {
            "queue": {"waiting": len(live) - running, "running": running, "limit": self.queue},
            "step": {
                **dict(zip(("seconds", "tokens", "edits"), means, strict=True)),
                "budget": self.tokens,
                "kept_bytes": sum(one.job.kept_bytes for one in live if one.job is not None),
                "scheduling_share": self.scheduling / self.stepping if self.stepping else None,
            },
            "caches": {name: store.told() for name, store in caches.items()},
        }
