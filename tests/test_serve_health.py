"""How the server stands: health, metrics and who may read them; broken requests; deadlines without a worker; two Ctrl-Cs."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import time
from contextlib import suppress
from pathlib import Path

import pytest

from retouch import trace
from retouch.edit import InvalidOption
from retouch.serve.settings import Recording, Settings, Tenant, read_keys
from serving import PATIENCE, Painter, Serving, alpha_mask, area, encoded, photo, refused

IMAGE, HOLE = encoded(photo()), alpha_mask(area())
JOBS = "/v1/jobs"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_health_may_be_asked_for_its_head() -> None:
    with Serving() as server:
        for path in ("/healthz", "/readyz"):
            answer = server.client.head(path)
            assert (answer.status_code, answer.content) == (200, b"")
        server.worker.ready = False
        assert server.client.head("/readyz").status_code == 503
        assert server.client.head("/healthz").status_code == 200
        assert {"get"} == set(server.get("/openapi.json").json()["paths"]["/healthz"])


def test_metrics_are_an_operators_where_there_are_keys() -> None:
    tenants = (Tenant("ann", "a"), Tenant("prometheus", "p", operator=True))
    with Serving(Settings(tenants=tenants)) as server:
        refused(server.get("/metrics"), 401, "unauthorized")
        refused(server.get("/metrics", headers=bearer("wrong")), 401, "unauthorized")
        refused(server.get("/metrics", headers=bearer("a")), 403, "forbidden", None, "operator = true")
        assert server.get("/metrics", headers=bearer("p")).status_code == 200
        for path in ("/healthz", "/readyz", "/v2/health/live"):
            assert server.get(path).status_code == 200
    with Serving() as server:
        assert server.get("/metrics").status_code == 200


def test_operators_are_read_from_the_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text('[[tenant]]\nname = "a"\nkey = "b"\noperator = true\n')
    assert read_keys(path) == (Tenant("a", "b", operator=True),)
    path.write_text('[[tenant]]\nname = "a"\nkey = "b"\noperator = "yes"\n')
    with pytest.raises(InvalidOption, match="operator is 'yes'"):
        read_keys(path)


@pytest.mark.parametrize("text", [b"\x16\x03\x01\x02\x00\x01", b"NONSENSE\r\n\r\n", b"GET / HTTP/1.1\r\nX: \x00\r\n\r\n"])
def test_what_is_no_http_is_refused_in_the_same_form(text: bytes) -> None:
    with Serving() as server, server.connect() as client:
        client.sendall(text + b"\r\n\r\n")
        data = b""
        while got := client.recv(65536):
            data += got
        head, _, body = data.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"Content-Type: application/json" in head
        assert json.loads(body)["error"]["code"] == "bad_request"
        assert server.get("/healthz").status_code == 200


def test_a_deadline_passes_in_time_while_no_worker_is_up() -> None:
    with Serving(worker=Painter(hold=True)) as server:
        server.worker.ready = False
        started = time.monotonic()
        late = server.edit(IMAGE, HOLE, deadline_ms=200)
        assert time.monotonic() - started < 1.5  # and not the two seconds on top that a worker has
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_passed")
        server.idle()


def test_a_worker_that_comes_up_before_the_deadline_still_answers() -> None:
    with Serving(worker=Painter(hold=True)) as server:
        server.worker.ready = False
        job = server.edit(IMAGE, HOLE, path=JOBS, deadline_ms=60_000).json()["id"]
        server.worker.ready = True
        server.worker.release()
        server.idle()
        assert server.get(f"/v1/jobs/{job}").json()["status"] == "succeeded"


def test_a_second_interrupt_closes_the_books_and_the_recording(tmp_path: Path) -> None:
    ledger, path = tmp_path / "ledger.sqlite", tmp_path / "t.jsonl"
    settings = Settings(ledger=str(ledger), record=Recording(path, True))
    with Serving(settings, Painter(hold=True)) as server:
        server.service.books.writer.every = 3600.0
        server.worker.release()
        assert server.edit(IMAGE, HOLE).status_code == 200
        server.worker.hold()
        assert server.edit(IMAGE, HOLE, path=JOBS).status_code == 202
        for _ in range(2):
            server.server.handle_exit(signal.SIGINT, None)
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive()
        assert server.service.books.counts["waiting"] == 0
    with sqlite3.connect(ledger) as rows:
        statuses = [row[0] for row in rows.execute("SELECT status FROM retouch_edits ORDER BY time")]
    assert statuses == ["succeeded", "cancelled"]
    assert len(trace.read(path).requests) == 2
    with suppress(OSError), socket.create_connection(server.address, timeout=1):
        raise AssertionError
