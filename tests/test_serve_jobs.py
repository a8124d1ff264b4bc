"""What becomes of an edit is told while it runs: as a stream of events, or as a job that is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from retouch.edit import DeadlineTooSoon
from retouch.serve import schema
from retouch.serve.settings import Settings
from serving import Painter, Serving, alpha_mask, area, decoded, encoded, events, form, photo

PHOTO, MASK = photo(), area()
IMAGE, HOLE = encoded(PHOTO), alpha_mask(MASK)


# Streams


def streamed(server: Serving, path: str = "/v1/images/edits", **more: Any) -> list[dict[str, Any]]:
    with server.client.stream("POST", path, **more) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return list(events(response.iter_lines()))


def test_a_stream_tells_partial_images_and_then_the_whole(server: Serving) -> None:
    told = streamed(server, **form(IMAGE, HOLE, stream=True, partial_images=3, n=2, seed=6))
    for index in range(2):
        own = [event for event in told if event["index"] == index]
        partial, whole = own[:-1], own[-1]
        assert whole["type"] == "image_edit.completed"
        assert [event["type"] for event in partial] == ["image_edit.partial_image"] * len(partial)
        assert [event["partial_image_index"] for event in partial] == list(range(len(partial)))
        assert whole["seed"] == 6 + index
        assert whole["usage"]["retouch"]["dollars"] > 0
        assert (decoded(whole["b64_json"])[MASK] == (6 + index, 9, 200)).all()
        for event in own:
            assert {"created_at", "size", "quality", "background", "output_format"} <= set(event)
            assert np.array_equal(decoded(event["b64_json"])[~MASK], PHOTO[~MASK])


def test_partial_images_come_while_the_edit_runs_and_in_order(held: Serving) -> None:
    with held.client.stream("POST", "/v1/images/edits", **form(IMAGE, HOLE, stream=True, partial_images=3)) as response:
        told = events(response.iter_lines())
        for index in range(3):
            event = next(told)
            assert (event["type"], event["partial_image_index"]) == ("image_edit.partial_image", index)
            assert (decoded(event["b64_json"])[MASK][:, 1] == index).all()
        held.worker.release()
        assert [event["type"] for event in told] == ["image_edit.completed"]


def test_partial_images_of_large_pictures_are_small(held: Serving) -> None:
    fields = form(encoded(photo(1500, 30)), stream=True, partial_images=1)
    with held.client.stream("POST", "/v1/images/edits", **fields) as response:
        told = events(response.iter_lines())
        event = next(told)
        assert event["size"] == "1024x20"
        assert decoded(event["b64_json"]).shape == (20, 1024, 3)
        held.worker.release()
        assert next(told)["size"] == "1500x30"


def test_a_generations_stream_has_its_own_names(server: Serving) -> None:
    body = {"prompt": "a cat", "stream": True, "partial_images": 1, "size": "32x32"}
    told = streamed(server, "/v1/images/generations", json=body)
    assert {event["type"] for event in told} <= {"image_generation.partial_image", "image_generation.completed"}
    assert told[-1]["type"] == "image_generation.completed"


def test_silence_is_broken_by_comments(held: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retouch.serve.images.HEARTBEAT", 0.05)
    with held.client.stream("POST", "/v1/images/edits", **form(IMAGE, HOLE, stream=True)) as response:
        lines = response.iter_lines()
        assert next(lines).startswith(":")
        held.worker.release()
        assert [event["type"] for event in events(lines)] == ["image_edit.completed"]


# Jobs


def followed(server: Serving, job: str) -> list[dict[str, Any]]:
    with server.client.stream("GET", f"/v1/jobs/{job}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        return list(events(response.iter_lines()))


def test_the_life_of_a_job(held: Serving) -> None:
    answer = held.edit(IMAGE, HOLE, path="/v1/jobs", n=2, seed=8, partial_images=1)
    assert answer.status_code == 202
    job = answer.json()
    path = f"/v1/jobs/{job['id']}"
    assert answer.headers["location"] == path
    assert set(job) == set(schema.Job.model_fields)
    assert (job["n"], job["done"], job["result"], job["error"]) == (2, 0, None, None)
    with held.client.stream("GET", f"{path}/events") as response:
        told = events(response.iter_lines())
        assert next(told)["status"] == "running"
        assert next(told)["type"] == "image_edit.partial_image"
        assert held.get(path).json()["status"] == "running"
        held.worker.release()
        rest = list(told)
    assert [event["type"] for event in rest if event["type"].endswith("completed")] == ["image_edit.completed"] * 2
    assert (rest[-1]["type"], rest[-1]["status"], rest[-1]["done"]) == ("job.status", "succeeded", 2)
    done = held.get(path).json()
    schema.Job.model_validate(done, strict=True)
    assert done["status"] == "succeeded"
    assert [one["seed"] for one in done["result"]["data"]] == [8, 9]
    assert (decoded(done["result"]["data"][1]["b64_json"])[MASK] == (9, 9, 200)).all()
    assert held.client.delete(path).json()["status"] == "succeeded"
    assert held.get(path).status_code == 404


def test_what_is_past_is_told_again(server: Serving) -> None:
    job = server.edit(IMAGE, HOLE, path="/v1/jobs", partial_images=2).json()["id"]
    first = followed(server, job)
    assert followed(server, job) == first
    assert first[-1]["status"] == "succeeded"


def test_a_job_is_cancelled(held: Serving) -> None:
    job = held.edit(IMAGE, HOLE, path="/v1/jobs", n=3).json()["id"]
    held.worker.wait(lambda: len(held.worker.asked) == 3)
    assert held.client.delete(f"/v1/jobs/{job}").json()["status"] == "cancelled"
    held.worker.wait(lambda: len(held.worker.cancelled) == 3)
    assert followed(held, job)[-1]["status"] == "cancelled"
    assert held.get(f"/v1/jobs/{job}").json()["result"] is None
    held.client.delete(f"/v1/jobs/{job}")
    assert held.get(f"/v1/jobs/{job}").status_code == 404
    assert held.get("/v1/stats").json()["edits"]["cancelled"] == 3


def test_a_job_that_fails_says_why(server: Serving) -> None:
    server.worker.fault = DeadlineTooSoon("it would take longer.")
    try:
        job = server.edit(IMAGE, HOLE, path="/v1/jobs").json()["id"]
        *_, error, last = followed(server, job)
    finally:
        server.worker.fault = None
    assert error["error"] == last["error"] == server.get(f"/v1/jobs/{job}").json()["error"]
    assert (error["type"], error["error"]["code"], last["status"]) == ("error", "deadline_too_soon", "failed")


def test_jobs_are_listed_newest_first(server: Serving) -> None:
    made = [server.edit(IMAGE, HOLE, path="/v1/jobs").json()["id"] for _ in range(3)]
    followed(server, made[-1])
    listed = server.get("/v1/jobs").json()
    assert [job["id"] for job in listed["data"][:3]] == made[::-1]
    assert all(job["result"] is None for job in listed["data"])


def test_the_oldest_jobs_go_where_all_are_too_large() -> None:
    with Serving(Settings(finished=12_000)) as server:
        made = []
        for _ in range(4):
            made.append(server.edit(IMAGE, HOLE, path="/v1/jobs").json()["id"])
            followed(server, made[-1])
        kept = [job["id"] for job in server.get("/v1/jobs").json()["data"]]
    assert 0 < len(kept) < 4
    assert kept == made[::-1][: len(kept)]


def test_jobs_that_came_to_nothing_go_too() -> None:
    """They have no pictures, but their prompts may be long."""
    with Serving(Settings(finished=300_000), Painter(hold=True)) as server:
        for _ in range(20):
            job = server.edit(IMAGE, HOLE, path="/v1/jobs", prompt="x" * 30_000).json()["id"]
            server.client.delete(f"/v1/jobs/{job}")
        assert len(server.service.jobs) < 12
