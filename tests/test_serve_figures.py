"""What /v1/stats and /metrics say of the queue, of uploads, and of what was refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from retouch.engine.worker import Options
from retouch.serve import schema
from retouch.serve.settings import Settings
from serving import Painter, Serving, alpha_mask, area, encoded, photo
from test_serve_limits import gauges

IMAGE, HOLE = encoded(photo()), alpha_mask(area())
JOBS = "/v1/jobs"


def queue(server: Serving) -> dict[str, int]:
    stats = server.get("/v1/stats").json()
    schema.Stats.model_validate(stats)
    told = gauges(server)
    names = ("waiting", "running", "limit")
    assert stats["queue"] == {name: told[f"retouch_queue_{name}"] for name in names}
    return dict(stats["queue"])


def test_edits_that_no_worker_has_are_in_the_queue() -> None:
    """While one starts again, and behind one in quarantine: the worker's own figures know nothing of them."""
    with Serving(worker=Painter(Options(queue=9), hold=True)) as server:
        for _ in range(3):
            assert server.edit(IMAGE, HOLE, path=JOBS).status_code == 202
        server.worker.stats = {"queue": {"waiting": 0, "running": 2, "limit": 9}}
        assert queue(server) == {"waiting": 1, "running": 2, "limit": 9}
        server.worker.ready, server.worker.stats = False, {}
        assert queue(server) == {"waiting": 3, "running": 0, "limit": 9}
        server.worker.ready, server.worker.stats = True, {"queue": {"waiting": 0, "running": 1, "limit": 9}}
        assert queue(server) == {"waiting": 2, "running": 1, "limit": 9}
        server.worker.release()
        server.idle()
        assert queue(server) == {"waiting": 0, "running": 0, "limit": 9}, "what the worker said last is over"


def of(told: dict[str, float], name: str, cache: str, tier: str = "") -> float:
    return told[f'retouch_cache_{name}{{cache="{cache}"' + (f',tier="{tier}"}}' if tier else "}")]


def test_uploads_that_are_evicted_can_be_watched() -> None:
    files = [encoded(photo(seed=i)) for i in range(2)]
    with Serving(Settings(uploads=len(files[0]) + 100)) as server:
        ids = [server.post("/v1/documents", files={"file": data}).json()["id"] for data in files]
        assert [server.get(f"/v1/documents/{one}").status_code for one in ids] == [404, 200]
        told, stats = gauges(server), server.get("/v1/stats").json()["caches"]
        assert of(told, "evicted_total", "uploads", "host") == stats["uploads"]["evicted"]["host"] == 1
        assert of(told, "bytes", "uploads", "host") == len(files[1])
        assert of(told, "budget_bytes", "uploads", "host") == len(files[0]) + 100
        assert (of(told, "hits_total", "uploads", "host"), of(told, "misses_total", "uploads")) == (1, 1)
        assert of(told, "saved_seconds_total", "uploads") == 0
        assert stats["uploads"]["entries"] == 1


def test_a_picture_that_is_decoded_again_is_one_miss(tmp_path: Path) -> None:
    with Serving(worker=Painter(Options(cache=tmp_path))) as server:
        document = server.post("/v1/documents", files={"file": IMAGE}).json()["id"]
        assert server.edit([], HOLE, document=document).status_code == 200
        told = gauges(server)
        assert (of(told, "hits_total", "decoded", "host"), of(told, "misses_total", "decoded")) == (1, 0)
        assert of(told, "bytes", "uploads", "disk") > len(IMAGE)
        server.service.uploads.decoded.clear()
        assert server.edit([], HOLE, document=document).status_code == 200
        told = gauges(server)
        assert (of(told, "hits_total", "decoded", "host"), of(told, "misses_total", "decoded")) == (1, 1)


def test_whatever_is_refused_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    with Serving() as server:
        monkeypatch.setattr(server.service.uploads, "find", broken)
        for path, method, status, code in (
            ("/nowhere", "GET", 404, "not_found"), ("/studio/nothing.js", "GET", 404, "not_found"),
            ("/v2/nowhere", "POST", 404, "not_found"), ("/healthz", "POST", 405, "http_error"),
            ("/v1/documents/doc_1", "GET", 500, "internal_error"),
        ):  # fmt: skip
            name = f'retouch_rejected_total{{code="{code}"}}'
            before = gauges(server).get(name, 0)
            assert server.client.request(method, path).status_code == status
            assert gauges(server)[name] == before + 1
        assert server.get("/v1/stats").json()["edits"]["rejected"] == 5
