"""`retouch serve --record`: what was asked over HTTP is in the trace, and a replay asks for the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from retouch import picture, trace
from retouch.edit import Edit, InvalidOption, OutputFailed
from retouch.engine.worker import Options
from retouch.measure import plan
from retouch.measure.pictures import Pictures
from retouch.picture import Picture
from retouch.serve import main, recorder
from retouch.serve.recorder import Recorder, _shape_of
from retouch.serve.settings import Recording, Settings, Tenant
from retouch.trace import InvalidTrace, Request, Result, Shape, View, hash_of
from serving import PATIENCE, Painter, Serving, alpha_mask, area, data_url, decoded, encoded, form, photo, white_mask

MASK = area()
IMAGE, HOLE = encoded(photo()), alpha_mask(MASK)
JOBS = "/v1/jobs"


def serving(recording: Recording, worker: Painter | None = None, **more: Any) -> Serving:
    return Serving(Settings(record=recording, **more), worker)


def made_by(answer: httpx.Response) -> list[bytes]:
    """The files of an answer."""
    import base64

    assert answer.status_code == 200, answer.text
    return [base64.b64decode(one["b64_json"]) for one in answer.json()["data"]]


def until(so: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not so():
        assert time.monotonic() < end
        time.sleep(0.01)


def recorded(path: Path) -> list[Request]:
    return list(trace.read(path).requests)


# There and back


def test_a_recording_replays_as_it_was_asked(tmp_path: Path) -> None:
    """Several clients' edits through HTTP: pictures as files, JSON and by name, results edited on; then all of it again."""
    path, folder = tmp_path / "t.jsonl", tmp_path / "pictures"
    jpeg, wide = encoded(photo(80, 32, seed=1), "JPEG"), encoded(photo(700, 40, seed=2), "WEBP", lossless=True)
    turned = encoded(photo(30, 50, seed=3), "JPEG", exif=_turned())
    stripe = area(700, 40, (300, 5, 340, 9))
    with serving(Recording(path, True, folder)) as server:
        first = made_by(server.edit(IMAGE, HOLE, n=2, seed=5, user="ann", prompt="a red apple"))
        second = made_by(
            server.edit(first[1], white_mask(~MASK), mask_mode="white", user="ann", prompt="größer\n“x”", quality="high")
        )
        made_by(server.edit(jpeg, user="ben", num_inference_steps=3, priority=-7, deadline_ms=90_000))
        document = server.post("/v1/documents", files={"file": wide}).json()["id"]
        by_name = made_by(server.edit([], white_mask(stripe), mask_mode="white", document=document, output_format="webp"))
        body = {"prompt": "on and on", "images": [{"image_url": data_url(by_name[0])}], "seed": 2**62 - 1}
        assert server.post("/v1/images/edits", json=body).status_code == 200
        again = server.post("/v1/documents", files={"file": second[0]}).json()["id"]
        assert server.edit([], HOLE, document=again, user="ann", path=JOBS).status_code == 202
        made_by(server.edit(turned))
        server.idle()
        asked = list(server.worker.asked)
    requests = recorded(path)
    assert [type(request.document) for request in requests] == [View, Result, View, View, Result, Result, View]
    assert [request.session for request in requests] == ["s1", "s1", "s2", "s3", "s3", "s1", "s4"]
    assert [r.document for r in requests if isinstance(r.document, Result)] == [Result(0, 1), Result(3), Result(1)]
    assert {file.name for file in folder.iterdir()} == {
        f"{hash_of(data)}{suffix}" for data, suffix in ((IMAGE, ".png"), (jpeg, ".jpg"), (wide, ".webp"), (turned, ".jpg"))
    }
    pictures = Pictures(folder)
    pictures.check(trace.read(path), path)
    again_ = Painter()
    answers = _replayed(plan.of_trace(trace.read(path), pictures, reuse=True), again_)
    assert len(again_.asked) == len(asked) == 8
    for old, new in zip(asked, answers, strict=True):
        for name in ("prompt", "seed", "steps", "priority", "deadline"):
            assert getattr(old.edit, name) == getattr(new, name), name
    # The server sent the crop of the wide picture; all others whole, and the same pixels.
    whole = [pair for pair in zip(asked, answers, strict=True) if pair[0].edit.image.shape == pair[1].image.shape]
    assert len(whole) == 7
    for old, new in whole:
        assert (old.edit.image == new.image).all()
        assert (old.edit.mask is None and new.mask is None) or (old.edit.mask == new.mask).all()
    (named,) = [request for request in requests if request.mask is not None and request.document == requests[3].document]
    assert named.mask is not None
    assert (named.mask.drawn((700, 40)) == stripe).all()


def _turned() -> Any:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _replayed(planned: plan.Plan, painter: Painter) -> list[Edit]:
    """The edits of a plan, each on its document or on what the painter made before."""
    made: dict[Result, np.ndarray] = {}
    edits: list[Edit] = []
    for call in planned.calls:
        image = planned.documents[call.document] if call.after is None else made[call.after]
        for variation, edit in enumerate(call.edits(image, call.drawn())):
            edits.append(edit)
            made[Result(call.number, variation)] = painter.submit(edit).result(PATIENCE).image
    painter.close()
    return edits


def test_the_http_client_of_load_asks_a_second_server_for_the_same(tmp_path: Path) -> None:
    """The recording of a replay of a recording is that recording, but for the times."""
    import asyncio

    from retouch.measure.endpoint import Endpoint
    from retouch.measure.load import closed_loop

    paths, folders = [tmp_path / f"{i}.jsonl" for i in range(2)], [tmp_path / f"p{i}" for i in range(2)]
    with serving(Recording(paths[0], True, folders[0])) as server:
        first = made_by(server.edit(IMAGE, HOLE, n=2, seed=3))
        made_by(server.edit(first[0], HOLE, prompt="a cat"))
        made_by(server.edit(encoded(photo(seed=9))))

    async def replay(url: str) -> None:
        async with Endpoint(url) as target:
            done = await closed_loop(target, plan.of_trace(trace.read(paths[0]), Pictures(folders[0])), 1)
            assert not [answer.error for answer in done.answers if answer.error]

    with serving(Recording(paths[1], True, folders[1])) as server:
        asyncio.run(replay(server.url))
    one, two = (
        [replace(r, at=0.0, document=None if isinstance(r.document, View) else r.document) for r in recorded(path)]  # type: ignore[arg-type]
        for path in paths
    )
    assert one == two
    pixels = [
        [Pictures(folder).pixels(view) for view in trace.read(path).roots()]
        for path, folder in zip(paths, folders, strict=True)
    ]
    for a, b in zip(*pixels, strict=True):
        assert (a == b).all()


# What is kept, and what is not


def test_without_leave_only_hashes_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with serving(Recording(path)) as server:
        for prompt in ("a secret wish", "another", "a secret wish"):
            assert server.edit(IMAGE, HOLE, prompt=prompt, user="ann@example.com").status_code == 200
    text = path.read_text()
    assert "wish" not in text
    assert "ann" not in text
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o077 == 0
    requests = recorded(path)
    assert {request.document for request in requests} == {View(hash_of(IMAGE), (64, 48))}
    hashes = [request.prompt_hash for request in requests]
    assert hashes[0] == hashes[2] != hashes[1]
    assert hashes[0] != hash_of(b"a secret wish")
    assert requests[0].mask == Shape.of(MASK)
    stand_ins = plan.of_trace(trace.read(path), Pictures(stand_ins=True))
    assert stand_ins.calls[0].prompt == stand_ins.calls[2].prompt


def test_sessions_are_users_or_else_documents_and_never_of_two_tenants(tmp_path: Path) -> None:
    path, other = tmp_path / "t.jsonl", encoded(photo(seed=4))
    keys = {name: {"Authorization": f"Bearer {name}"} for name in ("a", "b")}
    tenants = tuple(Tenant(name, name) for name in keys)
    with serving(Recording(path), tenants=tenants) as server:

        def edit(key: str, image: bytes, **fields: Any) -> bytes:
            return made_by(server.post("/v1/images/edits", headers=keys[key], **form(image, HOLE, **fields)))[0]

        one = edit("a", IMAGE, user="u")  # s1: the user's
        edit("a", other, user="u")
        edit("a", one, user="v")  # s2: another user's, though it edits a result
        edit("a", one)  # s1: nobody says, so it is the result's
        two = edit("a", IMAGE)  # s3: the document's
        edit("a", two)
        edit("b", IMAGE)  # s4: another tenant's
        edit("b", two)  # s5: which cannot know the result
    requests = recorded(path)
    assert [request.session for request in requests] == ["s1", "s1", "s2", "s1", "s3", "s3", "s4", "s5"]
    assert [request.document for request in requests if isinstance(request.document, Result)] == [Result(0), Result(4)]
    assert [request.tenant for request in requests] == ["a"] * 6 + ["b"] * 2


def test_what_a_trace_has_no_words_for_is_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with serving(Recording(path, True)) as server:
        assert server.post("/v1/images/generations", json={"prompt": "x", "size": "64x64"}).status_code == 200
        assert server.edit([IMAGE, IMAGE], HOLE).status_code == 200
        assert server.edit(IMAGE, HOLE, guidance_scale=2.5).status_code == 200
        assert server.edit(IMAGE, b"no mask").status_code == 400
        assert server.edit(IMAGE, HOLE, prompt="kept").status_code == 200
        until(lambda: server.service.recorder.counts["written"] == 1)
        metrics = server.get("/metrics").text
        assert 'retouch_recorded_total{kind="left_out"} 3.0' in metrics
        assert 'retouch_recorded_total{kind="written"} 1.0' in metrics
    assert [request.prompt for request in recorded(path)] == ["kept"]


def test_an_inference_is_recorded_with_a_picture_of_its_tensor(tmp_path: Path) -> None:
    path, folder, pixels = tmp_path / "t.jsonl", tmp_path / "p", photo(20, 16)
    image = {"name": "image", "datatype": "UINT8", "shape": [16, 20, 3], "data": pixels.ravel().tolist()}
    words = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["x"]}
    with serving(Recording(path, True, folder)) as server:
        assert server.post("/v2/models/retouch-mini/infer", json={"inputs": [image, words]}).status_code == 200
    (request,) = recorded(path)
    assert isinstance(request.document, View)
    assert (Pictures(folder).pixels(request.document) == pixels).all()


@pytest.mark.parametrize("seed", range(6))
def test_a_mask_of_a_crop_is_kept_as_the_pictures(seed: int) -> None:
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(1, 40, 2))
    x0, y0 = int(rng.integers(width)), int(rng.integers(height))
    box = (x0, y0, int(rng.integers(x0 + 1, width + 1)), int(rng.integers(y0 + 1, height + 1)))
    for box_ in (box, (0, y0, width, box[3]), (0, 0, width, height)):
        for share in (0.2, 0.9, 1.0):
            mask = np.zeros((height, width), bool)
            inside = rng.random((box_[3] - box_[1], box_[2] - box_[0])) < share
            mask[box_[1] : box_[3], box_[0] : box_[2]] = inside
            assert _shape_of(inside, box_, (width, height)) == Shape.of(mask)


def test_a_mask_that_is_too_fine_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "RUNS", 50)
    with serving(Recording(tmp_path / "t.jsonl")) as server:
        noise = np.random.default_rng(0).random((48, 64)) < 0.5
        assert server.edit(IMAGE, white_mask(noise), mask_mode="white").status_code == 200
        assert server.edit(IMAGE, HOLE).status_code == 200
        until(lambda: server.service.recorder.counts["written"] == 1)
        assert server.service.recorder.counts["left_out"] == 1


# Bad days


def test_a_process_that_is_killed_leaves_a_trace_that_reads(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    script = Path(__file__).parent / "serving.py"
    with subprocess.Popen([sys.executable, script, "0", "20", path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        for seed in range(3):
            assert httpx.post(f"{url}/v1/images/edits", timeout=PATIENCE, **form(IMAGE, HOLE, seed=seed)).status_code == 200
        until(lambda: path.read_bytes().count(b"\n") == 4)
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE)
    assert [request.seed for request in recorded(path)] == [0, 1, 2]
    whole = path.read_bytes()
    for cut in (1, 5, 40):
        path.write_bytes(whole[:-cut])
        assert len(recorded(path)) == (3 if cut == 1 else 2)
    path.write_bytes(whole[:20])
    with pytest.raises(InvalidTrace, match="cut off"):
        trace.read(path)


def test_a_recorder_that_is_behind_drops_and_never_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that stands still holds so many bytes and no more."""
    import threading

    stand = threading.Event()
    known = Recorder._asked
    monkeypatch.setattr(recorder, "HELD", 5 * (len(IMAGE) + 700))
    monkeypatch.setattr(Recorder, "_asked", lambda self, item: (stand.wait(PATIENCE), known(self, item)))
    path = tmp_path / "t.jsonl"
    with serving(Recording(path)) as server:
        for seed in range(12):
            assert server.edit(IMAGE, HOLE, seed=seed).status_code == 200
        counts = server.service.recorder.counts
        assert server.service.recorder._held <= recorder.HELD
        assert 5 <= counts["dropped"] < 12
        assert counts["forgotten"] > 0
        stand.set()
        until(lambda: counts["written"] + counts["dropped"] == 12)
        until(lambda: not server.service.recorder._held)
        assert server.edit(IMAGE, HOLE, seed=99).status_code == 200
    assert [request.seed for request in recorded(path)][-1] == 99


def test_what_is_remembered_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "KNOWN", 2)
    path = tmp_path / "t.jsonl"
    with serving(Recording(path)) as server:
        made = [made_by(server.edit(encoded(photo(seed=i)), HOLE, seed=i))[0] for i in range(4)]
        for one in (made[0], made[3]):
            assert server.edit(one, HOLE).status_code == 200
        until(lambda: server.service.recorder.counts["written"] == 6)
        assert len(server.service.recorder._results) == len(server.service.recorder._sessions) == 2
    assert [type(request.document) for request in recorded(path)][4:] == [View, Result]


def test_a_disk_that_is_full_costs_rows_and_no_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """Takes half of a line."""

        def __init__(self, file: Any) -> None:
            self.file, self.full = file, True

        def write(self, row: bytes) -> int:
            return int(self.file.write(row[: len(row) // 2] if self.full else row))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    path = tmp_path / "t.jsonl"
    with serving(Recording(path)) as server:
        own = server.service.recorder
        own._file = full = Full(own._file)
        assert server.edit(IMAGE, HOLE, seed=1).status_code == 200
        until(lambda: own.counts["dropped"] == 1)
        full.full = False
        assert server.edit(IMAGE, HOLE, seed=2).status_code == 200
    assert [request.seed for request in recorded(path)] == [2]


def test_a_folder_that_cannot_be_written_costs_the_pictures_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, folder = tmp_path / "t.jsonl", tmp_path / "p"
    with serving(Recording(path, True, folder)) as server:
        folder.rmdir()
        folder.write_text("a file now")
        for _ in range(3):
            assert server.edit(IMAGE, HOLE).status_code == 200
    assert {request.document for request in recorded(path)} == {View(hash_of(IMAGE), (64, 48))}
    assert caplog.text.count("cannot be written") == 1


@pytest.mark.parametrize(
    ("recording", "error", "says"),
    [
        (Recording(Path("{}/there")), InvalidOption, "exists already"),
        (Recording(Path("{}/no/t.jsonl")), OutputFailed, "could not be written"),
        (Recording(Path("{}/t.jsonl"), pictures=Path("{}/there/p")), OutputFailed, "could not be written"),
        (Recording(Path("{}/t.jsonl"), pictures=Path("{}/there")), InvalidOption, "exists already"),
    ],
)
def test_where_it_cannot_record_it_says_so(tmp_path: Path, recording: Recording, error: type[Exception], says: str) -> None:
    (tmp_path / "there").write_text("a file")
    folder = recording.pictures
    with pytest.raises(error, match=says):
        Recorder(
            Recording(
                Path(str(recording.file).format(tmp_path)),
                pictures=None if folder is None else Path(str(folder).format(tmp_path)),
            )
        )


@pytest.mark.parametrize("options", [["--record-prompts"], ["--record-pictures", "p"], ["--record", __file__]])
def test_options_that_record_nothing_are_refused(options: list[str]) -> None:
    with pytest.raises(InvalidOption, match="--record"):
        main([*options, "--port", "0"])


def test_cancelled_edits_are_in_it_too(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with serving(Recording(path), Painter(Options(queue=2), hold=True)) as server:
        job = server.edit(IMAGE, HOLE, path=JOBS, n=2).json()["id"]
        assert server.edit(IMAGE, HOLE).status_code == 429  # which is not: it was not taken on
        server.client.delete(f"/v1/jobs/{job}")
        server.idle()
    (request,) = recorded(path)
    assert request.n == 2


def test_pictures_read_back_what_the_server_read(tmp_path: Path) -> None:
    """Every format that the server takes."""
    folder = tmp_path / "p"
    kinds = {"PNG": {}, "JPEG": {}, "WEBP": {}, "GIF": {}, "BMP": {}, "TIFF": {}, "PPM": {}}
    files = [encoded(photo(seed=i), kind, **more) for i, (kind, more) in enumerate(kinds.items())]
    with serving(Recording(tmp_path / "t.jsonl", True, folder)) as server:
        for file in files:
            assert server.edit(file).status_code == 200
    pictures = Pictures(folder)
    views = trace.read(tmp_path / "t.jsonl").roots()
    assert len(views) == len(files)
    for file, view in zip(files, views, strict=True):
        assert isinstance(picture.read(file), Picture)
        assert (pictures.pixels(view) == picture.read(file).pixels).all()
    assert json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])["mix"] == "recorded"
    assert decoded(files[0]).shape == (48, 64, 3)
