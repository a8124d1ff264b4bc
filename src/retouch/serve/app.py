"""The application: its gate, its errors, its endpoints."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retouch.edit import QueueFull, RetouchError
from retouch.engine.worker import Worker
from retouch.serve import documents, images, jobs, oip
from retouch.serve.budget import Claim
from retouch.serve.errors import BadRequest, BodyTooLarge, BodyTooSlow, Draining, Forbidden, NotFound, body_of, response_of
from retouch.serve.schema import ERRORS, Stats, some
from retouch.serve.service import Service
from retouch.serve.settings import Settings

log = logging.getLogger(__name__)

STUDIO = Path(__file__).parent / "studio"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self' blob: data:; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the studio's page may load: its own files, and pictures it made."""

OPEN_BODIES = 64
"""Requests beyond the queue's length whose bodies may be read at once; what comes on top is refused unread."""


THREADS = min(40, 4 * (os.cpu_count() or 1))
"""Pictures that are decoded or encoded at once; more would be no faster, and each takes the memory of some whole pictures."""


def create(settings: Settings, worker: Worker) -> FastAPI:
    """The server over a worker that has been started; it is closed with the application."""
    service = Service(settings, worker)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        current_default_thread_limiter().total_tokens = THREADS
        yield
        await service.drain()
        await asyncio.to_thread(worker.close)
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="Retouch", version=version("retouch"), lifespan=lifespan, redirect_slashes=False, docs_url=None, redoc_url=None,
        description="Image edits with masks: only what the mask touches is computed, and every answer says what it cost.",
    )  # fmt: skip
    app.state.service = service
    service.metrics.watch(service)
    app.add_exception_handler(RetouchError, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _broken)
    for router in (images.router, jobs.router, documents.router, oip.router):
        app.include_router(router)
    _add_health(app, service)
    _add_studio(app)
    app.add_middleware(Gate, service=service)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


class Gate:
    """What is decided before a body is read, and as it comes: how many at once, of how many bytes, how large, how slow.

    Nothing new while the server stops. Bytes are counted as they come, so that who only says that many will come is in nobody's
    way. `scope["retouch.body"]` is the claim; who has made something else of the body gives it back. `scope["retouch.arrived"]`
    is when it came, by the monotonic clock: deadlines and latencies count from there.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service, self.open = app, service, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            self.service.metrics.reject(body_of(refusal)["error"]["code"])
            await response_of(refusal, scope["path"])(scope, receive, send)
            return
        self.open += 1
        scope["retouch.arrived"] = time.monotonic()
        scope["retouch.body"] = claim = self.service.bodies.claim()
        try:
            await self.app(scope, self._watched(receive, claim), send)
        finally:
            claim.release()
            self.open -= 1

    def _refusal(self, scope: Scope) -> RetouchError | None:
        settings = self.service.settings
        if self.service.draining:
            return Draining("the server is stopping; send the request to another one.")
        most = settings.worker.queue + OPEN_BODIES
        if self.open >= most:
            return QueueFull(f"{most:,} requests are being served; try again later.", retry_after=2.0)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 15:
            return BadRequest("Content-Length is not a number of bytes.")
        if int(length) > settings.body:
            return _too_large(settings.body)
        try:
            self.service.bodies.check(int(length))
        except QueueFull as error:
            return error
        return None

    def _watched(self, receive: Receive, claim: Claim) -> Receive:
        settings, read, ended = self.service.settings, 0, False
        loop = asyncio.get_running_loop()
        late = loop.time() + settings.body_seconds

        async def next_message() -> Message:
            nonlocal read, ended
            if ended:
                return await receive()
            try:
                async with asyncio.timeout_at(late):
                    message = await receive()
            except TimeoutError:
                raise BodyTooSlow(f"the body did not arrive within {settings.body_seconds:g} s; send it faster.") from None
            read += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if read > settings.body:
                raise _too_large(settings.body)
            claim.take(len(message.get("body", b"")))
            return message

        return next_message


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has more than {limit / 1e6:,.0f} MB; send smaller files, or fewer at once.")


async def _refused(request: Request, error: Exception) -> Response:
    if not getattr(error, "counted", False):
        request.app.state.service.metrics.reject(body_of(error)["error"]["code"])
    if isinstance(error, RetouchError) and error.status >= 500:
        log.warning("%s %s: %s", request.method, request.url.path, error)
    return response_of(error, request.url.path)


async def _http(request: Request, error: Exception) -> Response:
    """What the framework refuses by itself: unknown addresses, wrong methods, broken forms."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return await _refused(request, NotFound(f"there is nothing at {request.url.path}; see /openapi.json."))
    if error.status_code == 400:
        return await _refused(request, BadRequest(str(error.detail)))
    told = {"message": str(error.detail), "type": "invalid_request_error", "param": None, "code": "http_error"}
    request.app.state.service.metrics.reject(told["code"])
    body = {"error": told["message"] if request.url.path.startswith("/v2") else told}
    return JSONResponse(body, error.status_code, dict(error.headers or {}))


async def _gone(request: Request, error: Exception) -> Response:
    """Nobody reads it; the number is for the log."""
    return PlainTextResponse("client closed the connection", 499)


async def _broken(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    response = await _refused(request, error)
    response.headers["Connection"] = "close"  # which is what happens to it now, and no client should be surprised
    return response


def _add_health(app: FastAPI, service: Service) -> None:
    @app.head("/healthz", include_in_schema=False, response_class=PlainTextResponse)
    @app.get("/healthz", tags=["health"], response_class=PlainTextResponse)
    async def healthz() -> str:
        """The process answers."""
        return "ok"

    @app.head("/readyz", include_in_schema=False, response_class=PlainTextResponse)
    @app.get("/readyz", tags=["health"], response_class=PlainTextResponse, responses={503: ERRORS[503]})
    async def readyz() -> str:
        """The model is loaded, and edits are taken."""
        if service.draining or not service.worker.ready:
            raise Draining("the server is stopping." if service.draining else "the model's process is starting.")
        return "ready"

    @app.get("/metrics", tags=["health"], response_class=PlainTextResponse, responses=some(401, 403))
    async def metrics(request: Request) -> Response:
        """Prometheus' text format. Where there are keys, for an operator's only: the figures name tenants."""
        if not service.settings.tenant(request.headers.get("authorization")).operator and service.settings.tenants:
            raise Forbidden("the metrics name tenants: this key needs operator = true in the server's file of keys.")
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/stats", tags=["health"], response_model=Stats, responses={401: ERRORS[401]})
    async def stats(request: Request) -> Any:
        """The same figures for people: queue, step, caches, cost."""
        service.settings.tenant(request.headers.get("authorization"))
        return JSONResponse(service.stats())


class _Fresh(StaticFiles):
    """Files that are asked for anew each time, so that an upgrade does not mix old modules with new pages."""

    def file_response(self, *args: Any, **more: Any) -> Response:
        response = super().file_response(*args, **more)
        response.headers["Cache-Control"] = "no-cache"
        return response


def _add_studio(app: FastAPI) -> None:
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}

    @app.get("/", include_in_schema=False)
    async def studio() -> Response:
        return FileResponse(STUDIO / "index.html", headers=headers)

    app.mount("/studio", _Fresh(directory=STUDIO, check_dir=False), name="studio")


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's, with how a key is sent, and without the 422 that it describes where an endpoint does not."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in schema["paths"].items():
            for operation in methods.values():
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]
                if path.startswith(("/v1", "/v2")):
                    operation["security"] = [{"key": []}, {}]
        app.openapi_schema = schema
    return app.openapi_schema
