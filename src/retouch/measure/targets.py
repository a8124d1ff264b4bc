"""What a plan is sent to: an engine in this process, or an endpoint (`endpoint.py`)."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from retouch import record
from retouch.edit import Edited, RetouchError, Usage
from retouch.measure.plan import Call

if TYPE_CHECKING:
    from retouch.engine import Engine


log = logging.getLogger(__name__)


class Failed(Exception):
    """A request was not served. `cause` is one of few words, to be counted; `ended` is when that was known."""

    def __init__(self, cause: str, detail: str = "", status: int = 0, ended: float | None = None) -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause, self.detail, self.status = cause, " ".join(detail.split())[:300], status
        self.ended = time.perf_counter() if ended is None else ended


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """`ended` is when the last byte was there. `made` are the pictures, in a form that the target's `kept` takes."""

    ended: float
    made: Sequence[Any]
    bytes: int = 0
    status: int = 200
    usage: Usage | None = None


class Target(Protocol):
    """Used as an asynchronous context. Documents are whatever the target makes of pictures."""

    name: str

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...

    async def document(self, image: np.ndarray, tenant: str) -> Any:
        """Raises Failed."""

    async def kept(self, made: Any, tenant: str) -> Any:
        """A result as a document. Raises Failed."""

    def prepare(self, call: Call) -> Any:
        """What can be done before the clock runs."""

    async def send(self, call: Call, prepared: Any, document: Any) -> Served:
        """Raises Failed."""


class InProcess:
    """An engine, ticked by one thread for as long as this is open. The engine itself stays open."""

    name = "engine"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._stop = threading.Event()
        self._broken: Exception | None = None
        self._thread = threading.Thread(target=self._tick, name="retouch-tick", daemon=True)

    async def __aenter__(self) -> Self:
        self._thread.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        await asyncio.to_thread(self._thread.join)

    def _tick(self) -> None:
        try:
            while not self._stop.is_set():
                if not self.engine.tick():
                    self.engine.wait(0.02)
        except Exception as error:  # an engine's own bug: nobody is to wait for it
            log.exception("the engine's loop ended")
            self._broken = error
            self.engine.close()

    async def document(self, image: np.ndarray, tenant: str) -> np.ndarray:
        return image

    async def kept(self, made: np.ndarray, tenant: str) -> np.ndarray:
        return made

    def prepare(self, call: Call) -> np.ndarray | None:
        """The mask, a bit a pixel. Raises InvalidTrace where it is empty."""
        mask = call.drawn()
        return None if mask is None else np.packbits(mask)

    async def send(self, call: Call, prepared: np.ndarray | None, document: np.ndarray) -> Served:
        height, width = document.shape[:2]
        mask = None if prepared is None else np.unpackbits(prepared, count=height * width).reshape(height, width).astype(bool)
        answers: list[Future[Edited]] = []
        try:
            for edit in call.edits(document, mask):
                answers.append(self.engine.submit(edit).answer)
            if self._broken is not None:  # asked afterwards: whoever is submitted before that is answered by the engine's end
                raise self._broken
            edited = await asyncio.gather(*map(asyncio.wrap_future, answers))
        except RetouchError as error:
            raise Failed(type(error).__name__, str(error), error.status) from error
        except Exception as error:
            raise Failed(type(error).__name__, str(error), 500) from error
        finally:
            for answer in answers:
                answer.cancel()
        ended = time.perf_counter()
        images = [one.image for one in edited]
        return Served(ended, images, sum(image.nbytes for image in images), 200, summed([one.usage for one in edited]))


def where_of(target: Target) -> dict[str, Any]:
    """What numbers of an open target are measured on, as far as it says so: fields of a Record."""
    if isinstance(target, InProcess):
        model: Any = target.engine.model
        import torch

        device = "" if model.device.type == "cpu" else str(model.device)
        return record.environment(device, str(model.dtype).removeprefix("torch."), torch.get_num_threads())
    told: dict[str, Any] = getattr(target, "told", {})
    device = str(told.get("device", f"unknown, behind {target.name}"))
    return record.environment("" if device == "cpu" else device, str(told.get("dtype", "")), int(told.get("threads") or 0))


def summed(usages: Sequence[Usage]) -> Usage:
    """Of a request's variations."""
    total = Usage()
    for usage in usages:
        for stage, seconds in usage.seconds.items():
            total.add(stage, seconds)
        for name in ("tokens_computed", "tokens_whole", "tokens_text", "steps", "cache_hits"):
            setattr(total, name, getattr(total, name) + getattr(usage, name))
    total.approximate = tuple(sorted({name for usage in usages for name in usage.approximate}))
    return total
