"""Shared pieces of the tests of recording: a server that records, and what is in its trace."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from retouch import trace
from retouch.serve.settings import Recording, Settings
from retouch.trace import Request
from serving import PATIENCE, Painter, Serving


def serving(recording: Recording, worker: Painter | None = None, **more: Any) -> Serving:
    return Serving(Settings(record=recording, **more), worker)


def made_by(answer: httpx.Response) -> list[bytes]:
    """The files of an answer."""
    assert answer.status_code == 200, answer.text
    return [base64.b64decode(one["b64_json"]) for one in answer.json()["data"]]


def until(so: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not so():
        assert time.monotonic() < end
        time.sleep(0.01)


def recorded(path: Path) -> list[Request]:
    return list(trace.read(path).requests)
