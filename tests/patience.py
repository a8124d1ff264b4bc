"""Shared pieces of the tests of the worker: waiting for what tells nobody, and for a step of an edit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import psutil

LONG = 90.0
"""Seconds after which what has not happened is not going to."""


def until(what: Callable[[], object], seconds: float = LONG) -> None:
    """Wait for what tells nobody when it happens."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


class Heard:
    """A watch that remembers, and lets wait for a step."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.looks: list[np.ndarray | None] = []
        self._news = threading.Condition()

    def __call__(self, step: int, image: np.ndarray | None) -> None:
        with self._news:
            self.steps.append(step)
            self.looks.append(image)
            self._news.notify_all()

    def wait(self, step: int) -> None:
        with self._news:
            assert self._news.wait_for(lambda: step in self.steps, LONG)
