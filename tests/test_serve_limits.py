"""What the server holds at once is bounded, in edits, bytes and pixels, and what is refused is counted once."""

from __future__ import annotations

import gc
import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from retouch.edit import DeadlineTooSoon, ImageTooLarge, InvalidOption, QueueFull
from retouch.engine.worker import Options
from retouch.serve.budget import Budget
from retouch.serve.orders import Order
from retouch.serve.settings import Settings, Tenant
from retouch.serve.tensors import HEADER
from serving import PATIENCE, Painter, Serving, alpha_mask, area, data_url, encoded, form, photo, refused

IMAGE, HOLE = encoded(photo()), alpha_mask(area())
PIXELS = 64 * 48
EDITS, JOBS = "/v1/images/edits", "/v1/jobs"
INFER = "/v2/models/retouch-mini/infer"


def until(so: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not so():
        assert time.monotonic() < end
        time.sleep(0.01)


def gauges(server: Serving) -> dict[str, float]:
    lines = server.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def edits(server: Serving) -> dict[str, int]:
    return dict(server.get("/v1/stats").json()["edits"])


# The budget itself


def test_a_budget_is_never_exceeded_and_all_of_it_comes_back() -> None:
    budget = Budget(10, "pixels")
    first, second = budget.claim(), budget.claim()
    first.take(6)
    with pytest.raises(QueueFull):
        second.take(5)
    with pytest.raises(ImageTooLarge):
        second.take(11)
    with pytest.raises(ImageTooLarge):
        first.take(5)
    second.take(4)
    first.give_back(2)
    second.take(2)
    for _ in range(2):
        first.release()
        second.release()
    assert budget.used == 0


def test_what_is_shared_is_counted_once() -> None:
    budget = Budget(10, "pixels")
    claims = [budget.claim() for _ in range(5)]
    for claim in claims:
        claim.share("a", 7)
        claim.share("a", 7)
    assert budget.used == 7
    with pytest.raises(QueueFull):
        claims[0].budget.claim().share("b", 4)
    with pytest.raises(ImageTooLarge):
        claims[0].take(4)
    claims[0].take(3)
    for claim in claims:
        assert budget.used >= 7
        claim.release()
    assert budget.used == 0


# Bytes of bodies


@pytest.fixture
def narrow() -> Iterator[Serving]:
    """A server that takes bodies of a megabyte, and two megabytes of them at once."""
    with Serving(Settings(body=1_000_000, file=1_000_000, bodies=2_000_000)) as server:
        yield server


def head(length: int) -> bytes:
    return f"POST {EDITS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode()


def status(client: socket.socket) -> int:
    return int(client.recv(65536).split()[1])


def test_bodies_that_come_at_once_are_bounded_in_bytes(narrow: Serving) -> None:
    clients = [narrow.connect() for _ in range(12)]
    most = 0
    for client in clients:
        client.sendall(head(700_000) + b" " * 600_000)
        time.sleep(0.02)
        most = max(most, narrow.service.bodies.used)
    until(lambda: narrow.gate.open == 3)
    assert 1_500_000 < most <= 2_000_000
    assert narrow.service.bodies.used == 3 * 600_000
    assert gauges(narrow)["retouch_body_bytes_held"] == 1_800_000
    assert gauges(narrow)["retouch_body_bytes_budget"] == 2_000_000
    full = narrow.edit(b"x" * 300_000)
    refused(full, 429, "queue_full", None, "bytes of bodies")
    assert narrow.edit(IMAGE, HOLE).status_code == 200  # a small one still finds room
    codes = Counter(status(client) for client in clients[3:])
    assert codes == {429: 9}
    for client in clients:
        client.close()
    narrow.idle()
    assert narrow.service.bodies.used == 0
    assert narrow.edit(IMAGE, HOLE).status_code == 200


def test_bodies_of_no_said_length_are_bounded_as_they_come(narrow: Serving) -> None:
    chunk = b"186A0\r\n" + b" " * 100_000 + b"\r\n"
    start = f"POST {EDITS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    clients = [narrow.connect() for _ in range(4)]
    for client in clients[:2]:
        client.sendall(start + 9 * chunk)
    until(lambda: narrow.service.bodies.used == 1_800_000)
    clients[2].sendall(start + 3 * chunk)
    assert status(clients[2]) == 429
    until(lambda: narrow.service.bodies.used == 1_800_000)
    clients[3].sendall(start + 2 * chunk)
    until(lambda: narrow.service.bodies.used == 2_000_000)
    for client in clients:
        client.close()
    narrow.idle()


def test_who_only_says_that_much_will_come_is_in_nobodys_way(narrow: Serving) -> None:
    clients = [narrow.connect() for _ in range(20)]
    for client in clients:
        client.sendall(head(1_000_000))
    until(lambda: narrow.gate.open == 20)
    assert narrow.edit(IMAGE, HOLE).status_code == 200
    for client in clients:
        client.close()


@pytest.mark.parametrize(
    ("path", "kind"), [(EDITS, "form"), (EDITS, "json"), (JOBS, "form"), (JOBS, "json"), (INFER, "json"), (INFER, "binary")]
)
def test_a_body_is_let_go_before_its_edit_is_done(path: str, kind: str) -> None:
    with Serving(worker=Painter(hold=True)) as server:
        body = {"prompt": "x", "images": [{"image_url": data_url(IMAGE)}]}
        more: dict[str, Any] = {"json": body} if kind == "json" else form(IMAGE, HOLE)
        if path == INFER:
            more = inference(kind == "binary")
        answer = meanwhile(server.post, path, **more)
        server.worker.wait(lambda: len(server.worker.asked) == 1)
        assert server.service.bodies.used == 0
        assert server.service.pixels.used == PIXELS * (2 if path == INFER else 1)
        base = server.worker.asked[0].edit.image
        while isinstance(base, np.ndarray):
            base = base.base
        assert base is None, "no view of the body's bytes"
        server.worker.release()
        assert answer.result(PATIENCE).status_code in (200, 202)


def inference(binary: bool) -> dict[str, Any]:
    """Arguments of httpx for an inference of the photo."""
    image = {"name": "image", "datatype": "UINT8", "shape": [48, 64, 3]}
    words = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["x"]}
    if not binary:
        return {"json": {"inputs": [{**image, "data": photo().ravel().tolist()}, words]}}
    image["parameters"] = {"binary_data_size": PIXELS * 3}
    text = json.dumps({"inputs": [image, words]}).encode()
    return {"content": text + photo().tobytes(), "headers": {HEADER: str(len(text))}}


def meanwhile(call: Any, *args: Any, **more: Any) -> Future[Any]:
    result: Future[Any] = Future()
    threading.Thread(target=lambda: result.set_result(call(*args, **more)), daemon=True).start()
    return result


# Pixels in flight


def kept(kind: type) -> int:
    gc.collect()
    return sum(isinstance(one, kind) for one in gc.get_objects())


def test_pictures_in_flight_are_bounded_in_pixels() -> None:
    """A flood of large pictures: as many are held as the budget has room for, and no more are decoded."""
    large, hole = encoded(photo(500, 400)), alpha_mask(area(500, 400))
    before = kept(Order)
    with Serving(Settings(pixels=1_000_000), Painter(hold=True)) as server:
        answers = [server.edit(large, hole, path=JOBS, seed=i) for i in range(10)]
        codes = [answer.status_code for answer in answers]
        assert codes.count(202) == 4  # 0.2 million each; the fifth has no room for its mask
        refused(answers[-1], 429, "queue_full", None, "pixels of pictures")
        assert kept(Order) - before == 4
        assert server.service.pixels.used == 4 * 200_000
        told = gauges(server)
        assert (told["retouch_pixels_held"], told["retouch_pixels_budget"]) == (800_000, 1_000_000)
        assert server.edit(IMAGE, HOLE, path=JOBS).status_code == 202
        server.worker.release()
        server.idle()
        assert server.service.pixels.used == 0
        assert server.edit(large, hole).status_code == 200
        assert edits(server) == {"succeeded": 6, "failed": 0, "cancelled": 0, "rejected": 6}


def test_pixels_come_back_whatever_becomes_of_an_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    tenants = (Tenant("ann", "a", concurrency=1),)
    monkeypatch.setattr("retouch.serve.runs.GRACE", 0.1)
    with Serving(Settings(pixels=100_000, tenants=tenants), Painter(Options(queue=3), hold=True)) as server:
        server.client.headers["Authorization"] = "Bearer a"
        job = server.edit(IMAGE, HOLE, path=JOBS).json()["id"]
        assert server.service.pixels.used == PIXELS
        body = {"name": "image", "datatype": "UINT8", "shape": [48, 64, 3], "data": [0] * (PIXELS * 3)}
        words = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["x"]}
        for answer, code in (
            (server.edit(IMAGE, HOLE), 429), (server.edit(IMAGE, b"nothing"), 400), (server.edit([IMAGE, b"nothing"]), 400),
            (server.edit(IMAGE, HOLE, size="1x1"), 400), (server.edit(IMAGE, HOLE, n=4), 400),
            (server.post("/v1/images/generations", json={"prompt": "x", "size": "64x48"}), 429),
            (server.post("/v1/images/generations", json={"prompt": "x", "size": "64x48", "stream": "?"}), 400),
            (server.post("/v1/documents", files={"file": IMAGE}), 201),
            (server.post(INFER, json={"inputs": [body, words]}), 429),
            (server.post(INFER, json={"inputs": [body]}), 400),
        ):  # fmt: skip
            assert answer.status_code == code, answer.text
            assert server.service.pixels.used == PIXELS
        server.client.delete(f"/v1/jobs/{job}")
        until(lambda: not server.service.pixels.used)
        assert server.edit(IMAGE, HOLE, deadline_ms=100).status_code == 504  # given up
        until(lambda: not server.service.pixels.used)


def test_edits_of_one_document_share_its_pixels() -> None:
    with Serving(Settings(pixels=2 * PIXELS), Painter(hold=True)) as server:
        document = server.post("/v1/documents", files={"file": IMAGE}).json()["id"]
        for _ in range(5):
            assert server.edit([], HOLE, path=JOBS, document=document).status_code == 202
        assert server.service.pixels.used == PIXELS
        other = encoded(photo(seed=1))
        assert server.edit(other, path=JOBS).status_code == 202
        refused(server.edit(other), 429, "queue_full")
        server.worker.release()
        server.idle()
        assert server.service.pixels.used == 0


def test_a_documents_content_waits_for_room() -> None:
    other = encoded(photo(seed=1))
    with Serving(Settings(pixels=PIXELS), Painter(hold=True)) as server:
        document = server.post("/v1/documents", files={"file": IMAGE}).json()["id"]
        assert server.edit(other, path=JOBS).status_code == 202
        refused(server.get(f"/v1/documents/{document}/content"), 429, "queue_full", None, "pixels of pictures")
        assert server.get(f"/v1/documents/{document}").status_code == 200
        server.worker.release()
        server.idle()
        assert server.get(f"/v1/documents/{document}/content").status_code == 200
        assert server.service.pixels.used == 0


def test_a_document_in_flight_is_not_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though no decoding is kept: as the picture that is edited, and as one that is looked at."""
    with Serving(worker=Painter(hold=True)) as server:
        monkeypatch.setattr(server.service.uploads.decoded.tiers[0], "budget", 1)
        one, two = (server.post("/v1/documents", files={"file": encoded(photo(seed=i))}).json()["id"] for i in range(2))
        named = {"prompt": "x", "images": [{"file_id": one}, {"file_id": two}]}
        for _ in range(3):
            assert server.post(JOBS, json=named).status_code == 202
        assert server.edit([], HOLE, path=JOBS, document=two).status_code == 202
        server.worker.wait(lambda: len(server.worker.asked) == 4)
        edits = [one.edit for one in server.worker.asked]
        assert len({id(edit.image.base) for edit in edits[:3]}) == 1
        assert len({id(edit.references[0]) for edit in edits[:3]}) == 1
        assert np.shares_memory(edits[3].image, edits[0].references[0])
        del edits
        server.worker.release()
        server.idle()
        server.worker.asked.clear()
        until(lambda: gc.collect() >= 0 and not server.service.uploads.in_flight)


def test_a_picture_that_could_never_be_held_is_too_large() -> None:
    with Serving(Settings(pixels=PIXELS - 1)) as server:
        refused(server.edit(IMAGE), 413, "image_too_large", "image", "pixels of pictures")
        refused(server.post("/v1/documents", files={"file": IMAGE}), 413, "image_too_large", "file")
        refused(server.edit(encoded(photo(48, 48)), alpha_mask(area(48, 48))), 413, "image_too_large", "mask")
        assert server.service.pixels.used == 0


def test_a_picture_is_not_unfolded_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def unfolded(*_: object) -> None:
        raise AssertionError

    with Serving(Settings(pixels=PIXELS - 1)) as server:
        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", unfolded)
        refused(server.edit(IMAGE), 413, "image_too_large", "image")


SMALL = """
from retouch import serve
from retouch.serve.settings import Settings
from serving import Painter
settings = Settings(port=0, body=4_000_000, file=4_000_000, bodies=16_000_000, pixels=10_000_000)
serve.run(settings, Painter(hold=True), serve._listen(settings))
"""


def test_memory_stays_where_the_budgets_say() -> None:
    """A process of its own, at which ten times the bytes and six times the pixels of its budgets are thrown."""
    with subprocess.Popen(
        [sys.executable, "-c", SMALL], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    ) as process:
        try:
            assert process.stdout is not None
            url = httpx.URL(process.stdout.readline().split()[-1])
            warm = encoded(np.zeros((10, 10, 3), np.uint8))
            assert httpx.post(f"{url}{JOBS}", timeout=PATIENCE, **form(warm)).status_code == 202
            before = peak(process.pid)
            clients = [socket.create_connection((url.host, url.port), timeout=PATIENCE) for _ in range(40)]
            for client in clients:
                with suppress(ConnectionError):  # one that is refused is closed while it still sends
                    client.sendall(head(4_000_000) + b" " * 3_900_000)
            assert peak(process.pid) - before < 60e6
            for client in clients:
                client.close()
            large = encoded(np.zeros((1000, 1000, 3), np.uint8))
            with httpx.Client(base_url=url, timeout=PATIENCE, verify=False) as client:
                codes = Counter(client.post(JOBS, **form(large)).status_code for _ in range(60))
            assert codes == {202: 9, 429: 51}  # the first one's hundred pixels are in flight too
            assert peak(process.pid) - before < 110e6
        finally:
            process.kill()


def peak(pid: int) -> float:
    """The most bytes that a process has had in memory."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return float(line.split()[1]) * 1024


def test_budgets_that_are_none_are_refused() -> None:
    for wrong in ({"bodies": 10}, {"pixels": 0}):
        with pytest.raises(InvalidOption, match=f"--{next(iter(wrong))}"):
            Settings(**wrong)


# The queue


@pytest.mark.parametrize("path", [JOBS, EDITS, INFER])
def test_what_the_queue_has_no_room_for_is_refused_at_once(path: str) -> None:
    with Serving(worker=Painter(Options(queue=3), hold=True)) as server:
        assert server.edit(IMAGE, HOLE, path=JOBS, n=2).status_code == 202
        if path == INFER:
            image = {"name": "image", "datatype": "UINT8", "shape": [1, 1, 3], "data": [0] * 3}
            words = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["x"]}
            two = {"name": "n", "datatype": "INT32", "shape": [1], "data": [2]}
            answer = server.post(path, json={"inputs": [image, words, two]})
            assert (answer.status_code, int(answer.headers["retry-after"])) == (429, 1)
        else:
            refused(server.edit(IMAGE, HOLE, path=path, n=2), 429, "queue_full", None, "3 edits may wait")
        assert len(server.worker.asked) == 2  # none of them was begun
        assert edits(server)["rejected"] == 1
        assert server.edit(IMAGE, HOLE, path=JOBS).status_code == 202


def test_more_than_the_queue_could_ever_hold_is_said_to_be() -> None:
    tenants = (Tenant("ann", "a", concurrency=2),)
    with Serving(worker=Painter(Options(queue=3))) as server:
        for path in (EDITS, JOBS):
            refused(server.edit(IMAGE, HOLE, path=path, n=4), 400, "bad_request", "n", "queue holds 3 edits")
        assert server.edit(IMAGE, HOLE, n=3).status_code == 200
    with Serving(Settings(tenants=tenants)) as server:
        answer = server.post(EDITS, headers={"Authorization": "Bearer a"}, **form(IMAGE, HOLE, n=3))
        refused(answer, 400, "invalid_option", None, "more than the 2 of this key")


# Counted once


@pytest.mark.parametrize("path", [EDITS, JOBS, "stream"])
def test_what_the_worker_refuses_is_counted_once(path: str) -> None:
    with Serving() as server:
        for fault in (DeadlineTooSoon("it would take longer."), QueueFull("too many wait."), InvalidOption("no such steps.")):
            server.worker.fault = fault
            if path == JOBS:
                job = server.edit(IMAGE, HOLE, path=JOBS, n=2).json()["id"]
                until(lambda job=job: server.get(f"/v1/jobs/{job}").json()["status"] == "failed")
            else:
                assert server.edit(IMAGE, HOLE, n=2, stream=path == "stream").status_code >= 400
        assert edits(server) == {"succeeded": 0, "failed": 0, "cancelled": 0, "rejected": 3}
        told = gauges(server)
        assert told['retouch_rejected_total{code="deadline_too_soon"}'] == 1
        assert told['retouch_edits_total{status="failed"}'] == 0
        server.worker.fault = ZeroDivisionError("a bug")
        assert server.edit(IMAGE, HOLE).status_code == 500
        assert edits(server)["failed"] == 1
        assert edits(server)["rejected"] == 3


# Large bodies


@pytest.mark.parametrize("path", [EDITS, INFER])
def test_a_large_body_does_not_keep_others_waiting(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its JSON is read in a thread: here it takes until the other answer has come."""
    on_loop, slow, read = [], threading.Event(), json.loads

    def loads(data: Any, **more: Any) -> Any:
        if len(data) > 300_000:
            on_loop.append(threading.current_thread() is server.thread)
            assert slow.wait(PATIENCE)
        return read(data, **more)

    noise = photo(400, 400)
    image = {"name": "image", "datatype": "UINT8", "shape": [400, 400, 3], "data": noise.ravel().tolist()}
    words = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["x"]}
    inference = json.dumps({"inputs": [image, words]})
    body = inference if path == INFER else json.dumps({"prompt": "x", "images": [{"image_url": data_url(encoded(noise))}]})
    with Serving() as server:
        monkeypatch.setattr("retouch.serve.forms.json.loads", loads)
        answer = meanwhile(server.post, path, content=body, headers={"Content-Type": "application/json"})
        until(lambda: bool(on_loop))
        assert server.edit(IMAGE, HOLE).status_code == 200
        slow.set()
        assert answer.result(PATIENCE).status_code == 200
        assert on_loop == [False]
