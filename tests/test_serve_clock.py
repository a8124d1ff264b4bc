"""From when deadlines and latencies count: from the request's arrival, by a clock that does not jump."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from retouch import trace
from retouch.serve import orders
from retouch.serve.settings import Recording, Settings
from serving import Painter, Serving, alpha_mask, area, data_url, encoded, events, form, photo, refused
from test_serve_connections import answer, head

IMAGE, HOLE = encoded(photo()), alpha_mask(area())
EDITS, JOBS, INFER = "/v1/images/edits", "/v1/jobs", "/v2/models/retouch-mini/infer"
LONG = 60.0
SOON = 0.3
"""Seconds that it takes to decode a picture here."""


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders take a while, as behind many large pictures."""

    def late(*args: Any, **more: Any) -> Any:
        time.sleep(SOON)
        return orders.order_of(*args, **more)

    for module in ("service", "oip"):
        monkeypatch.setattr(f"retouch.serve.{module}.order_of", late)


def inference(seconds: float) -> dict[str, Any]:
    image = {"name": "image", "datatype": "UINT8", "shape": [2, 2, 3], "data": [0] * 12}
    words = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["x"]}
    return {"json": {"inputs": [image, words], "parameters": {"timeout": round(seconds * 1e6)}}}


def ask(server: Serving, path: str, seconds: float) -> Any:
    if path == INFER:
        return server.post(INFER, **inference(seconds))
    if path == "generations":
        return server.post("/v1/images/generations", json={"prompt": "x", "deadline_ms": round(seconds * 1e3)})
    return server.edit(
        IMAGE, HOLE, path=JOBS if path == JOBS else EDITS, stream=path == "stream", deadline_ms=round(seconds * 1e3)
    )


@pytest.mark.parametrize("path", [EDITS, "stream", JOBS, INFER, "generations"])
def test_a_deadline_that_is_over_when_the_picture_is_decoded_is_refused(path: str) -> None:
    with Serving() as server:
        late = ask(server, path, SOON / 2)
        if path == INFER:
            assert (late.status_code, "0.15 s of its deadline" in late.json()["error"]) == (504, True)
        else:
            refused(late, 504, "deadline_passed", None, "0.15 s of its deadline")
        server.idle()
        assert not server.worker.asked
        assert (server.service.pixels.used, server.service.bodies.used) == (0, 0)
        assert server.get("/v1/stats").json()["edits"] == {"succeeded": 0, "failed": 0, "cancelled": 0, "rejected": 1}


@pytest.mark.parametrize("path", [EDITS, "stream", JOBS, INFER, "generations"])
def test_an_edit_is_given_what_is_left_of_its_deadline(path: str) -> None:
    with Serving() as server:
        assert ask(server, path, LONG).status_code in (200, 202)
        server.idle()
        assert LONG / 2 < server.worker.asked[-1].edit.deadline <= LONG - SOON
        (line,) = [line for line in server.get("/metrics").text.splitlines() if line.startswith("retouch_request_seconds_sum")]
        assert float(line.split()[1]) >= SOON


def test_the_bodys_way_counts() -> None:
    body = json.dumps({"prompt": "x", "images": [{"image_url": data_url(IMAGE)}], "deadline_ms": 60_000}).encode()
    with Serving() as server, server.connect() as client:
        client.sendall(head(len(body)) + body[:100])
        time.sleep(SOON)
        client.sendall(body[100:])
        status, _, data = answer(client)
        assert status == 200
        assert server.worker.asked[-1].edit.deadline <= LONG - 2 * SOON
        assert json.loads(data)["usage"]["retouch"]["latency_seconds"] >= 2 * SOON


def test_what_the_server_gives_an_edit_counts_from_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SOON", 1.2)
    with Serving(Settings(request_seconds=1.5), Painter(hold=True)) as server:
        began = time.monotonic()
        late = server.edit(IMAGE, HOLE)
        assert time.monotonic() - began < 2.6  # and not from when it was decoded
        refused(late, 504, "deadline_passed", None, "1.5 s that this server (--request-seconds)")


def test_the_deadline_that_is_recorded_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with Serving(Settings(record=Recording(path))) as server:
        assert server.edit(IMAGE, HOLE, deadline_ms=60_000).status_code == 200
        server.idle()
    (request,) = trace.read(path).requests
    assert request.deadline == LONG


@pytest.mark.parametrize("years", [-30, 30])
def test_a_jump_of_the_wall_clock_is_nothing_to_an_edit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, years: int) -> None:
    now = time.time() + years * 365 * 86_400
    with Serving(Settings(ledger=str(tmp_path / "ledger.sqlite")), Painter(hold=True)) as server:
        document = server.post("/v1/documents", files={"file": IMAGE}).json()["id"]
        job = server.edit([], HOLE, path=JOBS, document=document, deadline_ms=60_000).json()["id"]
        server.worker.wait(lambda: len(server.worker.asked) == 1)
        monkeypatch.setattr("time.time", lambda: now)
        server.worker.release()
        with server.client.stream("GET", f"{JOBS}/{job}/events") as response:
            assert list(events(response.iter_lines()))[-1]["status"] == "succeeded"
        assert server.get(f"{JOBS}/{job}").json()["result"]["usage"]["retouch"]["latency_seconds"] < LONG
        assert server.post(EDITS, **form([], HOLE, document=document, deadline_ms=60_000)).status_code == 200
        assert server.get(f"/v1/documents/{document}").status_code == 200
        monkeypatch.undo()
    assert server.service.books.counts["written"] == 2
