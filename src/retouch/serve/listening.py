"""How connections are kept, and how the server ends: uvicorn's, with more patience for edits and less for silence."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from retouch.serve.errors import BadRequest, body_of

HEAD_SECONDS = 20.0
"""A connection that has not sent the head of its request by then is closed."""

UNREAD_SECONDS = 60.0
"""A connection of which nothing of a waiting answer is read for so long is closed."""

LAST_SECONDS = 5
"""After the last edit, clients have so long to read their answers before the server ends."""


class Patient(H11Protocol):
    """Closes connections that stand still: the head of a request does not end, or an answer is not read."""

    head: asyncio.TimerHandle | None = None
    unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.head = self.loop.call_later(HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self.head is None:
            self.head = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        """To what is no HTTP, in the form of every other refusal."""
        error = BadRequest("this is no HTTP request that can be read; check the client, and that it speaks no TLS.")
        body = json.dumps(body_of(error)).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        head = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.unread is not None:
            self.unread.cancel()
            self.unread = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()
        if self.unread is not None:
            self.unread.cancel()
            self.unread = None

    def _stop(self) -> None:
        if self.head is not None:
            self.head.cancel()
            self.head = None

    def _expect(self, size: int) -> None:
        """That the answer, of which `size` bytes are still here, goes on being read."""
        self.unread = self.loop.call_later(UNREAD_SECONDS, self._check, size)

    def _check(self, size: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left < size:
            self._expect(left)
        else:
            self.transport.abort()


class Server(uvicorn.Server):
    """Says no to new edits from the signal on, in words as long as those that it has taken on still run."""

    def __init__(self, app: FastAPI) -> None:
        self.service = app.state.service
        config = uvicorn.Config(
            app, http=Patient, ws="none", log_level="warning", access_log=False, lifespan="on", server_header=False,
            backlog=4096, timeout_graceful_shutdown=LAST_SECONDS, timeout_keep_alive=15,
        )  # fmt: skip
        super().__init__(config)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.service.draining = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.create_task(self.service.drain())
        while not draining.done() and not self.force_exit:
            await asyncio.wait((draining,), timeout=0.1)
        draining.cancel()
        await super().shutdown(sockets)
