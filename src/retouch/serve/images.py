"""`/v1/images/edits`, `/v1/images/generations` and `/v1/models`, as OpenAI's clients speak them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from retouch.serve import schema
from retouch.serve.forms import read_edit, read_generation
from retouch.serve.orders import Order
from retouch.serve.runs import Run
from retouch.serve.schema import ERRORS
from retouch.serve.service import Service
from retouch.serve.settings import Tenant

router = APIRouter(tags=["images"])

HEARTBEAT = 15.0
"""Seconds of silence after which a stream sends a comment, so that nobody in between takes it for dead."""


REFUSAL = 0.5
"""Seconds that a stream waits before it begins, so that an edit which is refused at once is refused by its status."""


def asker(request: Request) -> tuple[Service, Tenant]:
    """The service, and who asks it. Raises Unauthorized."""
    service: Service = request.app.state.service
    return service, service.settings.tenant(request.headers.get("authorization"))


async def edit_order(request: Request, service: Service, tenant: Tenant, stream: bool = False) -> Order:
    """What a request asks for; its body is let go. With `stream`, previews are made though it does not say so.

    Raises ClientDisconnect where the client went away meanwhile: a job that it never heard of would be for nobody.
    """
    ask = await read_edit(request, service.settings.file)
    ask.fields.stream |= stream
    order = await service.edit_order(ask, tenant)
    request.scope["retouch.body"].release()
    if await request.is_disconnected():
        order.claim.release()
        raise ClientDisconnect
    return order


@router.post(
    "/v1/images/edits", response_model=schema.Images, openapi_extra=schema.edit_body(),
    responses={200: schema.STREAM, **ERRORS},
)  # fmt: skip
async def edits(request: Request) -> Response:
    """Edit a picture inside its mask, or, where `model` names one, run a filter on it. With `stream`, server-sent events:
    `image_edit.partial_image`, `image_edit.completed`.
    """
    service, tenant = asker(request)
    return await _answer(request, service, await edit_order(request, service, tenant), tenant)


@router.post(
    "/v1/images/generations", response_model=schema.Images, openapi_extra=schema.generation_body(),
    responses={200: schema.STREAM, **ERRORS},
)  # fmt: skip
async def generations(request: Request) -> Response:
    """A picture from nothing. With `stream`, events as for edits, named `image_generation.*`."""
    service, tenant = asker(request)
    return await _answer(request, service, await service.generation_order(await read_generation(request), tenant), tenant)


async def _answer(request: Request, service: Service, order: Order, tenant: Tenant) -> Response:
    run = service.begin(order, tenant, request.scope["retouch.arrived"])
    if not order.fields.stream:
        return Pictures(await while_connected(request, run))
    with suppress(TimeoutError):
        async with asyncio.timeout(REFUSAL):
            await anext(run.follow())
    if run.error is not None:
        raise run.error
    return _Stream(run)


async def while_connected(request: Request, run: Run) -> dict[str, Any]:
    """The run's response; where the client goes away, the run is cancelled. Raises the run's error, ClientDisconnect."""
    finished, gone = asyncio.create_task(run.finished()), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((finished, gone), return_when=asyncio.FIRST_COMPLETED)
        if not finished.done():
            raise ClientDisconnect
        return finished.result()
    finally:
        run.cancel()
        finished.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Pictures(JSONResponse):
    """Pictures in JSON are long texts, which pydantic's writer puts down in a fifth of the standard library's time."""

    def render(self, content: Any) -> bytes:
        return to_json(content)


class _Stream(StreamingResponse):
    """A run's events. The run is cancelled where the client goes away, be it before the first of them."""

    def __init__(self, run: Run) -> None:
        super().__init__(told(run), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.run.cancel()


async def told(run: Run, jobs: bool = False) -> AsyncIterator[bytes]:
    """A run's events as server-sent events; those about the job only with `jobs`."""
    events = run.follow()
    upcoming: asyncio.Task[dict[str, Any]] | None = None
    try:
        while True:
            upcoming = upcoming or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait((upcoming,), timeout=HEARTBEAT)
            if not done:
                yield b": still here\n\n"
                continue
            try:
                event = upcoming.result()
            except StopAsyncIteration:
                return
            upcoming = None
            if jobs or event["type"] != "job.status":
                yield b"event: %b\ndata: %b\n\n" % (event["type"].encode(), to_json(event))
    finally:
        if upcoming is not None:
            upcoming.cancel()


@router.get("/v1/models", response_model=schema.Models, responses={401: ERRORS[401]})
async def models(request: Request) -> Response:
    """The model that this server has, and the filters beside it, whose `retouch` has `"type": "filter"`."""
    service, _ = asker(request)
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in (service.model, *service.filters)]})


@router.get("/v1/models/{name:path}", response_model=schema.Model, responses=schema.some(401, 404))
async def model(request: Request, name: str) -> Response:
    """One model by its name."""
    service, _ = asker(request)
    service.filter_of(name)
    return JSONResponse(_model(service, name))


def _model(service: Service, name: str) -> dict[str, Any]:
    filter = service.filter_of(name)
    told = {key: value for key, value in service.info.items() if key != "filters"} if filter is None else filter.described()
    return {"id": name, "object": "model", "created": 0, "owned_by": "retouch", "retouch": told}
