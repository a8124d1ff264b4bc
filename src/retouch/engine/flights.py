"""An edit on its way between the server and the worker's process, and its one answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np

from retouch.edit import DeadlinePassed, Edit, Edited
from retouch.engine.parcels import Changed

log = logging.getLogger(__name__)

Watch = Callable[[int, np.ndarray | None], None]


@dataclass(slots=True, eq=False)
class Flight:
    """An edit without an answer yet. `sent`: the present process has it; `tries` processes have had it. `filter`: whose it is,
    where it is not the model's.

    What fails here, for want of memory or in a listener, is this edit's affair alone: the thread that calls goes on.
    """

    number: int
    edit: Edit
    watch: Watch | None
    previews: int
    arrived: float
    filter: str = ""
    tries: int = 0
    sent: bool = False
    answer: Future[Edited] = field(default_factory=Future)

    def left(self, now: float) -> Edit:
        """The edit with what is left of its deadline. Raises DeadlinePassed where nothing is."""
        if self.edit.deadline is None:
            return self.edit
        seconds = self.edit.deadline - (now - self.arrived)
        if seconds <= 0:
            raise DeadlinePassed("its time ran out before the edit was done; allow more, or come later.")
        return replace(self.edit, deadline=seconds)

    def shown(self, step: int, changed: Changed | None) -> None:
        """A preview, or that it was begun, for who watches it."""
        if self.watch is None or self.answer.done():
            return
        try:
            self.watch(step, None if changed is None else changed.image(self.edit))
        except Exception:
            log.exception("a preview was not heard")

    def settle(self, content: Changed | BaseException) -> None:
        """Give the answer, unless it was taken back; once."""
        if not self.answer.set_running_or_notify_cancel():
            return
        try:
            answer = content if isinstance(content, BaseException) else content.edited(self.edit)
        except Exception as error:
            log.exception("an answer cannot be given")
            answer = error
        if isinstance(answer, BaseException):
            self.answer.set_exception(answer)
        else:
            self.answer.set_result(answer)
