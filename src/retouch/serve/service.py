"""What the endpoints share: the worker, uploaded documents, jobs, and the books."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool

from retouch import picture
from retouch.cache.disk import Disk
from retouch.cache.store import Memory, Store
from retouch.edit import InvalidImage, InvalidOption, WorkerLost
from retouch.engine.worker import Worker
from retouch.picture import Picture
from retouch.prices import dollars, spent
from retouch.serve.books import Books
from retouch.serve.errors import BadRequest, Draining, NotFound, about
from retouch.serve.forms import SEEDS, Ask, EditFields, Fields
from retouch.serve.metrics import Metrics
from retouch.serve.runs import Order, Run, order_of
from retouch.serve.settings import Allowance, Settings, Tenant

log = logging.getLogger(__name__)

LATENCIES = 512
"""Answers that the latency percentiles look back on."""


@dataclass(frozen=True, slots=True, eq=False)
class Upload:
    """A document's file as it was sent, and the tenant whose it is."""

    data: bytes
    tenant: str
    created: int

    @property
    def bytes(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """An upload's picture, kept so that the next edit need not decode it."""

    photo: Picture

    @property
    def bytes(self) -> int:
        return self.photo.pixels.nbytes


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
        self.books = Books(settings, worker.info, self.model)
        cache = settings.worker.cache
        self.uploads: Store[Upload] = Store(
            Memory("host", settings.uploads)
            if cache is None
            else Disk(cache / "uploads", settings.worker.disk, _dump, _load)  # at once, as it outlives a crash
        )
        self.decoded: Store[Decoded] = Store(Memory("host", settings.uploads))

    @property
    def info(self) -> dict[str, Any]:
        return self.worker.info

    @property
    def model(self) -> str:
        return self.settings.worker.model.rstrip("/").rsplit("/", 1)[-1]

    def check_model(self, name: str | None) -> None:
        """Raises NotFound."""
        if name not in (None, self.model):
            raise NotFound(f"the model {name!r} is not served here; this server has {self.model}.")

    async def upload(self, data: bytes, tenant: Tenant) -> tuple[str, Upload, Picture]:
        """Keep a picture under an id that its content gives, once it has been read whole. Raises InvalidImage."""
        photo = await run_in_threadpool(picture.read, data)
        check_pixels(photo, tenant)
        key = "doc_" + hashlib.blake2b(tenant.name.encode() + b"\0" + data, digest_size=16).hexdigest()
        upload = Upload(data, tenant.name, int(time.time()))
        if upload.bytes > self.settings.uploads:
            raise InvalidImage(f"the file has {upload.bytes:,} bytes, more than all documents may have here.")
        await run_in_threadpool(self.uploads.put, key, upload, 1.0)
        self.decoded.put(key, Decoded(photo), 0.1)
        return key, upload, photo

    async def find(self, key: str, tenant: Tenant) -> tuple[Upload, Picture]:
        """An uploaded document. Raises NotFound, for another tenant's too."""
        upload = await run_in_threadpool(self.uploads.find, key)
        if upload is None or upload.tenant != tenant.name:
            raise NotFound(f"there is no document {key}; upload it to /v1/documents (again, where it has been a while).")
        decoded = self.decoded.find(key)
        if decoded is None:
            decoded = Decoded(await run_in_threadpool(picture.read, upload.data))
            self.decoded.put(key, decoded, 0.1)
        return upload, decoded.photo

    def forget(self, key: str) -> None:
        self.decoded.drop(key)
        self.uploads.drop(key)

    async def edit_order(self, ask: Ask, tenant: Tenant) -> Order:
        """From what was sent to what the worker does. Raises InvalidEdit's errors, NotFound."""
        assert isinstance(ask.fields, EditFields)
        self.check_model(ask.fields.model)
        photos = []
        for image in ask.images:
            if isinstance(image, str):
                photos.append((await self.find(image, tenant))[1])
            else:
                photos.append(await run_in_threadpool(picture.read, image))
            check_pixels(photos[-1], tenant)
        mask = None
        if ask.mask is not None:
            try:
                mask = await run_in_threadpool(picture.read_mask, ask.mask, photos[0].size, ask.fields.mask_mode)
            except InvalidImage as error:
                raise about("mask", error) from error
        references = tuple(photo.pixels for photo in photos[1:])
        return await run_in_threadpool(
            order_of, ask.fields, photos[0], mask, references, tenant, self.info["steps"], self.info["max_side"],
            seed_of(ask.fields),
        )  # fmt: skip

    async def generation_order(self, ask: Ask, tenant: Tenant) -> Order:
        fields, side = ask.fields, self.info["max_side"]
        self.check_model(fields.model)
        width, height = (side, side) if fields.size == "auto" else (int(part) for part in fields.size.split("x"))
        if max(width, height) > side or min(width, height) < self.info["cell"]:
            raise BadRequest(f"size is {fields.size}; this model makes {self.info['cell']} to {side} pixels a side.", "size")
        photo = Picture(np.zeros((height, width, 3), np.uint8))
        steps = self.info["steps"]
        return await run_in_threadpool(order_of, fields, photo, None, (), tenant, steps, side, seed_of(fields), True)

    def begin(self, order: Order, tenant: Tenant, raw: bool = False) -> Run:
        """Raises TooMuch, Draining, WorkerLost."""
        if self.draining:
            raise Draining("the server is stopping; send the edit to another one.")
        if not self.worker.ready and self.worker.waiting >= self.settings.worker.queue:
            raise WorkerLost("the model's process is starting again, and as many edits wait for it as may; try again later.")
        pixels = order.photo.size[0] * order.photo.size[1]
        self.allowance.take(tenant, len(order.edits), pixels)
        run = Run.of(order, tenant, partial(dollars, per_hour=self.books.per_hour), raw)
        self.live.add(run)
        try:
            run.begin(self.worker.submit, self.settings.request_seconds, self._ended)
        except BaseException:
            self.live.discard(run)
            self.allowance.give_back(tenant, len(order.edits))
            raise
        return run

    def _ended(self, run: Run) -> None:
        self.live.discard(run)
        self.allowance.give_back(run.tenant, run.n)
        self.metrics.count(run)
        if run.status == "succeeded":
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

    def stats(self) -> dict[str, Any]:
        """As `GET /v1/stats` tells it."""
        said, totals = self.worker.stats, self.metrics.totals
        price = self.books.price
        cost = None if price is None else spent(sum(totals["seconds"].values()), price.per_hour)
        done = totals["edits"]["succeeded"]
        ordered = sorted(self.latencies)
        latency = None
        if ordered:
            latency = {f"p{q}": ordered[min(len(ordered) - 1, len(ordered) * q // 100)] for q in (50, 95)} | {"n": len(ordered)}
        return {
            "object": "stats", "uptime_seconds": round(time.monotonic() - self.began, 1), "model": self.model,
            "device": self.info.get("device", ""), "price_per_hour": self.books.per_hour,
            "price_source": None if price is None else price.said, "ready": self.worker.ready, "restarts": self.worker.restarts,
            "queue": said.get("queue", {"waiting": 0, "running": 0, "limit": self.settings.worker.queue}),
            "step": said.get("step", {"seconds": None, "tokens": None, "edits": None, "budget": None}),
            **totals, "dollars": cost, "dollars_per_million_edits": cost / done * 1e6 if cost is not None and done else None,
            "latency": latency, "caches": said.get("caches", {}),
        }  # fmt: skip


def check_pixels(photo: Picture, tenant: Tenant) -> None:
    if tenant.pixels is not None and photo.size[0] * photo.size[1] > tenant.pixels:
        raise InvalidOption(f"the picture has {photo.size[0] * photo.size[1]:,} pixels; this key allows {tenant.pixels:,}.")


def seed_of(fields: Fields) -> int:
    return secrets.randbelow(SEEDS) if fields.seed is None else fields.seed


def _dump(upload: Upload) -> bytes:
    name = upload.tenant.encode()
    return len(name).to_bytes(4, "little") + upload.created.to_bytes(8, "little") + name + upload.data


def _load(data: bytes) -> Upload:
    end = 12 + int.from_bytes(data[:4], "little")
    return Upload(data[end:], data[12:end].decode(), int.from_bytes(data[4:12], "little"))
