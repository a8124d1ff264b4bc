"""Who may use the server, how much, and what it is started with."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from retouch.edit import InvalidOption, WorkerLost
from retouch.engine.worker import Options
from retouch.serve import main
from retouch.serve.settings import Settings, Tenant, read_keys
from serving import Painter, Serving, alpha_mask, area, encoded, form, photo, refused

IMAGE, HOLE = encoded(photo()), alpha_mask(area())
EDITS = "/v1/images/edits"
INFER = "/v2/models/retouch-mini/infer"
PROMPT = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["x"]}


# Keys and limits


def test_a_server_with_keys_wants_one() -> None:
    digest = "sha256:" + hashlib.sha256(b"secret").hexdigest().upper()
    tenants = (Tenant("ann", "plain"), Tenant("ben", digest, operator=True))
    with Serving(Settings(tenants=tenants)) as server:
        bad = ["", "Bearer", "Bearer wrong", "Basic plain", f"Bearer {digest}", "plain", b"Bearer \xff"]
        for headers in ({"Authorization": value} if value else {} for value in bad):
            for answer in (
                server.post(EDITS, headers=headers, **form(IMAGE, HOLE)), server.post("/v1/jobs", headers=headers),
                server.get("/v1/models", headers=headers), server.get("/v1/stats", headers=headers),
                server.get("/v1/jobs", headers=headers), server.get("/v1/jobs/job_1/events", headers=headers),
                server.post("/v1/documents", headers=headers), server.get("/v1/documents/doc_1", headers=headers),
                server.post("/v1/images/generations", headers=headers),
            ):  # fmt: skip
                refused(answer, 401, "unauthorized")
                assert answer.headers["www-authenticate"] == "Bearer"
            assert server.post(INFER, headers=headers, json={}).status_code == 401
            assert server.get("/v2/models/retouch-mini", headers=headers).status_code == 401
        for key in ("plain", "secret"):
            answer = server.post(EDITS, headers={"Authorization": f"bearer {key}"}, **form(IMAGE, HOLE))
            assert answer.status_code == 200
        assert [one.edit.tenant for one in server.worker.asked] == ["ann", "ben"]
        assert server.get("/healthz").status_code == server.get("/readyz").status_code == 200
        told = server.get("/metrics", headers={"Authorization": "Bearer secret"}).text
        assert 'retouch_dollars_total{tenant="ann"}' in told


def test_tenants_do_not_see_each_other() -> None:
    ann, ben = ({"Authorization": f"Bearer {key}"} for key in ("a", "b"))
    with Serving(Settings(tenants=(Tenant("ann", "a"), Tenant("ben", "b")))) as server:
        document = server.post("/v1/documents", files={"file": ("x", IMAGE)}, headers=ann).json()["id"]
        job = server.post("/v1/jobs", headers=ann, **form(IMAGE, HOLE)).json()["id"]
        for path in (
            f"/v1/documents/{document}",
            f"/v1/documents/{document}/content",
            f"/v1/jobs/{job}",
            f"/v1/jobs/{job}/events",
        ):
            assert server.get(path, headers=ann).status_code == 200
            refused(server.get(path, headers=ben), 404, "not_found")
        refused(server.client.delete(f"/v1/documents/{document}", headers=ben), 404, "not_found")
        refused(server.client.delete(f"/v1/jobs/{job}", headers=ben), 404, "not_found")
        refused(server.post(EDITS, headers=ben, **form([], HOLE, document=document)), 404, "not_found")
        assert server.get("/v1/jobs", headers=ben).json()["data"] == []
        assert server.post("/v1/documents", files={"file": ("x", IMAGE)}, headers=ben).json()["id"] != document


def test_limits_of_a_tenant() -> None:
    tenants = (Tenant("rate", "r", rate=3), Tenant("concurrency", "c", concurrency=2), Tenant("pixels", "p", pixels=3000))
    with Serving(Settings(tenants=tenants), Painter(hold=True)) as server:

        def edit(key: str, **fields: Any) -> httpx.Response:
            return server.post("/v1/jobs", headers={"Authorization": f"Bearer {key}"}, **form(IMAGE, HOLE, **fields))

        assert edit("r", n=2).status_code == edit("r").status_code == 202
        over = edit("r", n=2)
        refused(over, 429, "too_much", None, "3 edits a minute")
        assert 30 < int(over.headers["retry-after"]) <= 41
        refused(edit("r", n=4), 400, "invalid_option", None, "ask for fewer")

        job = edit("c", n=2).json()["id"]
        refused(edit("c"), 429, "too_much", None, "2 edits at once")
        server.client.delete(f"/v1/jobs/{job}", headers={"Authorization": "Bearer c"})
        server.worker.wait(lambda: len(server.worker.cancelled) == 2)
        assert edit("c").status_code == 202
        refused(edit("c", n=2), 429, "too_much", None, "2 edits at once")

        refused(edit("p"), 400, "invalid_option", None, "3,072 pixels")
        headers = {"Authorization": "Bearer p"}
        refused(server.post("/v1/documents", files={"file": ("x", IMAGE)}, headers=headers), 400, "invalid_option")
        refused(server.post(EDITS, headers=headers, **form([encoded(photo(8, 8)), IMAGE])), 400, "invalid_option")
        body = {"prompt": "x", "size": "64x64"}
        refused(server.post("/v1/images/generations", json=body, headers=headers), 400, "invalid_option")
        wide = {"name": "image", "datatype": "UINT8", "shape": [1, 4000, 3], "data": [0] * 12_000}
        assert server.post(INFER, json={"inputs": [wide, PROMPT]}, headers=headers).status_code == 400


def test_a_worker_that_is_lost_is_said() -> None:
    with Serving(worker=Painter(Options(queue=1), hold=True)) as server:
        assert server.edit(IMAGE, HOLE, path="/v1/jobs").status_code == 202
        server.worker.ready = False
        refused(server.edit(IMAGE, HOLE), 503, "worker_lost")
        server.worker.release()
        server.idle()
        server.worker.fault = WorkerLost("the worker's process died 3 times under this edit.")
        refused(server.edit(IMAGE, HOLE), 503, "worker_lost")
        server.worker.fault = ZeroDivisionError("a bug")
        broken = server.edit(IMAGE, HOLE)
        assert (broken.status_code, broken.json()["error"]["code"]) == (500, "internal_error")
        assert "a bug" not in broken.text
        assert broken.headers["connection"] == "close"


# Settings


def test_without_keys_only_this_machine_is_served() -> None:
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.com"):
        with pytest.raises(InvalidOption, match="--keys"):
            Settings(host=host)
        Settings(host=host, tenants=(Tenant("a", "b"),))
    for host in ("127.0.0.1", "::1", "localhost", "127.5.0.1"):
        Settings(host=host)
    with pytest.raises(InvalidOption, match="--keys"):
        main(["--host", "0.0.0.0", "--port", "0"])


@pytest.mark.parametrize(
    "options",
    [["--queue", "0"], ["--memory", "0"], ["--disk", "-1"], ["--tokens", "0"], ["--drain", "-1"], ["--port", "70000"],
     ["--port", "-1"], ["--price", "-1"], ["--price", "nan"], ["--keys", "/nowhere.toml"], ["--host", "256.0.0.1.nowhere"]],
)  # fmt: skip
def test_options_out_of_range_are_refused_before_a_model_is_loaded(options: list[str]) -> None:
    with pytest.raises(InvalidOption):
        main(options)


def test_a_port_that_is_taken_is_said_at_once() -> None:
    with Serving() as server, pytest.raises(InvalidOption, match="cannot be served on"):
        main(["--port", str(server.address[1])])


def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text('[[tenant]]\nname = "ann"\nkey = "a"\nrate = 0.5\n[[tenant]]\nname = "ben"\nkey = "b"\npixels = 10\n')
    assert read_keys(path) == (Tenant("ann", "a", rate=0.5), Tenant("ben", "b", pixels=10))


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", "[tenant]", "tenant = 5", "tenant = []", "[[tenant]]", '[[tenant]]\nname = "a"',
     '[[tenant]]\nname = "a"\nkey = ""', '[[tenant]]\nname = "a"\nkey = 5', '[[tenant]]\nname = "a"\nkey = "b"\nspeed = 1',
     '[[tenant]]\nname = "a"\nkey = "b"\nrate = 0', '[[tenant]]\nname = "a"\nkey = "b"\nrate = "5"',
     '[[tenant]]\nname = "a"\nkey = "b"\nconcurrency = -1', '[[tenant]]\nname = "a"\nkey = "b"\npixels = true',
     '[[tenant]]\nname = "a"\nkey = "b"\nrate = nan', '[[tenant]]\nname = "a"\nkey = "sha256:abc"',
     '[[tenant]]\nname = "a"\nkey = "b"\n[[tenant]]\nname = "c"\nkey = "b"', '[[tenant]]\nname = "a"\nkey = "b"\n[other]'],
    ids=range(18),
)  # fmt: skip
def test_files_of_keys_that_are_wrong_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(InvalidOption):
        read_keys(path)
