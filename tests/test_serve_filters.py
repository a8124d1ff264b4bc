"""Filters beside the model: `retouch serve --filter`, with graphs made on the spot."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest

import test_filter
from retouch import cli, picture
from retouch.edit import CheckpointMismatch, Edit, Edited, InvalidOption, RetouchError, Usage
from retouch.engine import process
from retouch.engine.filters import described, load_filters
from retouch.engine.parcels import Packer
from retouch.engine.worker import Options, Worker
from retouch.ledger import Ledger
from retouch.serve.filters import check_filters
from retouch.serve.settings import Recording, Settings, Tenant
from serving import Asked, Painter, Serving, alpha_mask, area, data_url, decoded, encoded, events, photo, refused
from test_clients import children, ends, started

PHOTO, MASK = photo(), area()
IMAGE, HOLE = encoded(PHOTO), alpha_mask(MASK)
EDITS, DOUBLE, CUT, BLUR = "/v1/images/edits", "double", "cut-out", "blur"
TWICE = PHOTO.repeat(2, 0).repeat(2, 1)
LONG = 120.0


def made(folder: Path) -> tuple[str, ...]:
    """TOMLs of a filter that doubles, one that takes brightness for a mask, and one that blurs in its place."""
    paths = []
    for name, graph, output in (
        (DOUBLE, test_filter.doubled, "scale = 2"),
        (CUT, test_filter.brightness, 'kind = "mask"'),
        (BLUR, test_filter.blurred, ""),
    ):
        own = folder / name
        own.mkdir()
        graph(own / "made.onnx")
        paths.append(test_filter.toml(own, output=output, more=f'name = "{name}"\nabout = "{name} it"'))
    return tuple(paths)


@pytest.fixture(scope="module")
def filters(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return made(tmp_path_factory.mktemp("filters"))


class Filtering(Painter):
    """The painter, which runs the filters for what they are."""

    def __init__(self, options: Options) -> None:
        self.engines = load_filters(options)
        super().__init__(options)
        self.info["filters"] = described(self.engines)

    def _turn(self, one: Asked | None) -> bool:
        if one is None or not one.filter or one.answer.done():
            return super()._turn(one)
        assert one.answer.set_running_or_notify_cancel()
        try:
            one.answer.set_result(self.engines[one.filter].edit([one.edit])[0])
        except RetouchError as error:
            one.answer.set_exception(error)
        return True


@pytest.fixture(scope="module")
def server(filters: tuple[str, ...]) -> Iterator[Serving]:
    with Serving(Settings(price=3.6), Filtering(Options(filters=filters))) as server:
        yield server
        server.idle()


def filtered(server: Serving, name: str, image: bytes = IMAGE, mask: bytes | None = None, **fields: Any) -> dict[str, Any]:
    answer = server.edit(image, mask, model=name, **fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_an_answer_has_the_size_that_the_filter_makes(server: Serving) -> None:
    answer = filtered(server, DOUBLE)
    assert answer["size"] == "128x96"
    assert np.array_equal(decoded(answer["data"][0]["b64_json"]), TWICE)
    retouch = answer["usage"]["retouch"]
    assert retouch["steps"] == 1
    assert retouch["tokens_computed"] == retouch["tokens_whole"] == 64 * 48 // 256
    assert retouch["dollars"] == pytest.approx(sum(retouch["seconds"].values()) / 1000, abs=1e-8)
    for size in ("auto", "128x96"):
        assert filtered(server, DOUBLE, size=size)["size"] == "128x96"
    refused(server.edit(IMAGE, model=DOUBLE, size="64x48"), 400, "invalid_option", None, "makes 128x96 of it")


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_mask_filter_answers_with_alpha(server: Serving, kind: str) -> None:
    image = decoded(filtered(server, CUT, output_format=kind)["data"][0]["b64_json"])
    assert np.array_equal(image[..., :3], PHOTO)
    assert np.abs(image[..., 3] - PHOTO.mean(2)).max() <= 0.51
    clear = photo(channels=4)
    image = decoded(filtered(server, CUT, encoded(clear), output_format=kind)["data"][0]["b64_json"])
    assert np.array_equal(image[..., :3], clear[..., :3])
    assert np.abs(image[..., 3] - clear[..., :3].mean(2) * clear[..., 3] / 255).max() <= 1


def test_a_large_picture_is_filtered_whole(server: Serving) -> None:
    large = photo(1500, 700)
    assert server.worker.info["max_side"] < 1500
    answer = filtered(server, DOUBLE, encoded(large))
    assert np.array_equal(decoded(answer["data"][0]["b64_json"]), large.repeat(2, 0).repeat(2, 1))


def test_a_filter_that_keeps_the_size_keeps_to_a_mask(server: Serving) -> None:
    inside, everywhere = (decoded(filtered(server, BLUR, mask=mask)["data"][0]["b64_json"]) for mask in (HOLE, None))
    assert np.array_equal(inside[~MASK], PHOTO[~MASK])
    assert np.array_equal(inside[MASK], everywhere[MASK])
    for name in (DOUBLE, CUT):
        refused(server.edit(IMAGE, HOLE, model=name), 400, "invalid_option", "mask", "leave the mask out")


def test_any_prompt_and_none_will_do(server: Serving) -> None:
    bare = server.post(EDITS, files={"image": IMAGE}, data={"model": DOUBLE})
    empty = server.post(EDITS, json={"prompt": "", "model": DOUBLE, "images": [{"image_url": data_url(IMAGE)}]})
    for answer in (bare, empty, server.edit(IMAGE, model=DOUBLE, prompt="blur")):
        assert np.array_equal(decoded(answer.json()["data"][0]["b64_json"]), TWICE)
    refused(server.post(EDITS, files={"image": IMAGE}), 400, "bad_request", "prompt", "prompt is missing")
    refused(server.post(EDITS, files={"image": IMAGE}, data={"model": "retouch-mini"}), 400, "bad_request", "prompt")


def test_a_prompt_that_is_a_filters_name_is_a_prompt(server: Serving) -> None:
    answer = server.edit(IMAGE, HOLE, prompt=DOUBLE, seed=5)
    assert answer.json()["size"] == "64x48"
    assert server.worker.asked[-1].filter == ""


UNFIT = {
    "num_inference_steps": 1, "guidance_scale": 2.0, "negative_prompt": "red", "adapters": "ink", "quality": "high", "seed": 3,
    "n": 2, "partial_images": 1,
}  # fmt: skip


@pytest.mark.parametrize("field", UNFIT)
def test_what_says_how_a_model_denoises_is_refused_by_name(server: Serving, field: str) -> None:
    before = len(server.worker.asked)
    for more in ({}, {"stream": True}):
        refused(server.edit(IMAGE, model=BLUR, **{field: UNFIT[field]}, **more), 400, "bad_request", field, field)
    refused(server.edit(IMAGE, path="/v1/jobs", model=BLUR, **{field: UNFIT[field]}), 400, "bad_request", field, BLUR)
    assert len(server.worker.asked) == before


def test_what_a_filter_cannot_do_is_refused_before_it_waits(server: Serving) -> None:
    before = len(server.worker.asked)
    clear = encoded(photo(channels=4))
    refused(server.edit(IMAGE, model=CUT, output_format="jpeg"), 400, "invalid_option", None, "jpeg cannot keep")
    refused(server.edit(clear, model=BLUR, output_format="jpeg"), 400, "invalid_option", None, "jpeg cannot keep")
    refused(server.edit(IMAGE, model=CUT, background="opaque"), 400, "bad_request", "background", "transparent")
    refused(server.edit([IMAGE, IMAGE], model=BLUR), 400, "bad_request", "image", "one picture")
    wide = encoded(np.zeros((1, 9000, 3), np.uint8))
    refused(server.edit(wide, model=DOUBLE, output_format="webp"), 400, "invalid_option", None, "16,383 pixels a side")
    generation = server.post("/v1/images/generations", json={"prompt": "x", "model": DOUBLE})
    refused(generation, 400, "bad_request", "model", "works on a picture")
    for name in ("upscale", "Double", "double/1"):
        refused(server.edit(IMAGE, model=name), 404, "not_found", None, "this server has retouch-mini, double, cut-out, blur")
    assert len(server.worker.asked) == before
    assert decoded(filtered(server, BLUR, output_format="jpeg")["data"][0]["b64_json"]).shape == PHOTO.shape


def test_the_answers_pixels_count(filters: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Tenant("small", "small", pixels=8000), Tenant("large", "large")
    answers = 5 * 64 * 48
    with Serving(Settings(tenants=keys, pixels=answers - 1), Filtering(Options(filters=filters))) as server:
        server.client.headers["Authorization"] = "Bearer small"
        refused(server.edit(IMAGE, model=DOUBLE), 400, "invalid_option", "image", "128 x 96 pixels of it; this key allows")
        filtered(server, BLUR)
        server.client.headers["Authorization"] = "Bearer large"
        refused(
            server.edit(IMAGE, model=DOUBLE),
            413,
            "image_too_large",
            "image",
            "million pixels of pictures",
        )
        server.service.pixels.limit = answers
        filtered(server, DOUBLE)
        monkeypatch.setattr(picture, "MAX_PIXELS", 10_000)
        refused(server.edit(IMAGE, model=DOUBLE), 413, "image_too_large", "image", "megapixels; scale it down")
        server.idle()
        assert server.service.pixels.used == 0


def test_an_uploaded_document_is_filtered(server: Serving) -> None:
    document = server.post("/v1/documents", files={"file": IMAGE}).json()["id"]
    answer = server.post(EDITS, files={"document": (None, document), "model": (None, DOUBLE)})
    assert np.array_equal(decoded(answer.json()["data"][0]["b64_json"]), TWICE)


def test_a_stream_has_the_answer_as_its_one_event(server: Serving) -> None:
    request = {"model": DOUBLE, "stream": True, "images": [{"image_url": data_url(IMAGE)}]}
    with server.client.stream("POST", EDITS, json=request) as answer:
        told = list(events(answer.iter_lines()))
    assert [event["type"] for event in told] == ["image_edit.completed"]
    assert (told[0]["size"], decoded(told[0]["b64_json"]).shape) == ("128x96", (96, 128, 3))


def test_a_job_may_be_a_filters(server: Serving) -> None:
    job = server.edit(IMAGE, path="/v1/jobs", model=CUT).json()
    assert (job["filter"], job["prompt"]) == (CUT, "a red apple")
    with server.client.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
        told = [event["type"] for event in events(answer.iter_lines())]
    assert told[-2:] == ["image_edit.completed", "job.status"]
    done = server.get(f"/v1/jobs/{job['id']}").json()
    assert done["status"] == "succeeded"
    assert decoded(done["result"]["data"][0]["b64_json"]).shape == (48, 64, 4)
    assert server.edit(IMAGE, path="/v1/jobs").json()["filter"] is None


def test_models_are_listed_with_what_they_are(server: Serving) -> None:
    listed = server.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["retouch-mini", DOUBLE, CUT, BLUR]
    assert "filters" not in listed[0]["retouch"]
    assert listed[0]["retouch"]["steps"] == 4
    assert listed[1]["retouch"] == {"type": "filter", "kind": "image", "scale": 2, "about": "double it", "source": ""}
    assert listed[2]["retouch"]["kind"] == "mask"
    assert server.get(f"/v1/models/{CUT}").json() == listed[2]
    refused(server.get("/v1/models/upscale"), 404, "not_found", None, "retouch-mini, double, cut-out, blur")


def test_the_open_inference_protocol_has_filters_too(server: Serving) -> None:
    told = server.get(f"/v2/models/{CUT}").json()
    assert [one["name"] for one in told["inputs"]] == ["image", "mask", "prompt"]
    assert server.get(f"/v2/models/{CUT}/ready").json() == {"ready": True}
    image = {"name": "image", "datatype": "UINT8", "shape": list(PHOTO.shape), "data": PHOTO.reshape(-1).tolist()}
    answer = server.post(f"/v2/models/{CUT}/infer", json={"inputs": [image]}).json()
    [out] = [one for one in answer["outputs"] if one["name"] == "image"]
    assert (answer["model_name"], out["shape"]) == (CUT, [1, 48, 64, 4])
    assert np.array_equal(np.reshape(out["data"], out["shape"])[0, ..., :3], PHOTO)
    steps = {"name": "num_inference_steps", "datatype": "INT32", "shape": [1], "data": [4]}
    wrong = server.post(f"/v2/models/{CUT}/infer", json={"inputs": [image, steps]})
    assert wrong.status_code == 400
    assert "no use for num_inference_steps" in wrong.json()["error"]
    assert server.post("/v2/models/upscale/infer", json={"inputs": [image]}).status_code == 404
    assert "prompt is missing" in server.post("/v2/models/retouch-mini/infer", json={"inputs": [image]}).json()["error"]


def test_filters_are_counted_under_their_own_names(filters: tuple[str, ...], tmp_path: Path) -> None:
    ledger, trace = str(tmp_path / "ledger.sqlite"), tmp_path / "trace.jsonl"
    settings = Settings(price=3.6, ledger=ledger, record=Recording(trace))
    with Serving(settings, Filtering(Options(filters=filters))) as server:
        filtered(server, DOUBLE)
        filtered(server, DOUBLE)
        server.edit(IMAGE, HOLE)
        stats, text = server.get("/v1/stats").json(), server.get("/metrics").text
    assert stats["edits"]["succeeded"] == 1
    double = stats["filters"][DOUBLE]
    assert (double["succeeded"], double["failed"], double["cancelled"]) == (2, 0, 0)
    assert 0 < double["dollars"] == pytest.approx(double["seconds"] / 1000)
    assert stats["dollars"] == pytest.approx(0.00075 + double["dollars"])
    assert stats["dollars_per_million_edits"] == pytest.approx(750)
    assert stats["latency"]["n"] == 1
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['retouch_filtered_total{model="double",status="succeeded"}'] == "2.0"
    assert lines['retouch_edits_total{status="succeeded"}'] == "1.0"
    assert float(lines['retouch_filter_seconds_total{model="double"}']) == pytest.approx(double["seconds"])
    assert float(lines['retouch_dollars_total{tenant=""}']) == pytest.approx(stats["dollars"])
    assert lines['retouch_recorded_total{kind="left_out"}'] == "2.0"
    assert len(trace.read_text().splitlines()) == 2, "its header, and the edit"
    kept = Ledger(ledger)
    try:
        with kept.engine.connect() as rows:
            found = sorted(row[0] for row in rows.exec_driver_sql("SELECT model FROM retouch_edits"))
    finally:
        kept.close()
    assert found == [DOUBLE, DOUBLE, "retouch-mini"]


def test_two_of_one_name_and_what_is_not_there_are_refused_before_the_model_is_loaded(
    filters: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InvalidOption, match="two models would be called 'double'; give"):
        check_filters([filters[0], filters[0]], "retouch-mini")
    with pytest.raises(InvalidOption, match="two models would be called 'blur'"):
        load_filters(Options("somewhere/blur/", filters=filters))
    test_filter.toml(tmp_path)
    absent = (
        (tmp_path / "made.toml").read_text().replace('"made.onnx"', '"a.onnx"\npackage = "absent"\ninstall = "pip install it"')
    )
    (tmp_path / "made.toml").write_text(absent)
    for given, why in (
        (str(tmp_path / "made.toml"), "not installed: pip install it"),
        ("sharpen", "no filter 'sharpen'; give"),
    ):
        assert cli.main(["serve", "--port", "0", "--filter", given]) == 2
        assert why in capsys.readouterr().err


def test_a_filter_that_does_not_fit_its_graph_fails_at_the_start(tmp_path: Path) -> None:
    test_filter.identity(tmp_path / "made.onnx")
    worker = Worker(Options(filters=(test_filter.toml(tmp_path, output='kind = "mask"'),)))
    with pytest.raises(CheckpointMismatch, match="3 channels; of kind mask it has 1"):
        worker.start()


def test_what_only_a_run_shows_is_said_then_and_described(tmp_path: Path) -> None:
    test_filter.identity(tmp_path / "made.onnx")
    wrong = test_filter.toml(tmp_path, output="scale = 2")
    with Serving(worker=Filtering(Options(filters=(wrong,)))) as server:
        refused(server.edit(IMAGE, model="made"), 422, "checkpoint_mismatch", None, "graph makes 1x3x48x64, where")
        paths = server.get("/openapi.json").json()["paths"]
    assert "422" in paths[EDITS]["post"]["responses"]
    assert not any(
        "422" in operation["responses"] for path in ("/v1/models", "/v1/documents") for operation in paths[path].values()
    )


def test_a_filter_and_an_edit_do_not_wait_for_each_other() -> None:
    """Each engine has a thread that ticks: one that hangs in a step holds up the other in neither way."""
    held, done = threading.Event(), threading.Event()
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()

    class Engine:
        results = None

        def __init__(self, hangs: bool) -> None:
            self.hangs, self.inbox = hangs, queue.SimpleQueue[Any]()

        def submit(self, edit: Edit, watch: Any, previews: int, answer: Any) -> None:
            self.inbox.put((edit, answer))

        def wait(self, seconds: float) -> None:
            time.sleep(0.001)

        def tick(self) -> bool:
            if self.inbox.empty():
                return False
            edit, answer = self.inbox.get()
            if self.hangs:
                held.set()
                assert done.wait(LONG)
            answer.set_result(Edited(edit.image, edit.seed, Usage()))
            return True

        def stats(self) -> dict[str, Any]:
            return {"queue": {"waiting": 1, "running": 2, "limit": 9}}

    for hanging in ("", "slow"):
        held.clear()
        done.clear()
        loop = process._Loop(Engine(hanging == ""), SimpleNamespace(), {"slow": Engine(hanging == "slow")})  # type: ignore[arg-type]
        loop.outbox = told
        assert loop._stats()["queue"] == {"waiting": 2, "running": 4, "limit": 9}
        threads = [threading.Thread(target=loop._tick, args=(loop.engine,))]
        threads.append(threading.Thread(target=loop._tick_apart, args=("slow", loop.filters["slow"])))
        packer = Packer()
        for number, filter in enumerate((hanging, "" if hanging else "slow")):
            edit = Edit(PHOTO, "x", seed=number)
            loop._take(number, packer.packed(edit), False, 0, filter)
        for thread in threads:
            thread.start()
        assert held.wait(LONG)
        assert told.get(timeout=LONG)[:2] == ("answer", 1), "the other's, while this one hangs"
        done.set()
        assert told.get(timeout=LONG)[:2] == ("answer", 0)
        loop.closed.set()
        for thread in threads:
            thread.join(LONG)


# The whole house, with the bundled weights.


@pytest.fixture(scope="module")
def house(filters: tuple[str, ...]) -> Iterator[SimpleNamespace]:
    with started("--price", "0.1", *(part for path in filters for part in ("--filter", path))) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Retouch serves http://127.0.0.1:"), line
        url = f"{line.split()[-1]}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=LONG) as client:
            yield SimpleNamespace(process=process, client=client, url=url)
        pids = children(process)
        process.send_signal(signal.SIGTERM)
        ends(process, pids)


def test_the_stock_openai_client_edits_and_filters(house: SimpleNamespace) -> None:
    client = house.client
    assert [model.id for model in client.models.list().data] == ["retouch-mini", DOUBLE, CUT, BLUR]
    image = ("photo.png", IMAGE, "image/png")
    double = client.images.edit(image=image, prompt="larger", model=DOUBLE)
    assert np.array_equal(decoded(double.data[0].b64_json), TWICE)
    assert double.size == "128x96"
    assert double.usage.total_tokens > 0
    cut = client.images.edit(image=image, prompt="-", model=CUT)
    assert decoded(cut.data[0].b64_json).shape == (48, 64, 4)
    again = client.images.edit(image=image, prompt="anything", model=CUT)
    assert again.data[0].b64_json == cut.data[0].b64_json
    assert again.usage.retouch["cache_hits"] == ["result"]
    assert again.usage.retouch["dollars"] == 0
    fresh = client.images.edit(image=image, prompt="-", model=CUT, extra_body={"use_cache": False})
    assert (fresh.data[0].b64_json, fresh.usage.retouch["cache_hits"]) == (cut.data[0].b64_json, [])
    edited = client.images.edit(image=image, mask=("mask.png", HOLE, "image/png"), prompt="a red apple")
    assert np.array_equal(decoded(edited.data[0].b64_json)[~MASK], PHOTO[~MASK])
    with pytest.raises(openai.NotFoundError, match="retouch-mini, double, cut-out, blur"):
        client.images.edit(image=image, prompt="x", model="dall-e-2")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.images.edit(image=image, prompt="x", model=CUT, output_format="jpeg")
    assert wrong.value.code == "invalid_option"


def test_filters_begin_again_where_the_worker_dies(house: SimpleNamespace) -> None:
    """The worker is stopped while the job waits in it, then killed; the next one does it."""
    [pid] = [pid for pid in children(house.process) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(pid, signal.SIGSTOP)
    large = encoded(photo(640, 480, seed=9))
    job = httpx.post(f"{house.url}/jobs", data={"model": DOUBLE}, files={"image": large}, timeout=LONG).json()
    os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + LONG
    while job["status"] in ("queued", "running"):
        assert time.monotonic() < end
        time.sleep(0.05)
        job = httpx.get(f"{house.url}/jobs/{job['id']}").json()
    assert job["status"] == "succeeded", job
    assert decoded(job["result"]["data"][0]["b64_json"]).shape == (960, 1280, 3)
    assert httpx.get(f"{house.url}/stats").json()["restarts"] == 1
