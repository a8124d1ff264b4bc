"""An edit that an engine has taken on, and its one answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from retouch.edit import DeadlinePassed, Edit, Edited
from retouch.engine.parcels import Changed
from retouch.engine.results import recalled
from retouch.engine.scheduler import Policy, Ticket
from retouch.models.base import Frame, Job

Watch = Callable[[int, np.ndarray | None], None]
"""Hears (0, None) when an edit has been begun, then steps done with a rough picture of what it is going to be."""

_settling = threading.RLock()


@dataclass(slots=True, eq=False)
class Submitted(Ticket):
    """An edit that the engine has taken on. `answer.cancel()` takes it back, up to its last step.

    `side` is what runs for it beside the loop: encoding, then finishing. `awaits` is the very same edit, taken on before, whose
    answer is to be this one's too; `made` is that answer, once it is there.
    """

    edit: Edit
    frame: Frame
    watch: Watch | None = None
    previews: int = 0
    job: Job | None = None
    side: Future[None] | None = None
    answer: Future[Edited] = field(default_factory=Future)
    result_key: str = ""
    awaits: Submitted | None = None
    made: Changed | None = None

    @property
    def shows(self) -> bool:
        """Whether one of its previews, spread evenly before the last step, is due after the step it has had."""
        if self.watch is None or self.job is None:
            return False
        step, steps = self.job.step, self.job.steps
        due = {max(1, round(steps * (i + 1) / (self.previews + 1))) for i in range(self.previews)}
        return step in due and step < steps


def same(one: Submitted, among: Sequence[Submitted], policy: Policy) -> Submitted | None:
    """The one among others in flight whose answer may be `one`'s too.

    None where `one` would come first, or has previews to show: then it is computed for itself.
    """
    if not one.result_key or (one.watch is not None and one.previews):
        return None
    for other in among:
        if other.result_key == one.result_key and other is not one and other.awaits is None and not other.answer.done():
            return other if policy.copy().order([other, one], time.monotonic())[0] is other else None
    return None


def recall(one: Submitted, known: Changed) -> None:
    """Answer it with what was finished before."""
    one.steps = 0
    settle(one.answer, recalled(one.edit, known))


def hand_on(live: Sequence[Submitted], policy: Policy) -> None:
    """An answer to those who await it. Where there is none, as it failed or was taken back, one of them is computed."""
    for one in live:
        if one.awaits is None or not one.awaits.answer.done():
            continue
        if one.awaits.made is None:
            one.awaits = same(one, live, policy)
            continue
        try:
            recall(one, one.awaits.made)
        except Exception as error:
            settle(one.answer, error)


def expire(live: Sequence[Submitted]) -> None:
    now = time.monotonic()
    for one in live:
        if one.deadline is not None and one.deadline < now:
            settle(one.answer, DeadlinePassed("its time ran out before the edit was done; allow more, or come later."))


def settle(answer: Future[Edited], with_: Edited | Exception) -> None:
    """Give the one answer, unless it was given or taken back in the meantime."""
    with _settling:
        if answer.done() or not answer.set_running_or_notify_cancel():
            return
        if isinstance(with_, Exception):
            answer.set_exception(with_)
        else:
            answer.set_result(with_)
