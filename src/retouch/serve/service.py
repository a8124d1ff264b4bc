"""What the endpoints share: the worker, uploaded documents, jobs, and the books."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import OrderedDict, deque
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool

from retouch.edit import InvalidImage, QueueFull, WorkerLost
from retouch.engine.worker import Worker
from retouch.picture import Picture
from retouch.prices import dollars, spent
from retouch.serve.books import Books
from retouch.serve.budget import Budget, Claim
from retouch.serve.errors import BadRequest, Draining, NotFound, about
from retouch.serve.filters import Served, filter_order
from retouch.serve.forms import SEEDS, Ask, EditFields, Fields
from retouch.serve.metrics import Metrics
from retouch.serve.orders import Order, order_of
from retouch.serve.recorder import Recorder
from retouch.serve.runs import Run
from retouch.serve.settings import Allowance, Settings, Tenant
from retouch.serve.uploads import Uploads, read_mask

log = logging.getLogger(__name__)

LATENCIES = 512
"""Answers that the latency percentiles look back on."""


PARSING = 2
"""Large JSON bodies that are parsed at once: each takes several times its own size meanwhile."""


class Service:
    """One server's state. All methods run on the event loop; what takes long goes to threads."""

    def __init__(self, settings: Settings, worker: Worker) -> None:
        self.settings, self.worker, self.metrics = settings, worker, Metrics()
        self.allowance = Allowance()
        self.jobs: OrderedDict[str, Run] = OrderedDict()
        self.live: set[Run] = set()
        self.draining = False
        self.latencies: deque[float] = deque(maxlen=LATENCIES)
        self.began = time.monotonic()
        self.bodies = Budget(settings.bodies, "bytes of bodies")
        self.pixels = Budget(settings.pixels, "pixels of pictures")
        self.parsing = asyncio.Semaphore(PARSING)
        self.recorder = None if settings.record is None else Recorder(settings.record)
        self.books = Books(settings, worker.info, self.model)
        self.filters = {name: Served(name, **told) for name, told in worker.info.get("filters", {}).items()}
        self.uploads = Uploads(settings, self.pixels)

    @property
    def info(self) -> dict[str, Any]:
        return self.worker.info

    @property
    def model(self) -> str:
        return self.settings.worker.name

    def filter_of(self, name: str | None) -> Served | None:
        """None where it is the model, or nothing is said. Raises NotFound."""
        if name in (None, self.model):
            return None
        if name not in self.filters:
            have = ", ".join((self.model, *self.filters))
            raise NotFound(f"the model {name!r} is not served here; this server has {have}.")
        return self.filters[name]

    async def edit_order(self, ask: Ask, tenant: Tenant) -> Order:
        """From what was sent to what the worker does. Raises InvalidEdit's errors, NotFound."""
        filter, claim = self.filter_of(ask.fields.model), self.pixels.claim()
        try:
            return await self._edit_order(ask, tenant, claim, filter)
        except BaseException:
            claim.release()
            raise

    async def _edit_order(self, ask: Ask, tenant: Tenant, claim: Claim, filter: Served | None) -> Order:
        assert isinstance(ask.fields, EditFields)
        if filter is not None:
            filter.check(ask.fields, len(ask.images), ask.mask is not None)
        elif not ask.fields.prompt:
            raise BadRequest("prompt is missing; say what to draw.", "prompt")
        return await run_in_threadpool(self._ordered, ask, tenant, claim, filter)

    def _ordered(self, ask: Ask, tenant: Tenant, claim: Claim, filter: Served | None) -> Order:
        """All that takes a thread, in one."""
        assert isinstance(ask.fields, EditFields)
        photos = [self.uploads.photo(image, tenant, claim) for image in ask.images]
        mask = None
        if ask.mask is not None:
            try:
                mask = read_mask(ask.mask, photos[0].size, ask.fields.mask_mode, claim)
            except InvalidImage as error:
                raise about("mask", error) from error
        if filter is not None:
            return filter_order(ask.fields, photos[0], mask, tenant, filter, claim)
        references = tuple(photo.pixels for photo in photos[1:])
        order = order_of(
            ask.fields, photos[0], mask, references, tenant, self.info["steps"], self.info["max_side"], seed_of(ask.fields),
            claim, source=b"" if self.recorder is None else self.uploads.source(ask.images[0], tenant),
        )  # fmt: skip
        return replace(order, further=tuple(photos[1:]))

    async def generation_order(self, ask: Ask, tenant: Tenant) -> Order:
        fields, side = ask.fields, self.info["max_side"]
        if (filter := self.filter_of(fields.model)) is not None:
            raise BadRequest(f"{filter.name} is a filter, which works on a picture; send one to /v1/images/edits.", "model")
        width, height = (side, side) if fields.size == "auto" else (int(part) for part in fields.size.split("x"))
        if max(width, height) > side or min(width, height) < self.info["cell"]:
            raise BadRequest(f"size is {fields.size}; this model makes {self.info['cell']} to {side} pixels a side.", "size")
        claim = self.pixels.claim()
        claim.take(width * height)
        try:
            photo = Picture(np.zeros((height, width, 3), np.uint8))
            steps = self.info["steps"]
            return await run_in_threadpool(
                order_of, fields, photo, None, (), tenant, steps, side, seed_of(fields), claim, blank=True
            )
        except BaseException:
            claim.release()
            raise

    def begin(self, order: Order, tenant: Tenant, arrived: float, raw: bool = False, job: bool = False) -> Run:
        """`arrived` is when the request came, by the monotonic clock. For a `job` nobody waits, so it may take what time it
        needs. Raises QueueFull, TooMuch, Draining, WorkerLost, DeadlinePassed, and BadRequest where it never could.
        """
        try:
            return self._begin(order, tenant, arrived, raw, None if job else self.settings.request_seconds)
        except BaseException:
            order.claim.release()
            raise

    def _begin(self, order: Order, tenant: Tenant, arrived: float, raw: bool, seconds: float | None) -> Run:
        n = len(order.edits)
        self._check_room(n)
        timed = order.timed(time.monotonic() - arrived)
        self.allowance.take(tenant, n, order.photo.size[0] * order.photo.size[1])
        made = None if self.recorder is None else self.recorder.made
        price = partial(dollars, per_hour=self.books.per_hour)
        run = Run.of(replace(timed, source=b""), tenant, price, arrived, raw, made)
        self.live.add(run)
        try:
            ended = partial(self._ended, claim=order.claim)
            submit = partial(self.worker.submit, filter=order.filter) if order.filter else self.worker.submit
            run.begin(submit, seconds, ended, lambda: self.worker.ready)
        except BaseException:
            self.live.discard(run)
            self.allowance.give_back(tenant, n)
            raise
        if self.recorder is not None:
            self.recorder.asked(run.id, order, tenant.name)
        return run

    def _check_room(self, n: int) -> None:
        """All of a request's edits are taken on, or none."""
        queue = self.settings.worker.queue
        if self.draining:
            raise Draining("the server is stopping; send the edit to another one.")
        if n > queue:
            raise BadRequest(f"n is {n}, but this server's queue holds {queue} edits; ask for fewer.", "n")
        if self.worker.waiting + n <= queue:
            return
        if not self.worker.ready:
            raise WorkerLost("the model's process is starting again, and as many edits wait for it as may; try again later.")
        typical = sorted(self.latencies)[len(self.latencies) // 2] if self.latencies else 0.0
        raise QueueFull(f"{queue:,} edits may wait, and do; try again later.", retry_after=max(1.0, typical / 4))

    def _ended(self, run: Run, claim: Claim) -> None:
        claim.release()
        self.live.discard(run)
        self.allowance.give_back(run.tenant, run.n)
        self.metrics.count(run)
        if run.status == "succeeded" and not run.filter:
            self.latencies.append(run.seconds)
        self.books.write(run)

    def keep(self, run: Run) -> None:
        """As a job. The oldest that have ended go where all together are too large."""
        self.jobs[run.id] = run
        ended = [job for job in self.jobs.values() if job.ended]
        held = sum(job.bytes for job in ended)
        for job in ended:
            if held <= self.settings.finished:
                break
            held -= job.bytes
            del self.jobs[job.id]

    def job(self, key: str, tenant: Tenant) -> Run:
        """Raises NotFound, for another tenant's too."""
        run = self.jobs.get(key)
        if run is None or run.tenant.name != tenant.name:
            raise NotFound(f"there is no job {key}; finished ones are kept for a while only.")
        return run

    async def drain(self) -> None:
        """Let what has been taken on come to its end, for as long as the settings allow; what is left then fails."""
        self.draining = True
        end = time.monotonic() + self.settings.drain_seconds
        while self.live and time.monotonic() < end:
            await asyncio.sleep(0.05)
        for run in list(self.live):
            run.give_up(Draining("the server was stopped before the edit was done; send it to another one."))

    def close(self) -> None:
        """Write what is left of books and trace; nothing happens where that has been done. To be called when no run is left."""
        self.books.close()
        if self.recorder is not None:
            self.recorder.close()

    def stats(self) -> dict[str, Any]:
        """As `GET /v1/stats` tells it."""
        said, totals = self.worker.stats, self.metrics.totals
        price = self.books.price
        seconds = sum(totals["seconds"].values())
        filtered = sum(one["seconds"] for one in totals["filters"].values())
        own, cost = (None if price is None else spent(some, price.per_hour) for some in (seconds, seconds + filtered))
        done = totals["edits"]["succeeded"]
        ordered = sorted(self.latencies)
        latency = None
        if ordered:
            latency = {f"p{q}": ordered[min(len(ordered) - 1, len(ordered) * q // 100)] for q in (50, 95)} | {"n": len(ordered)}
        return {
            "object": "stats", "uptime_seconds": round(time.monotonic() - self.began, 1), "model": self.model,
            "device": self.info.get("device", ""), "price_per_hour": self.books.per_hour,
            "price_source": None if price is None else price.said, "ready": self.worker.ready, "restarts": self.worker.restarts,
            "queue": self._queue(),
            "step": said.get("step", {"seconds": None, "tokens": None, "edits": None, "budget": None}),
            **totals, "dollars": cost, "dollars_per_million_edits": own / done * 1e6 if own is not None and done else None,
            "latency": latency, "caches": {**said.get("caches", {}), **self.uploads.caches()},
        }  # fmt: skip

    def _queue(self) -> dict[str, int]:
        """Which edits run is what the worker said last; how many there are is known here, whether it is up or not."""
        unanswered = self.worker.waiting
        running = min(unanswered, self.worker.stats.get("queue", {}).get("running", 0))
        return {"waiting": unanswered - running, "running": running, "limit": self.settings.worker.queue}


def seed_of(fields: Fields) -> int:
    return secrets.randbelow(SEEDS) if fields.seed is None else fields.seed
