"""An edit that an engine has taken on, and its one answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from retouch.edit import DeadlinePassed, Edit, Edited
from retouch.engine.scheduler import Ticket
from retouch.models.base import Frame, Job

Watch = Callable[[int, np.ndarray | None], None]
"""Hears (0, None) when an edit has been begun, then steps done with a rough picture of what it is going to be."""

_settling = threading.RLock()


@dataclass(slots=True, eq=False)
class Submitted(Ticket):
    """An edit that the engine has taken on. `answer.cancel()` takes it back, up to its last step.

    `side` is what runs for it beside the loop: encoding, then finishing.
    """

    edit: Edit
    frame: Frame
    watch: Watch | None = None
    previews: int = 0
    job: Job | None = None
    side: Future[None] | None = None
    answer: Future[Edited] = field(default_factory=Future)
    result_key: str = ""

    @property
    def shows(self) -> bool:
        """Whether one of its previews, spread evenly before the last step, is due after the step it has had."""
        if self.watch is None or self.job is None:
            return False
        step, steps = self.job.step, self.job.steps
        due = {max(1, round(steps * (i + 1) / (self.previews + 1))) for i in range(self.previews)}
        return step in due and step < steps


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
