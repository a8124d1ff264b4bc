"""Clients that stall, lie, flood and go away: whoever stays has one answer."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from retouch.engine.worker import Options
from retouch.serve.orders import Order
from retouch.serve.runs import Run
from retouch.serve.settings import Settings
from serving import PATIENCE, Painter, Serving, alpha_mask, area, data_url, encoded, events, form, photo

IMAGE, HOLE = encoded(photo()), alpha_mask(area())
EDITS = "/v1/images/edits"
BODY = json.dumps({"prompt": "a cat", "images": [{"image_url": data_url(IMAGE)}]}).encode()
SOON = 0.2
"""In the place of the seconds that a server waits."""


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with Serving() as server:
        yield server


@pytest.fixture
def held() -> Iterator[Serving]:
    with Serving(worker=Painter(hold=True)) as server:
        yield server


def head(length: int | str, path: str = EDITS, more: str = "") -> bytes:
    kind = "Content-Type: application/json"
    return f"POST {path} HTTP/1.1\r\nHost: here\r\n{kind}\r\nContent-Length: {length}\r\n{more}\r\n".encode()


def answer(client: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """One response, of a length that is said, and nothing of what comes after it."""
    top = b""
    while not top.endswith(b"\r\n\r\n"):
        top += (got := client.recv(1))
        assert got, f"closed after {top!r}"
    first, *lines = top.decode("latin-1").strip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = b""
    while len(body) < int(headers.get("content-length", 0)):
        body += client.recv(int(headers["content-length"]) - len(body))
    return int(first.split()[1]), headers, body


def is_closed(client: socket.socket) -> bool:
    """Waits for it, and drops what came before."""
    with suppress(ConnectionResetError):
        while client.recv(65536):
            pass
    return True


def until(so: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not so():
        assert time.monotonic() < end
        time.sleep(0.01)


# Standing still


def test_answers_are_not_held_back_for_more(held: Serving) -> None:
    """Nagle's algorithm would delay every one by 40 ms."""
    assert held.get("/healthz").status_code == 200
    (connection,) = held.server.server_state.connections
    assert connection.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("path", [EDITS, "/v1/images/generations", "/v1/jobs", "/v2/models/retouch-mini/infer"])
def test_a_body_that_stalls_is_given_up(path: str) -> None:
    with Serving(Settings(body_seconds=SOON)) as server, server.connect() as client:
        client.sendall(head(1000, path) + b"{")
        status, _, body = answer(client)
        assert status == 408
        error = json.loads(body)["error"]
        assert "did not arrive" in (error if path.startswith("/v2") else error["message"])
        server.idle()


def test_a_form_that_stalls_in_its_picture_is_given_up() -> None:
    with Serving(Settings(body_seconds=SOON)) as server, server.connect() as client:
        part = b'--B\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + IMAGE
        kind = "Content-Type: multipart/form-data; boundary=B"
        client.sendall(f"POST /v1/documents HTTP/1.1\r\nHost: x\r\n{kind}\r\nContent-Length: 99999\r\n\r\n".encode() + part)
        assert answer(client)[0] == 408
        server.idle()


def test_a_body_in_pieces_is_read() -> None:
    with Serving() as server, server.connect() as client:
        client.sendall(head(len(BODY)))
        for start in range(0, len(BODY), 999):
            client.sendall(BODY[start : start + 999])
        assert answer(client)[0] == 200


def test_a_head_that_does_not_end_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retouch.serve.listening.HEAD_SECONDS", SOON)
    with Serving() as server:
        for start in (b"", b"P", head(5)[:30]):
            with server.connect() as client:
                client.sendall(start)
                assert is_closed(client)
        with server.connect() as client:  # the second request of a connection, one letter at a time
            client.sendall(head(len(BODY)) + BODY)
            assert answer(client)[0] == 200
            with suppress(BrokenPipeError, ConnectionResetError):
                for letter in head(5) * 20:
                    client.sendall(bytes([letter]))
                    time.sleep(0.02)
            assert is_closed(client)


def test_a_connection_that_is_in_use_is_not_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retouch.serve.listening.HEAD_SECONDS", SOON)
    with Serving(worker=Painter(seconds=1.5 * SOON)) as server, server.connect() as client:
        client.sendall(head(len(BODY)) + BODY)
        assert answer(client)[0] == 200  # after HEAD_SECONDS
        end = time.monotonic() + 3 * SOON
        while time.monotonic() < end:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer(client)[0] == 200
        time.sleep(1.5 * SOON)  # nothing at all
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer(client)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr("retouch.serve.listening.UNREAD_SECONDS", SOON)
    image, mask = data_url(encoded(photo(1500, 1000))), data_url(alpha_mask(area(1500, 1000)))
    large = {"prompt": "x", "images": [{"image_url": image}], "mask": {"image_url": mask}, "n": 2, "stream": stream}
    body = json.dumps(large).encode()
    with Serving() as server:
        for reads in (False, True):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            client.settimeout(PATIENCE)
            client.connect(server.address)
            client.sendall(head(len(body), more="Connection: close\r\n") + body)
            data = b""
            if reads:  # slowly, but it does
                while got := client.recv(400_000):
                    data += got
                    time.sleep(0.005)
                assert len(data) > 2 * 4_500_000
            until(lambda: not server.server.server_state.connections)
            client.close()
            server.idle()


# Lies


def test_less_than_was_said(server: Serving) -> None:
    before = len(server.worker.asked)
    with server.connect() as client:
        client.sendall(head(len(BODY) + 10) + BODY)
        client.shutdown(socket.SHUT_WR)
        assert is_closed(client)
    server.idle()
    assert len(server.worker.asked) == before


def test_more_than_was_said(server: Serving) -> None:
    before = len(server.worker.asked)
    with server.connect() as client:
        client.sendall(head(len(BODY)) + BODY + b"and more\r\n\r\n")
        assert answer(client)[0] == 200
        assert answer(client)[0] == 400
        assert is_closed(client)
    assert len(server.worker.asked) == before + 1


@pytest.mark.parametrize(
    "lines",
    ["Content-Length: -5", "Content-Length: x", "Content-Length: 5\r\nContent-Length: 6", "Content-Length: 5, 6",
     "Content-Length: " + "9" * 30, "Transfer-Encoding: chunked\r\nTransfer-Encoding: gzip", "Transfer-Encoding: gzip"],
)  # fmt: skip
def test_lengths_that_are_none(server: Serving, lines: str) -> None:
    with server.connect() as client:
        client.sendall(f"POST {EDITS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{lines}\r\n\r\n{{}}".encode())
        assert answer(client)[0] in (400, 413, 501)
    server.idle()


def test_a_length_over_the_limit_is_refused_unread(server: Serving) -> None:
    with server.connect() as client:
        client.sendall(head(10**12))
        status, _, body = answer(client)
        assert (status, json.loads(body)["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("text", [b"\x16\x03\x01\x02\x00\x01", b"NONSENSE\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"])
def test_what_is_no_http_is_refused(server: Serving, text: bytes) -> None:
    with server.connect() as client:
        client.sendall(text + b"\r\n\r\n")
        assert answer(client)[0] == 400
        assert is_closed(client)


def test_a_head_of_a_megabyte_is_refused(server: Serving) -> None:
    with server.connect() as client:
        with suppress(ConnectionError):
            client.sendall(head(5, more="X: " + "x" * 1_000_000 + "\r\n"))
        with suppress(ConnectionError):
            assert answer(client)[0] in (400, 431)
    assert server.get("/healthz").status_code == 200


def test_requests_one_behind_the_other(server: Serving) -> None:
    with server.connect() as client:
        client.sendall((head(len(BODY)) + BODY) * 3)
        received = b""
        while received.count(b'"created"') < 3:
            received += client.recv(65536)
    assert received.count(b"HTTP/1.1 200") == 3


def test_a_client_that_asks_before_it_sends(server: Serving) -> None:
    with server.connect() as client:
        client.sendall(head(len(BODY), more="Expect: 100-continue\r\n"))
        assert answer(client)[0] == 100
        client.sendall(BODY)
        assert answer(client)[0] == 200
    with server.connect() as client:
        client.sendall(head(10**10, more="Expect: 100-continue\r\n"))
        assert answer(client)[0] == 413


# Floods


async def flood(url: str, count: int, path: str) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits, verify=False) as client:
        return list(await asyncio.gather(*(client.post(path, **form(IMAGE, HOLE, seed=i)) for i in range(count))))


def kept(kind: type) -> int:
    gc.collect()
    return sum(isinstance(one, kind) for one in gc.get_objects())


@pytest.mark.parametrize("path", [EDITS, "/v1/jobs"])
def test_in_a_flood_every_request_has_one_answer(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr("retouch.serve.app.OPEN_BODIES", 50)
    with Serving(worker=Painter(Options(queue=8), seconds=0.002)) as server:
        before = kept(Order), kept(Run)
        answers = asyncio.run(flood(server.url, 240 if path == EDITS else 120, path))
        taken = 200 if path == EDITS else 202
        statuses = Counter(answer.status_code for answer in answers)
        assert set(statuses) <= {taken, 429}
        assert statuses[taken] >= 8
        for answer in answers:
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] == "queue_full"
        server.idle()
        stats = server.get("/v1/stats").json()["edits"]
        assert stats["succeeded"] + stats["failed"] + stats["cancelled"] == len(server.worker.asked)
        if path == EDITS:
            assert stats["succeeded"] == statuses[200]
            seeds = {answer.json()["data"][0]["seed"] for answer in answers if answer.status_code == 200}
            assert len(seeds) == statuses[200]
        server.worker.asked.clear()
        until(lambda: kept(Order) <= before[0] and (path != EDITS or kept(Run) <= before[1]))
        assert server.edit(IMAGE, HOLE).status_code == 200


def test_more_open_requests_than_may_be_read_are_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retouch.serve.app.OPEN_BODIES", 2)
    with Serving(worker=Painter(Options(queue=1))) as server:
        clients = [server.connect() for _ in range(3)]
        for client in clients:
            client.sendall(head(len(BODY)))
        until(lambda: server.gate.open == 3)
        refused = server.edit(IMAGE, HOLE)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert server.get("/healthz").status_code == 200
        clients[0].sendall(BODY)
        assert answer(clients[0])[0] == 200
        assert server.edit(IMAGE, HOLE).status_code == 200
        for client in clients:
            client.close()
        server.idle()


def test_silent_connections_are_in_nobodys_way(held: Serving) -> None:
    clients = [held.connect() for _ in range(200)]
    assert held.get("/healthz").status_code == 200
    for client in clients:
        client.close()


# Going away


def test_who_goes_away_takes_the_edits_along(held: Serving) -> None:
    """Running, and still in the queue."""
    clients = [held.connect() for _ in range(3)]
    for client in clients:
        client.sendall(head(len(BODY)) + BODY)
        count = clients.index(client) + 1
        held.worker.wait(lambda count=count: len(held.worker.asked) == count)
    clients[2].close()
    held.worker.wait(lambda: [edit.seed for edit in held.worker.cancelled] == [held.worker.asked[2].edit.seed])
    clients[0].close()
    held.worker.wait(lambda: len(held.worker.cancelled) == 2)
    held.worker.release()
    assert answer(clients[1])[0] == 200
    held.idle()
    assert held.get("/v1/stats").json()["edits"] == {"succeeded": 1, "failed": 0, "cancelled": 2, "rejected": 0}


@pytest.mark.parametrize("close", ["at once", "after an event"])
def test_who_leaves_a_stream_takes_the_edits_along(held: Serving, close: str) -> None:
    """Before the first event too, while the server still looks whether the edit is refused."""
    if close == "at once":  # the painter is busy with another edit, so no event comes
        other = held.edit(IMAGE, HOLE, path="/v1/jobs").json()["id"]
    body = {"prompt": "x", "n": 2, "stream": True, "partial_images": 1, "images": [{"image_url": data_url(IMAGE)}]}
    text = json.dumps(body).encode()
    client = held.connect()
    client.sendall(head(len(text)) + text)
    held.worker.wait(lambda: len(held.worker.asked) == (3 if close == "at once" else 2))
    if close != "at once":
        received = b""
        while b"partial_image" not in received:
            received += client.recv(65536)
    client.close()
    held.worker.wait(lambda: len(held.worker.cancelled) == 2)
    if close == "at once":
        assert held.get(f"/v1/jobs/{other}").json()["status"] == "running"


def test_who_leaves_an_inference_takes_the_edits_along(held: Serving) -> None:
    image = {"name": "image", "datatype": "UINT8", "shape": [2, 2, 3], "data": [0] * 12}
    prompt = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["x"]}
    body = json.dumps({"inputs": [image, prompt]}).encode()
    client = held.connect()
    client.sendall(head(len(body), "/v2/models/retouch-mini/infer") + body)
    held.worker.wait(lambda: len(held.worker.asked) == 1)
    client.close()
    held.worker.wait(lambda: len(held.worker.cancelled) == 1)


def test_who_leaves_a_jobs_events_leaves_the_job(held: Serving) -> None:
    job = held.edit(IMAGE, HOLE, path="/v1/jobs").json()["id"]
    with held.client.stream("GET", f"/v1/jobs/{job}/events") as response:
        assert next(events(response.iter_lines()))["status"] == "running"
    held.worker.release()
    with held.client.stream("GET", f"/v1/jobs/{job}/events") as response:
        assert list(events(response.iter_lines()))[-1]["status"] == "succeeded"
    assert not held.worker.cancelled


def test_who_goes_away_in_the_upload_leaves_nothing_behind(held: Serving) -> None:
    client = held.connect()
    client.sendall(head(len(BODY)) + BODY[:100])
    until(lambda: held.gate.open == 1)
    client.close()
    held.idle()
    assert not held.worker.asked
