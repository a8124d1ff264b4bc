"""Shared pieces of the tests of load: an edit, an endpoint that answers as it is told, and a run against it."""

from __future__ import annotations

import asyncio
import base64
import email

import httpx
import numpy as np

from retouch import picture, record
from retouch.edit import Edit
from retouch.measure import summary
from retouch.measure.endpoint import Endpoint

WHERE = record.environment()


def photo(seed=0, size=(32, 24)):
    return np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)


def edit(seed=0, **more):
    mask = np.zeros((24, 32), bool)
    mask[4:12, 6:20] = True
    return Edit(photo(seed), "a red apple", mask, seed=seed, **more)


class Fake:
    """An endpoint behind httpx. `answers` makes of a request's form what is answered; it takes `seconds`."""

    def __init__(self, answers=None, seconds=0.0):
        self.asked, self.seconds, self.running, self.most = [], seconds, 0, 0
        self.answers = answers or painted

    async def __call__(self, request):
        if request.method == "GET":
            return httpx.Response(404)
        form = form_of(request)
        self.asked.append((request, form))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
        answer = self.answers(form)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json=answer)

    def endpoint(self, send=(), **more):
        return Endpoint("http://fake/v1/", send, transport=httpx.MockTransport(self), **more)


def form_of(request):
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    parts = email.message_from_bytes(head + request.content).get_payload()
    return {part.get_param("name", header="content-disposition"): part.get_payload(decode=True) for part in parts}


def coded(pixels, kind="PNG"):
    return base64.b64encode(picture.encode(pixels, kind)).decode()


def painted(form, size=None, count=None):
    pixels = picture.read(form["image"]).pixels
    pixels = pixels if size is None else np.zeros((size[1], size[0], 3), np.uint8)
    return {"data": [{"b64_json": coded(pixels)}] * (int(form["n"]) if count is None else count)}


def run(target, loop, *arguments, **more):
    async def go():
        async with target:
            return await loop(target, *arguments, **more)

    return asyncio.run(go())


def causes(replay):
    return {cause: count for cause, count, _ in summary.causes(replay.answers)}
