"""Requests of all sorts to a live server whose worker is killed meanwhile, and what has become of each of them."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from asks import Ask
from retouch import picture
from retouch.engine import Engine
from retouch.picture import Picture

PATIENCE = 300.0
"""Seconds after which a request that has no answer is not going to have one."""

TOLERANCE = {"png": 2, "webp": 2, "jpeg": 8}
"""Levels that a pixel may differ by from the same edit run alone: sums of a packed step round differently, by a level as far as
was seen; JPEG turns one into some."""


@dataclass(slots=True, eq=False)
class Outcome:
    """What has become of a request: `end` is succeeded, left, lost or the code of an error; `pictures` by seed, `extra` are
    answers on top of the one that was due.
    """

    ask: Ask
    end: str = "lost"
    status: int = 0
    pictures: dict[int, np.ndarray] = field(default_factory=dict)
    extra: int = 0
    partials: int = 0
    why: str = ""
    seconds: float = 0.0

    def take(self, data: dict[str, Any]) -> None:
        """One picture of an answer."""
        self.extra += data["seed"] in self.pictures
        self.pictures[data["seed"]] = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))))

    def refuse(self, error: dict[str, Any], status: int) -> None:
        self.end, self.status, self.why = error["code"], status, error["message"]


class Storm:
    """Sends requests, so many at a time, and kills the worker's process when it is due."""

    def __init__(self, address: str, concurrency: int, told: Callable[[Outcome], None] = lambda outcome: None) -> None:
        self.address, self.concurrency, self.told = address, concurrency, told
        self.outcomes: list[Outcome] = []
        self.kills = 0
        self._killing: list[asyncio.Task[None]] = []

    def run(self, requests: Sequence[Ask], kills: int) -> list[Outcome]:
        asyncio.run(self._run(requests, kills))
        return self.outcomes

    async def _run(self, requests: Sequence[Ask], kills: int) -> None:
        waiting = list(reversed(requests))
        due = [round(len(requests) * (i + 0.5) / kills) for i in range(kills)]
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=self.address, timeout=PATIENCE, limits=limits) as client:

            async def client_of_many() -> None:
                while waiting:
                    outcome = await self._follow(client, waiting.pop())
                    self.outcomes.append(outcome)
                    self.told(outcome)
                    while due and len(self.outcomes) >= due[0]:
                        due.pop(0)
                        self._killing.append(asyncio.create_task(self._kill(again=len(due) % 4 == 3)))

            await asyncio.gather(*(client_of_many() for _ in range(self.concurrency)))
            await asyncio.gather(*self._killing)

    async def _kill(self, again: bool) -> None:
        """The worker's process, and where `again`, the one after it as well, while it loads."""
        (pid,) = await self._workers()
        os.kill(pid, signal.SIGKILL)
        self.kills += 1
        if again:
            (following,) = await self._workers(besides=pid)
            os.kill(following, signal.SIGKILL)
            self.kills += 1

    async def _workers(self, besides: int = 0) -> list[int]:
        """Process ids of the server's workers, once there is one."""
        end = time.monotonic() + PATIENCE
        while not (found := [pid for pid in workers() if pid != besides]):
            if time.monotonic() > end:
                raise TimeoutError("the server has no worker")
            await asyncio.sleep(0.01)
        return found

    async def _follow(self, client: httpx.AsyncClient, ask: Ask) -> Outcome:
        outcome, began = Outcome(ask), time.perf_counter()
        try:
            async with asyncio.timeout(PATIENCE):
                if ask.way == "job":
                    await self._job(client, ask, outcome)
                else:
                    async with asyncio.timeout(ask.leave):
                        await (self._stream if ask.way == "stream" else self._plain)(client, ask, outcome)
        except TimeoutError:
            if ask.leave is not None and ask.way != "job":
                outcome.end = "left"
        except httpx.HTTPError as error:
            outcome.why = repr(error)
        if outcome.end == "succeeded" and set(outcome.pictures) != {edit.seed for edit in ask.edits}:
            outcome.end, outcome.why = "lost", f"pictures of the seeds {sorted(outcome.pictures)}"
        outcome.seconds = time.perf_counter() - began
        return outcome

    async def _plain(self, client: httpx.AsyncClient, ask: Ask, outcome: Outcome) -> None:
        if ask.way == "generation":
            answer = await client.post("/v1/images/generations", json=ask.fields)
        elif ask.way in ("json", "document"):
            if ask.way == "json":
                body = {**ask.fields, "images": [{"image_url": _data_url(ask.edits[0].image)}]}
            else:
                sent = await client.post("/v1/documents", files={"file": _png(ask.edits[0].image)})
                body = {**ask.fields, "document": sent.json()["id"]}
            if ask.edits[0].mask is not None:
                body["mask"] = {"image_url": _data_url(ask.edits[0].mask)}
            answer = await client.post("/v1/images/edits", json=body)
        else:
            answer = await client.post("/v1/images/edits", **_form(ask))
        body = answer.json()
        if answer.status_code != 200:
            outcome.refuse(body["error"], answer.status_code)
            return
        for data in body["data"]:
            outcome.take(data)
        outcome.end, outcome.status = "succeeded", 200

    async def _stream(self, client: httpx.AsyncClient, ask: Ask, outcome: Outcome) -> None:
        async with client.stream("POST", "/v1/images/edits", **_form(ask)) as answer:
            outcome.status = answer.status_code
            if answer.status_code != 200:
                outcome.refuse(json.loads(await answer.aread())["error"], answer.status_code)
                return
            await _hear(answer, outcome)
        if outcome.end == "lost" and outcome.pictures:
            outcome.end = "succeeded"

    async def _job(self, client: httpx.AsyncClient, ask: Ask, outcome: Outcome) -> None:
        answer = await client.post("/v1/jobs", **_form(ask))
        body = answer.json()
        if answer.status_code != 202:
            outcome.refuse(body["error"], answer.status_code)
            return
        path = f"/v1/jobs/{body['id']}"
        deleting = asyncio.create_task(_delete(client, path, ask.leave)) if ask.leave is not None else None
        async with client.stream("GET", f"{path}/events") as events:
            status = await _hear(events, outcome)
        if deleting is not None:
            deleted = (await deleting)["status"]
            if deleted == "cancelled":  # else it had ended before
                outcome.end = "left" if status == "cancelled" and outcome.end == "lost" else "lost"
                return
        elif status == "succeeded":
            kept = (await client.get(path)).json()
            again = [data["seed"] for data in kept["result"]["data"]]
            outcome.extra += kept["status"] != status or sorted(again) != sorted(outcome.pictures)
        if outcome.end == "lost" and status == "succeeded":
            outcome.end = "succeeded"


async def _delete(client: httpx.AsyncClient, path: str, seconds: float) -> dict[str, Any]:
    await asyncio.sleep(seconds)
    answer = await client.delete(path)
    answer.raise_for_status()
    body: dict[str, Any] = answer.json()
    return body


async def _hear(answer: httpx.Response, outcome: Outcome) -> str:
    """Takes what a stream tells; returns the last status of the job, where it says any."""
    status = ""
    async for event in _events(answer):
        kind = event["type"].rpartition(".")[2]
        if kind == "status":
            status = event["status"]
        elif kind == "partial_image":
            outcome.partials += 1
        elif kind == "error":
            outcome.extra += outcome.end != "lost"
            outcome.refuse(event["error"], answer.status_code)
        else:
            outcome.take(event)
    return status


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if line.startswith("data:"):
            yield json.loads(line.removeprefix("data:"))


def _form(ask: Ask) -> dict[str, Any]:
    """A multipart body; "wrong" has a mask of another size."""
    first = ask.edits[0]
    files = {"image": ("image.png", _png(first.image), "image/png")}
    mask = np.ones((8, 8), bool) if ask.way == "wrong" else first.mask
    if mask is not None:
        files["mask"] = ("mask.png", _png(mask), "image/png")
    return {"data": {name: str(value).lower() for name, value in ask.fields.items()}, "files": files}


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _data_url(pixels: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(_png(pixels)).decode()


def workers() -> list[int]:
    """Process ids of the workers of all servers that this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            parent = process.parent()
            if "spawn_main" in " ".join(process.cmdline()) and parent is not None and "serve" in parent.cmdline():
                found.append(process.pid)
    return found


def difference(engine: Engine, outcome: Outcome) -> int:
    """Levels by which the outcome's pictures differ at most from those that an engine makes one by one."""
    worst = 0
    for edit in outcome.ask.edits:
        alone = engine.edit([replace(edit, deadline=None)])[0].image
        encoded = picture.encode(alone, outcome.ask.form.upper(), Picture(edit.image))
        wanted, got = np.asarray(Image.open(io.BytesIO(encoded))), outcome.pictures[edit.seed]
        if wanted.shape != got.shape:
            return 255
        worst = max(worst, int(np.abs(wanted.astype(int) - got).max()))
    return worst


def settled(address: str) -> dict[str, Any]:
    """The server's figures once nothing runs or waits any more. Raises TimeoutError where that does not come."""
    end = time.monotonic() + PATIENCE
    with httpx.Client(base_url=address, timeout=60) as client:
        ask = partial(client.get)
        while time.monotonic() < end:
            stats, jobs = ask("/v1/stats").json(), ask("/v1/jobs").json()["data"]
            still = [job["id"] for job in jobs if job["status"] in ("queued", "running")]
            if ask("/readyz").status_code == 200 and not still and stats["queue"]["waiting"] == stats["queue"]["running"] == 0:
                return dict(stats)
            time.sleep(0.05)
    raise TimeoutError(f"the server does not come to rest: jobs {still}, queue {stats['queue']}")
