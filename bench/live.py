"""A server of one's own to load, and clients that send prepared requests as fast as they are told to."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import numpy as np
from PIL import Image

from retouch import picture
from retouch.edit import Edit

READY = "Retouch serves "
BOUNDARY = "retouch-bench"


@contextmanager
def server(*options: str) -> Iterator[str]:
    """The address of a `retouch serve` with these options, on a free port."""
    command = [sys.executable, "-m", "retouch.cli", "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith(READY):
            raise RuntimeError(f"{' '.join(command)} did not start")
        yield line.removeprefix(READY).strip()
    finally:
        process.terminate()
        process.wait()


@dataclass(frozen=True, slots=True)
class Request:
    """A prepared `POST /v1/images/edits`."""

    body: bytes
    key: str = ""

    @property
    def headers(self) -> dict[str, str]:
        auth = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}", **auth}


@dataclass(frozen=True, slots=True)
class Answer:
    """`seconds` from when it should have been sent to its last byte."""

    status: int
    seconds: float
    bytes: int


def upload(address: str, image: np.ndarray, key: str = "") -> str:
    """The id of a document."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer = httpx.post(f"{address}/v1/documents", files={"file": picture.encode(image, "PNG")}, headers=headers, timeout=60)
    answer.raise_for_status()
    return str(answer.json()["id"])


def request_of(edit: Edit, document: str | None, key: str = "") -> Request:
    """`document` is the id of the edit's picture; without one the picture is sent along. No finished result is reused."""
    assert edit.mask is not None
    white = io.BytesIO()
    Image.fromarray(edit.mask).save(white, "PNG")
    texts = {"prompt": edit.prompt, "seed": str(edit.seed), "mask_mode": "white", "use_cache": "false"}
    if document is not None:
        texts["document"] = document
    parts = [_part(f'name="{name}"', "", text.encode()) for name, text in texts.items()]
    parts.append(_part('name="mask"; filename="mask.png"', "Content-Type: image/png\r\n", white.getvalue()))
    if document is None:
        image = picture.encode(edit.image, "PNG")
        parts.append(_part('name="image"; filename="image.png"', "Content-Type: image/png\r\n", image))
    return Request(b"".join(parts) + f"--{BOUNDARY}--\r\n".encode(), key)


def _part(name: str, kind: str, content: bytes) -> bytes:
    return f"--{BOUNDARY}\r\nContent-Disposition: form-data; {name}\r\n{kind}\r\n".encode() + content + b"\r\n"


def one_by_one(address: str, requests: Sequence[Request]) -> list[Answer]:
    return asyncio.run(_closed(address, requests, 1))


def closed(address: str, requests: Sequence[Request], clients: int) -> tuple[list[Answer], float]:
    """So many clients, each sending its next request when the last is answered; also the seconds of it all."""
    started = time.perf_counter()
    answers = asyncio.run(_closed(address, requests, clients))
    return answers, time.perf_counter() - started


async def _closed(address: str, requests: Sequence[Request], clients: int) -> list[Answer]:
    waiting, answers = list(reversed(requests)), []
    async with _client(address) as client:

        async def run() -> None:
            while waiting:
                answers.append(await _send(client, waiting.pop(), time.perf_counter()))

        await asyncio.gather(*(run() for _ in range(clients)))
    return answers


def open_loop(
    address: str, requests: Sequence[Request], rate: float, seed: int = 0, flood: Sequence[Request] = (), clients: int = 32
) -> list[Answer]:
    """Poisson arrivals of `rate` a second that wait for no answer. Meanwhile `clients` send `flood` again and again."""
    return asyncio.run(_open(address, requests, rate, seed, flood, clients))


async def _open(
    address: str, requests: Sequence[Request], rate: float, seed: int, flood: Sequence[Request], clients: int
) -> list[Answer]:
    gaps = np.random.default_rng(seed).exponential(1 / rate, len(requests))
    async with _client(address) as client:

        async def again(index: int) -> None:
            while True:
                await _send(client, flood[index % len(flood)], time.perf_counter())
                index += clients

        flooding = [asyncio.create_task(again(index)) for index in range(clients if flood else 0)]
        if flood:
            await asyncio.sleep(3.0)  # until its queue stands
        due, tasks = time.perf_counter(), []
        for request, gap in zip(requests, gaps, strict=True):
            due += gap
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(_send(client, request, due)))
        answers = await asyncio.gather(*tasks)
        for task in flooding:
            task.cancel()
    return list(answers)


def _client(address: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=address, timeout=600, limits=limits)


async def _send(client: httpx.AsyncClient, request: Request, due: float) -> Answer:
    answer = await client.post("/v1/images/edits", content=request.body, headers=request.headers)
    return Answer(answer.status_code, time.perf_counter() - due, len(answer.content))
