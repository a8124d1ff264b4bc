"""Clients that go away while the server works on what they sent, or on what they were to have: nothing is left behind."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from retouch.serve import oip, orders
from retouch.serve.orders import Order
from serving import PATIENCE, Painter, Serving, data_url, encoded, photo
from test_serve_connections import head, until

EDITS, JOBS, INFER = "/v1/images/edits", "/v1/jobs", "/v2/models/retouch-mini/infer"


class Held:
    """Does what `work` does, once it is let."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self.work = work
        self.begun, self.let = threading.Event(), threading.Event()

    def __call__(self, *args: Any, **more: Any) -> Any:
        self.begun.set()
        assert self.let.wait(PATIENCE)
        return self.work(*args, **more)


def body(path: str, stream: bool = False) -> bytes:
    if path == INFER:
        image = {"name": "image", "datatype": "UINT8", "shape": [2, 2, 3], "data": [0] * 12}
        words = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["x"]}
        return json.dumps({"inputs": [image, words]}).encode()
    return json.dumps({"prompt": "x", "images": [{"image_url": data_url(encoded(photo()))}], "stream": stream}).encode()


def left(server: Serving, path: str, held: Held, stream: bool = False) -> None:
    """A client that asks, and goes away while `held` is at it."""
    with server.connect() as client:
        text = body(path, stream)
        client.sendall(head(len(text), path) + text)
        assert held.begun.wait(PATIENCE)
    until(lambda: not server.server.server_state.connections)
    held.let.set()
    server.idle()


@pytest.mark.parametrize(("path", "stream"), [(EDITS, False), (EDITS, True), (JOBS, False), (INFER, False)])
def test_who_goes_away_while_the_picture_is_decoded_is_given_nothing(
    monkeypatch: pytest.MonkeyPatch, path: str, stream: bool
) -> None:
    held = Held(orders.order_of)
    for module in ("service", "oip"):
        monkeypatch.setattr(f"retouch.serve.{module}.order_of", held)
    with Serving(worker=Painter(hold=True)) as server:
        left(server, path, held, stream)
        assert (server.service.pixels.used, server.service.bodies.used) == (0, 0)
        assert not server.service.jobs, "there would be nobody who knows of it"
        if path == INFER:
            server.worker.wait(lambda: len(server.worker.cancelled) == len(server.worker.asked))
        else:
            assert not server.worker.asked
        told = server.get("/v1/stats").json()["edits"]
        assert (told["succeeded"], told["failed"], told["rejected"]) == (0, 0, 0)


@pytest.mark.parametrize(("path", "stream"), [(EDITS, False), (EDITS, True), (INFER, False)])
def test_who_goes_away_while_the_answer_is_coded_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, path: str, stream: bool
) -> None:
    held = Held(oip._response if path == INFER else Order.file)
    if path == INFER:
        monkeypatch.setattr("retouch.serve.oip._response", held)
    else:
        monkeypatch.setattr(Order, "file", lambda order, crop: held(order, crop))
    with Serving() as server:
        left(server, path, held, stream)
        assert (server.service.pixels.used, server.service.bodies.used) == (0, 0)
        told = server.get("/v1/stats").json()["edits"]
        assert told["succeeded" if path == INFER else "cancelled"] == 1
        assert sum(told.values()) == 1
        monkeypatch.undo()
        assert server.edit(encoded(photo())).status_code == 200
