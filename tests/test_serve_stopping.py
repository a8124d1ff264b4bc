"""Edits that do not come to an end in time, and a server that is told to stop."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from retouch import serve
from retouch.edit import DeadlineTooSoon, InvalidOption
from retouch.serve.settings import Settings
from serving import PATIENCE, Painter, Serving, alpha_mask, area, encoded, events, form, photo

IMAGE, HOLE = encoded(photo()), alpha_mask(area())
EDITS = "/v1/images/edits"
SOON = 0.2
"""In the place of the seconds that a server waits."""


@pytest.fixture
def held() -> Iterator[Serving]:
    with Serving(worker=Painter(hold=True)) as server:
        yield server


def meanwhile(call: Any, *args: Any, **more: Any) -> Future[Any]:
    """Its result, from a thread."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(call(*args, **more))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result


# Deadlines


def test_a_deadline_that_cannot_be_met_is_refused(held: Serving) -> None:
    held.worker.fault = DeadlineTooSoon("it would take about 5.0 s; 0.1 s are given. Allow more, or leave it out.")
    held.worker.release()
    for stream in (False, True):
        refused = held.edit(IMAGE, HOLE, deadline_ms=100, stream=stream)
        assert (refused.status_code, refused.json()["error"]["code"]) == (504, "deadline_too_soon")


def test_a_worker_that_never_answers_is_given_up_after_the_deadline(held: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retouch.serve.runs.GRACE", 0.1)
    late = held.edit(IMAGE, HOLE, deadline_ms=400, n=2)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_passed")
    held.worker.wait(lambda: len(held.worker.cancelled) == 2)
    with held.client.stream("POST", EDITS, **form(IMAGE, HOLE, deadline_ms=700, stream=True)) as response:
        assert response.status_code == 200  # it was begun
        (event,) = events(response.iter_lines())
    assert (event["type"], event["error"]["code"]) == ("error", "deadline_passed")
    job = held.edit(IMAGE, HOLE, path="/v1/jobs", deadline_ms=400).json()["id"]
    with held.client.stream("GET", f"/v1/jobs/{job}/events") as response:
        assert list(events(response.iter_lines()))[-1]["error"]["code"] == "deadline_passed"
    held.idle()


def test_no_edit_may_take_longer_than_the_server_allows() -> None:
    with Serving(Settings(request_seconds=SOON), Painter(hold=True)) as server:
        late = server.edit(IMAGE, HOLE)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_passed")
        server.worker.wait(lambda: len(server.worker.cancelled) == 1)


def test_which_limit_it_was_is_said() -> None:
    with Serving(Settings(request_seconds=SOON), Painter(hold=True)) as server:
        assert "0.2 s that this server (--request-seconds)" in server.edit(IMAGE, HOLE).json()["error"]["message"]
        longer = meanwhile(server.edit, IMAGE, HOLE, deadline_ms=60_000)
        job = server.edit(IMAGE, HOLE, path="/v1/jobs").json()["id"]
        time.sleep(4 * SOON)
        assert not longer.done()
        assert server.get(f"/v1/jobs/{job}").json()["error"] is None
        server.worker.release()
        assert longer.result(PATIENCE).status_code == 200
        with server.client.stream("GET", f"/v1/jobs/{job}/events") as response:
            assert list(events(response.iter_lines()))[-1]["status"] == "succeeded"


def test_a_deadline_that_has_passed_is_said_to_be_the_edits_own(held: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retouch.serve.runs.GRACE", 0.1)
    assert "its own deadline, in 0.4 s" in held.edit(IMAGE, HOLE, deadline_ms=400).json()["error"]["message"]


def test_how_long_a_request_may_take_is_an_option() -> None:
    args = serve._parser().parse_args(["--request-seconds", "5", "--ledger", "none"])
    assert serve._settings(args).request_seconds == 5
    for wrong in ("0", "-1", "nan", "inf"):
        with pytest.raises(InvalidOption, match="--request-seconds"):
            serve._settings(serve._parser().parse_args([f"--request-seconds={wrong}"]))


# Stopping


def test_a_server_that_stops_ends_what_it_has_begun(held: Serving) -> None:
    running = meanwhile(held.edit, IMAGE, HOLE)
    held.worker.wait(lambda: len(held.worker.asked) == 1)
    job = held.edit(IMAGE, HOLE, path="/v1/jobs").json()["id"]
    held.stop()
    for refused in (
        held.edit(IMAGE, HOLE), held.edit(IMAGE, HOLE, path="/v1/jobs"), held.get("/readyz"),
        held.post("/v1/documents", files={"file": IMAGE}), held.post("/v1/images/generations", json={"prompt": "x"}),
    ):  # fmt: skip
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) >= 1
    inference = held.post("/v2/models/retouch-mini/infer", json={})
    assert (inference.status_code, type(inference.json()["error"])) == (503, str)
    assert held.get("/healthz").status_code == 200
    assert held.get(f"/v1/jobs/{job}").status_code == 200  # who has a job may still fetch it
    assert not running.done()
    with held.client.stream("GET", f"/v1/jobs/{job}/events") as response:
        held.worker.release()
        assert list(events(response.iter_lines()))[-1]["status"] == "succeeded"
    assert running.result(PATIENCE).status_code == 200
    held.thread.join(PATIENCE)
    assert held.worker.closed
    with pytest.raises(ConnectionRefusedError):
        held.connect()


def test_what_does_not_end_in_time_is_told_so() -> None:
    with Serving(Settings(drain_seconds=SOON), Painter(hold=True)) as server:
        running = meanwhile(server.edit, IMAGE, HOLE)
        server.worker.wait(lambda: len(server.worker.asked) == 1)
        server.stop()
        stopped = running.result(PATIENCE)
        assert (stopped.status_code, stopped.json()["error"]["code"]) == (503, "draining")
        server.thread.join(PATIENCE)
        assert server.worker.closed
        assert len(server.worker.cancelled) == 1


def test_a_second_interrupt_does_not_wait(held: Serving) -> None:
    running = meanwhile(held.edit, IMAGE, HOLE)
    held.worker.wait(lambda: len(held.worker.asked) == 1)
    for _ in range(2):
        held.server.handle_exit(signal.SIGINT, None)
    held.thread.join(PATIENCE)
    assert not held.thread.is_alive()
    with suppress(httpx.HTTPError):
        assert running.result(PATIENCE).status_code >= 500


@pytest.mark.parametrize("where", ["start", "run"])
def test_whatever_ends_the_server_ends_its_worker(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A process that ignores the terminal's signals, as the worker does, would else keep this one waiting for ever."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    worker = Painter()
    monkeypatch.setattr(worker, "start", interrupted if where == "start" else lambda: None, raising=False)
    monkeypatch.setattr(serve, "Worker", lambda options: worker)
    monkeypatch.setattr(serve, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        serve.main(["--port", "0"])
    assert worker.closed


def test_sigterm_lets_an_edit_end() -> None:
    """A process of its own, and the real signal."""
    script = Path(__file__).parent / "serving.py"
    with subprocess.Popen([sys.executable, script, "1.0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        job = httpx.post(f"{url}/v1/jobs", timeout=PATIENCE, **form(IMAGE, HOLE)).json()["id"]
        with httpx.stream("GET", f"{url}/v1/jobs/{job}/events", timeout=PATIENCE) as response:
            told = events(response.iter_lines())
            assert next(told)["status"] == "running"
            process.send_signal(signal.SIGTERM)
            assert [event["type"] for event in told] == ["image_edit.completed", "job.status"]
        assert process.wait(PATIENCE) in (0, -signal.SIGTERM)
