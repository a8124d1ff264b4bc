"""A request on its way: its edits, and the events that streams and jobs tell of it."""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from starlette.concurrency import run_in_threadpool

from retouch.edit import DeadlinePassed, DeadlineTooSoon, Edit, Edited, QueueFull, RetouchError, Usage
from retouch.serve.errors import body_of, counted, status_of
from retouch.serve.forms import EditFields, Fields
from retouch.serve.orders import Order
from retouch.serve.settings import Tenant
from retouch.serve.usage import told

log = logging.getLogger(__name__)

PREVIEW_SIDE = 1024
"""Partial images of larger pictures are scaled down to this longer side."""

GRACE = 2.0
"""Seconds after its deadline at which an edit is given up, should the worker not have said so, who looks between two steps."""

Watch = Callable[[int, np.ndarray | None], None]
Submit = Callable[[Edit, Watch, int], "Future[Edited]"]
Made = Callable[["Run", int, bytes], None]
"""Hears of each picture's file when it is made, before anybody has it."""


@dataclass(eq=False)
class Run:
    """`status` goes from queued to running to succeeded, failed or cancelled. Everything happens on the event loop.

    `started` is when the request arrived, by the monotonic clock; the deadline of the order's edits is what was left of it.
    `filter` names the one whose it is in the model's place.
    The order with its pictures is let go when the run ends; what was made stays in `events`, or, if `raw`, in `images`.
    """

    order: Order | None
    fields: Fields
    size: str
    n: int
    tenant: Tenant
    price: Callable[[Usage], float | None]
    started: float
    raw: bool = False
    made: Made | None = None
    filter: str = ""
    images: list[np.ndarray | None] = field(default_factory=list)
    id: str = field(default_factory=lambda: f"job_{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    status: str = "queued"
    seconds: float = 0.0
    events: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any] | None] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)
    error: Exception | None = None
    _futures: list[Future[Edited]] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None
    _showing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @classmethod
    def of(
        cls, order: Order, tenant: Tenant, price: Callable[[Usage], float | None], started: float, raw: bool = False,
        made: Made | None = None,
    ) -> Run:  # fmt: skip
        return cls(order, order.fields, order.size, len(order.edits), tenant, price, started, raw, made, order.filter)

    @property
    def type(self) -> str:
        return "image_edit" if isinstance(self.fields, EditFields) else "image_generation"

    @property
    def ended(self) -> bool:
        return self.status in ("succeeded", "failed", "cancelled")

    @property
    def bytes(self) -> int:
        """What it takes to keep it, about."""
        return sum(len(event.get("b64_json", "")) + len(self.fields.prompt) + 1000 for event in self.events)

    @property
    def refused(self) -> bool:
        """Whether the worker said on arrival that it would not do it."""
        error = self.error
        return isinstance(error, QueueFull | DeadlineTooSoon) or (error is not None and status_of(error) < 500)

    def begin(self, submit: Submit, seconds: float | None, ended: Callable[[Run], None], up: Callable[[], bool]) -> None:
        """Submit all edits, which have `seconds` where they have no deadline of their own; None: as long as they take.

        `ended` is called once, whatever happens. `up`: whether there is a worker to hear of deadlines.
        """
        assert self.order is not None
        self.answers, self.images = [None] * self.n, [None] * self.n
        try:
            for index, edit in enumerate(self.order.edits):
                self._futures.append(submit(edit, self._watch(index), self.fields.partial_images))
        except BaseException:
            self._withdraw()
            raise
        self._task = asyncio.create_task(self._go(self.order, seconds, ended, up))

    def _watch(self, index: int) -> Watch:
        """For the worker's thread to call."""
        loop, shown = asyncio.get_running_loop(), iter(range(self.fields.partial_images))

        def hear(step: int, image: np.ndarray | None) -> None:
            loop.call_soon_threadsafe(self._hear, index, shown, image)

        return hear

    def cancel(self) -> None:
        """At the next step; nothing happens where it has ended."""
        if not self.ended:
            self._end("cancelled")
            self._withdraw()

    def give_up(self, error: Exception) -> None:
        """As `cancel`, but it has failed."""
        self._fail(error)
        self._withdraw()

    async def finished(self) -> dict[str, Any]:
        """The response with all pictures. Raises the run's error."""
        async for _ in self.follow():
            pass
        if self.error is not None:
            raise self.error
        return self.response()

    def response(self) -> dict[str, Any]:
        made = [answer for answer in self.answers if answer is not None]
        data = [{key: answer[key] for key in ("b64_json", "seed", "usage")} for answer in made]
        return {"created": self.created, "data": data, **self._form(), "usage": told(self.usages, self.age)}

    async def follow(self) -> AsyncIterator[dict[str, Any]]:
        """All events, those that are past too, until the run has ended."""
        index = 0
        while True:
            news = self._news
            while index < len(self.events):
                index += 1
                yield self.events[index - 1]
            if self.ended and index >= len(self.events):
                return
            if news is self._news:
                await news.wait()

    def described(self, whole: bool = True) -> dict[str, Any]:
        """As a job of the API."""
        done = sum(answer is not None for answer in self.answers)
        job = {
            "id": self.id, "object": "job", "status": self.status, "created_at": self.created,
            "filter": self.filter or None, "prompt": self.fields.prompt, "n": self.n, "done": done, "size": self.size,
            "seconds": round(self.age, 3),
            "error": body_of(self.error)["error"] if self.error is not None else None,
        }  # fmt: skip
        return {**job, "result": self.response() if whole and self.status == "succeeded" else None}

    @property
    def age(self) -> float:
        """Seconds from its arrival to its end, or to now."""
        return self.seconds if self.ended else time.monotonic() - self.started

    async def _go(self, order: Order, seconds: float | None, ended: Callable[[Run], None], up: Callable[[], bool]) -> None:
        deadline = None if self.fields.deadline_ms is None else self.fields.deadline_ms / 1000
        limit = seconds if deadline is None else deadline
        all_ = asyncio.gather(*(self._one(order, index, future) for index, future in enumerate(self._futures)))
        try:
            if deadline is not None:
                await asyncio.wait((all_,), timeout=self.started + deadline - time.monotonic())
                if not all_.done() and up():
                    limit = deadline + GRACE
            async with asyncio.timeout(None if limit is None else self.started + limit - time.monotonic()):
                await all_
            self._end("succeeded")
        except TimeoutError:
            self._fail(DeadlinePassed(_late(seconds, deadline)))
        except asyncio.CancelledError:
            self._end("cancelled")
        except Exception as error:
            if not isinstance(error, RetouchError):
                log.exception("an edit failed")
            self._fail(error)
        finally:
            all_.cancel()
            self._withdraw()
            self.order = None
            ended(self)

    async def _one(self, order: Order, index: int, future: Future[Edited]) -> None:
        edited = await asyncio.wrap_future(future)
        coded = ""
        if self.raw:
            self.images[index] = order.whole(edited.image)
        else:
            coded = await run_in_threadpool(self._coded, order, index, edited.image)
        if self.ended:
            return
        edited.usage.dollars = self.price(edited.usage)
        self.usages.append(edited.usage)
        event = {"type": f"{self.type}.completed", "b64_json": coded, "index": index, "seed": edited.seed}
        event |= {"created_at": int(time.time()), **self._form(), "usage": told([edited.usage], self.age)}
        self.answers[index] = event
        self._tell(event)

    def _coded(self, order: Order, index: int, crop: np.ndarray) -> str:
        data = order.file(crop)
        if self.made is not None:
            self.made(self, index, data)
        return _base64(data)

    def _hear(self, index: int, shown: Iterator[int], image: np.ndarray | None) -> None:
        """Without an image: the edit has been begun. A worker that begins it again shows no preview twice."""
        if self.status == "queued":
            self.status = "running"
            self._tell({"type": "job.status", **self.described(whole=False)})
        if image is not None and (number := next(shown, None)) is not None:
            task = asyncio.create_task(self._show(index, number, image))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _show(self, index: int, number: int, image: np.ndarray) -> None:
        async with self._showing:  # in the order in which they came, though each is encoded in a thread
            if self.order is None or self.answers[index] is not None:
                return
            coded, size = await run_in_threadpool(_small, self.order, image)
            if self.ended or self.answers[index] is not None:
                return
            event = {"type": f"{self.type}.partial_image", "b64_json": coded, "partial_image_index": number, "index": index}
            self._tell({**event, "created_at": int(time.time()), **self._form(), "size": size})

    def _form(self) -> dict[str, Any]:
        fields = self.fields
        form = {"quality": fields.quality, "background": fields.background, "output_format": fields.output_format}
        return {"size": self.size, **form}

    def _fail(self, error: Exception) -> None:
        if not self.ended:
            # Without the frames, which hold the pictures as long as the job is kept.
            self.error = counted(error).with_traceback(None)
            self._tell({"type": "error", **body_of(error)})
            self._end("failed")

    def _end(self, status: str) -> None:
        if not self.ended:
            self.seconds = self.age
            self.status = status
            self._tell({"type": "job.status", **self.described(whole=False)})

    def _tell(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _withdraw(self) -> None:
        for future in self._futures:
            future.cancel()


def _late(seconds: float | None, deadline: float | None) -> str:
    if deadline is not None:
        return f"the edit was not done by its own deadline, in {deadline:.3g} s; allow more, or come later."
    return (
        f"the edit was not done in the {seconds:.3g} s that this server (--request-seconds) gives one that names no deadline; "
        "give a longer deadline_ms (under /v2, timeout), or ask for it as a job, by /v1/jobs."
    )


def _small(order: Order, image: np.ndarray) -> tuple[str, str]:
    """A partial image in base64, and its size."""
    scale = PREVIEW_SIDE / max(order.photo.size)
    if scale >= 1:
        return _base64(order.file(image)), order.size
    size = [max(1, round(side * scale)) for side in order.photo.size]
    small = np.asarray(Image.fromarray(order.whole(image)).resize(size, Image.Resampling.BOX))
    return _base64(order.encoded(small)), f"{size[0]}x{size[1]}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
