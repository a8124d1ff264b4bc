"""What is done for an edit apart from its steps: encoding before them, previews between them, finishing after them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from retouch.engine.submitted import Submitted, settle
from retouch.models.base import EditModel

Do = Callable[[Submitted], None]


class Sides:
    """Beside the loop where there are `threads` for it, else in its turn.

    What a side raises is its edit's answer, and nobody else's concern. `changed` is notified when one is done. All methods are
    the loop's to call.
    """

    def __init__(self, model: EditModel, threads: int, changed: threading.Condition) -> None:
        self.model, self.threads, self.changed = model, threads, changed
        self._pool = ThreadPoolExecutor(threads, "retouch-beside") if threads else None
        self._put_off: deque[tuple[Submitted, Do]] = deque()

    @property
    def beside(self) -> bool:
        """Whether they run while the loop steps."""
        return self._pool is not None

    def start(self, one: Submitted, do: Do) -> None:
        if self._pool is None:
            self._do(one, do)
        else:
            one.side = self._pool.submit(self._run, one, do, one.side)

    def put_off(self, one: Submitted, do: Do) -> None:
        """To be started by `catch_up`."""
        self._put_off.append((one, do))

    def catch_up(self, enough: Callable[[], bool]) -> None:
        """Start what was put off, in its order, until it is said to be enough."""
        while self._put_off and not enough():
            self.start(*self._put_off.popleft())

    def close(self) -> None:
        """Those that were started come to their end."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def _run(self, one: Submitted, do: Do, before: Future[None] | None) -> None:
        """An edit's sides come one after the other: no preview after the answer. `before` has been begun, as the threads take
        them in their order, so that waiting for it always ends.
        """
        if before is not None:
            wait((before,))
        try:
            with self.model.apart():
                self._do(one, do)
        except Exception as error:
            settle(one.answer, error)
        with self.changed:
            self.changed.notify_all()

    def _do(self, one: Submitted, do: Do) -> None:
        if one.answer.done():
            return
        try:
            do(one)
        except Exception as error:
            settle(one.answer, error)
