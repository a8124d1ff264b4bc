"""`retouch serve --record`: what was asked over HTTP is in the trace, and a replay asks for the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recordings import made_by, recorded, serving, until
from retouch import trace
from retouch.edit import Edit
from retouch.measure import plan
from retouch.measure.pictures import Pictures
from retouch.serve import recorder
from retouch.serve.recorder import _shape_of
from retouch.serve.settings import Recording, Tenant
from retouch.trace import Result, Shape, View, hash_of
from serving import PATIENCE, Painter, alpha_mask, area, data_url, encoded, form, photo, white_mask

MASK = area()
IMAGE, HOLE = encoded(photo()), alpha_mask(MASK)
JOBS = "/v1/jobs"


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
        for name in ("prompt", "seed", "steps", "priority"):
            assert getattr(old.edit, name) == getattr(new, name), name
        assert new.deadline in (None, 90.0), "as it was asked for"
        assert (old.edit.deadline is None) == (new.deadline is None)
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
