"""What the server answers, over real connections: edits, documents, models, and the figures of both."""

from __future__ import annotations

import base64
import time
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from retouch import picture
from retouch.engine.worker import Options, Worker
from retouch.serve import schema, uploads
from retouch.serve.settings import Settings
from serving import Painter, Serving, alpha_mask, area, data_url, decoded, encoded, made, photo, usage_of, white_mask

PHOTO, MASK = photo(), area()
IMAGE, HOLE = encoded(PHOTO), alpha_mask(MASK)


def asked(server: Serving) -> Any:
    return server.worker.asked[-1].edit


def as_json(server: Serving, path: str = "/v1/images/edits", **body: Any) -> Any:
    return server.post(path, json={"prompt": "a red apple", **body})


# Edits


@pytest.mark.parametrize("kind", ["png", "webp"])
@pytest.mark.parametrize(("mode", "save"), [("alpha", alpha_mask), ("white", white_mask)])
def test_outside_the_mask_the_picture_is_the_very_same(server: Serving, kind: str, mode: str, save: Any) -> None:
    image = made(server.edit(IMAGE, save(MASK), mask_mode=mode, output_format=kind, seed=7))
    assert np.array_equal(image[~MASK], PHOTO[~MASK])
    assert (image[MASK] == (7, 9, 200)).all()
    assert np.array_equal(asked(server).mask, MASK)
    assert np.array_equal(asked(server).image, PHOTO)


def test_alpha_is_kept(server: Serving) -> None:
    pixels = photo(channels=4)
    image = made(server.edit(encoded(pixels), HOLE))
    assert np.array_equal(image[~MASK], pixels[~MASK])
    assert np.array_equal(image[..., 3], pixels[..., 3])


def test_an_answer_has_the_shape_that_openapi_says(server: Serving) -> None:
    answer = server.edit(IMAGE, HOLE, n=2, seed=1).json()
    assert set(answer) == set(schema.Images.model_fields)
    assert all(set(one) == set(schema.MadeImage.model_fields) for one in answer["data"])
    schema.Images.model_validate(answer, strict=True)
    assert (answer["size"], answer["quality"], answer["output_format"]) == ("64x48", "auto", "png")
    assert abs(answer["created"] - time.time()) < 60


def test_what_an_edit_cost_is_in_its_usage(server: Serving) -> None:
    answer = server.edit(IMAGE, HOLE, n=2).json()
    cost = usage_of(asked(server))
    usage = answer["usage"]
    assert usage["output_tokens"] == 2 * cost.tokens_computed
    assert usage["input_tokens"] == 2 * (64 * 48 // 256 + 7) == sum(usage["input_tokens_details"].values())
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["retouch"]["seconds"] == {"document": 1.0, "step": 0.5}
    assert usage["retouch"]["tokens_saved"] == 2 * cost.tokens_saved
    assert usage["retouch"]["cache_hits"] == ["prompt", "prompt"]
    assert usage["retouch"]["dollars"] == pytest.approx(2 * 0.75 * 3.6 / 3600)
    assert answer["data"][0]["usage"]["retouch"]["dollars"] == pytest.approx(0.75 * 3.6 / 3600)


def test_an_edit_as_json(server: Serving) -> None:
    image = made(as_json(server, images=[{"image_url": data_url(IMAGE)}], mask={"image_url": data_url(HOLE)}, seed=3))
    assert np.array_equal(image[~MASK], PHOTO[~MASK])
    assert (image[MASK] == (3, 9, 200)).all()


def test_plain_base64_is_a_picture_too(server: Serving) -> None:
    bare = data_url(IMAGE).partition(",")[2]
    assert made(as_json(server, images=[{"image_url": bare}])).shape == PHOTO.shape
    assert asked(server).mask is None


def test_further_images_are_looked_at(server: Serving) -> None:
    others = [photo(30, 20, seed=1), photo(16, 16, seed=2)]
    assert made(server.edit([IMAGE, *map(encoded, others)], HOLE)).shape == PHOTO.shape  # type: ignore[arg-type]
    assert [np.array_equal(a, b) for a, b in zip(asked(server).references, others, strict=True)] == [True, True]
    as_json(server, images=[{"image_url": data_url(encoded(one))} for one in (PHOTO, *others)])
    assert len(asked(server).references) == 2


def test_variations_count_their_seeds_up(server: Serving) -> None:
    answer = server.edit(IMAGE, HOLE, n=10, seed=250)
    assert [one["seed"] for one in answer.json()["data"]] == list(range(250, 260))
    assert [made(answer, i)[MASK][0, 0] for i in range(10)] == [seed % 256 for seed in range(250, 260)]


def test_a_seed_that_is_left_out_is_drawn(server: Serving) -> None:
    seeds = [server.edit(IMAGE, HOLE).json()["data"][0]["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1]
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_options_reach_the_worker(server: Serving) -> None:
    options = {
        "priority": -3,
        "deadline_ms": 60_000,
        "guidance_scale": 2.5,
        "use_cache": False,
        "seed": 2**62 - 1,
        "user": "x",
        "negative_prompt": "a hat",
    }
    assert server.edit(IMAGE, HOLE, **options).status_code == 200
    edit = asked(server)
    assert (edit.priority, edit.guidance, edit.reuse, edit.seed) == (-3, 2.5, False, 2**62 - 1)
    assert 30 < edit.deadline < 60, "what is left of it"
    assert edit.negative == "a hat"
    assert edit.prompt == "a red apple"
    server.edit(IMAGE, HOLE)
    edit = asked(server)
    assert (edit.priority, edit.deadline, edit.guidance, edit.reuse, edit.steps) == (0, None, None, True, None)


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"quality": "low"}, 2), ({"quality": "medium"}, None), ({"quality": "auto"}, None), ({"quality": "high"}, 8),
     ({"num_inference_steps": 7}, 7), ({"num_inference_steps": 7, "quality": "auto"}, 7)],
)  # fmt: skip
def test_quality_is_a_number_of_steps(server: Serving, options: dict[str, Any], steps: int | None) -> None:
    assert server.edit(IMAGE, HOLE, **options).status_code == 200
    assert asked(server).steps == steps


def test_jpeg_is_smaller_the_more_it_is_compressed(server: Serving) -> None:
    sizes = []
    for quality in (None, 90, 10):
        answer = server.edit(IMAGE, HOLE, output_format="jpeg", output_compression=quality, seed=5)
        assert made(answer).shape == PHOTO.shape
        sizes.append(len(answer.json()["data"][0]["b64_json"]))
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


def test_the_picture_is_upright_and_keeps_its_profile(server: Serving) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Camera"  # turned; made by
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    turned = encoded(PHOTO, "JPEG", exif=exif, icc_profile=profile, quality=95)
    mask = np.rot90(MASK, 3)
    answer = server.edit(turned, alpha_mask(mask), output_format="webp")
    upright = picture.read(turned)
    assert upright.size == (48, 64)
    assert np.array_equal(made(answer)[~mask], upright.pixels[~mask])
    after = picture.read(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    assert after.icc == profile
    assert after.exif == upright.exif is not None


def test_a_size_that_is_the_pictures_own_may_be_said(server: Serving) -> None:
    assert server.edit(IMAGE, HOLE, size="64x48").status_code == 200
    assert server.edit(IMAGE, HOLE, size="auto").status_code == 200


def test_of_a_large_photo_the_worker_gets_the_crop(server: Serving) -> None:
    """24 megapixels; all that is not in the mask comes back as it was sent."""
    rows, columns = np.mgrid[:4000, :6000]
    pixels = np.stack([columns >> 5, rows >> 4, (columns ^ rows) >> 6], -1).astype(np.uint8)
    mask = area(6000, 4000, (3100, 2000, 3250, 2090))
    image = made(server.edit(encoded(pixels, compress_level=1), white_mask(mask), mask_mode="white", seed=1))
    assert max(asked(server).image.shape) == server.worker.info["max_side"]
    assert asked(server).mask.sum() == mask.sum()
    assert (image[mask] == (1, 9, 200)).all()
    assert np.array_equal(np.where(mask[..., None], pixels, image), pixels)


def test_pictures_from_nothing(server: Serving) -> None:
    answer = as_json(server, "/v1/images/generations", size="96x64", n=2, seed=4, model="retouch-mini")
    assert made(answer, 1).shape == (64, 96, 3)
    assert (made(answer, 1) == (5, 9, 200)).all()
    assert asked(server).blank
    assert answer.json()["size"] == "96x64"
    assert made(as_json(server, "/v1/images/generations")).shape == (512, 512, 3)


# Documents


def test_documents(server: Serving) -> None:
    answer = server.post("/v1/documents", files={"file": ("photo.png", IMAGE)}, data={"purpose": "vision"})
    assert answer.status_code == 201
    document = answer.json()
    assert set(document) == set(schema.DocumentAnswer.model_fields)
    assert (document["width"], document["height"], document["bytes"]) == (64, 48, len(IMAGE))
    path = answer.headers["location"]
    assert path == f"/v1/documents/{document['id']}"
    assert server.get(path).json() == document
    assert server.post("/v1/documents", files={"file": ("again", IMAGE)}).json()["id"] == document["id"]
    content = server.get(f"{path}/content")
    assert content.headers["content-type"] == "image/png"
    assert np.array_equal(decoded(content.content), PHOTO)

    assert np.array_equal(made(server.edit([], HOLE, document=document["id"], seed=1))[~MASK], PHOTO[~MASK])  # type: ignore[arg-type]
    by_id = as_json(server, images=[{"file_id": document["id"]}], mask={"image_url": data_url(HOLE)})
    assert np.array_equal(made(by_id)[~MASK], PHOTO[~MASK])
    assert len(asked(server).references) == 0

    assert server.client.delete(path).json() == {"id": document["id"], "object": "document", "deleted": True}
    for gone in (server.get(path), server.get(f"{path}/content"), server.client.delete(path)):
        assert gone.status_code == 404


def test_a_documents_content_is_upright(server: Serving) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    turned = encoded(photo(64, 48), "JPEG", exif=exif)
    document = server.post("/v1/documents", files={"file": ("turned.jpg", turned)}).json()
    assert (document["width"], document["height"]) == (48, 64)
    content = server.get(f"/v1/documents/{document['id']}/content").content
    assert np.array_equal(decoded(content), picture.read(turned).pixels)


def test_uploads_are_there_after_a_restart(tmp_path: Any) -> None:
    settings = Settings(uploads=10_000)
    options = Options(cache=tmp_path)
    with Serving(settings, Painter(options)) as server:
        first, second = (
            server.post("/v1/documents", files={"file": ("x", encoded(photo(seed=i)))}).json()["id"] for i in range(2)
        )  # 9 kB each; where there is a disk, --uploads is no limit
        assert np.array_equal(decoded(server.get(f"/v1/documents/{first}/content").content), photo())
    with Serving(settings, Painter(options)) as server:
        kept = [server.get(f"/v1/documents/{one}").status_code for one in (first, second)]
    assert kept == [200, 200]


def test_an_upload_is_there_whatever_it_is_worth() -> None:
    small, large = (encoded(photo(side, side)) for side in (16, 64))
    with Serving(Settings(uploads=len(large) + 100)) as server:
        first, second = (server.post("/v1/documents", files={"file": data}) for data in (small, large))
        assert (first.status_code, second.status_code) == (201, 201)
        assert server.get(f"/v1/documents/{second.json()['id']}").status_code == 200
        assert server.get(f"/v1/documents/{first.json()['id']}").status_code == 404


def test_an_upload_that_finds_no_place_is_refused(tmp_path: Path) -> None:
    """One that the disk has no room for, one that is larger than all of them may be, one that a full disk does not take."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "uploads").write_text("no folder")
    for folder, disk, status, code in (
        (tmp_path, len(IMAGE) - 1, 400, "invalid_image"), (tmp_path, len(IMAGE) + 1, 507, "not_kept"),
        (tmp_path / "full", 1 << 20, 507, "not_kept"),
    ):  # fmt: skip
        with Serving(worker=Painter(Options(cache=folder, disk=disk))) as server:
            answer = server.post("/v1/documents", files={"file": IMAGE})
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            assert not len(server.service.uploads.decoded)


def test_a_documents_size_is_told_without_its_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    with Serving(worker=Painter(Options(cache=tmp_path))) as server:
        document = server.post("/v1/documents", files={"file": encoded(photo(64, 48), exif=exif)}).json()
    with Serving(worker=Painter(Options(cache=tmp_path))) as server:
        monkeypatch.setattr(picture, "read", lambda *_: pytest.fail("its pixels are unfolded"))
        assert server.get(f"/v1/documents/{document['id']}").json() == document
        assert (document["width"], document["height"]) == (48, 64)
        assert server.client.delete(f"/v1/documents/{document['id']}").status_code == 200


def test_uploads_of_an_older_version_are_read() -> None:
    old = (3).to_bytes(4, "little") + (99).to_bytes(8, "little") + b"ann" + IMAGE
    upload = uploads.load(old)
    assert (upload.data, upload.tenant, upload.created, upload.size) == (IMAGE, "ann", 99, (64, 48))
    again = uploads.load(uploads.dump(upload))
    assert (again.data, again.tenant, again.created, again.size) == (IMAGE, "ann", 99, (64, 48))


# Models, health, books


def test_models(server: Serving) -> None:
    (model,) = server.get("/v1/models").json()["data"]
    assert model == server.get("/v1/models/retouch-mini").json()
    assert model["id"] == "retouch-mini"
    assert model["retouch"] == server.worker.info


def test_health(held: Serving) -> None:
    assert held.get("/healthz").text == "ok"
    assert held.get("/readyz").text == "ready"
    held.worker.ready = False
    starting = held.get("/readyz")
    assert (starting.status_code, starting.json()["error"]["code"]) == (503, "draining")
    assert int(starting.headers["retry-after"]) > 0
    assert held.get("/v2/health/ready").status_code == 503
    assert held.get("/v2/health/live").status_code == 200
    assert held.get("/healthz").status_code == 200


def test_stats_and_metrics_are_the_same_figures() -> None:
    with Serving(Settings(price=3.6)) as server:
        server.edit(IMAGE, HOLE, n=3)
        server.edit(IMAGE, HOLE, n="x")
        server.idle()
        stats = server.get("/v1/stats").json()
        text = server.get("/metrics").text
        schema.Stats.model_validate(stats)
        server.worker.stats = {
            "queue": {"waiting": 1, "running": 2, "limit": 3},
            "step": {"seconds": 0.5, "tokens": 10, "edits": 2, "budget": 20},
            "caches": {"documents": {
                "hits": {"device": 5}, "misses": 1, "joined": 0, "lost": 0, "evicted": {"device": 0}, "bytes": {"device": 9},
                "budget": {"device": 10}, "saved_seconds": 1.5, "entries": 2,
            }},
        }  # fmt: skip
        later, with_caches = server.get("/v1/stats").json(), server.get("/metrics").text
    assert stats["edits"] == {"succeeded": 3, "failed": 0, "cancelled": 0, "rejected": 1}
    assert stats["dollars"] == pytest.approx(3 * 0.75 / 1000)
    assert stats["dollars_per_million_edits"] == pytest.approx(750)
    assert stats["latency"]["n"] == 1
    assert 'retouch_edits_total{status="succeeded"} 3.0' in text
    assert 'retouch_rejected_total{code="bad_request"} 1.0' in text
    assert 'retouch_stage_seconds_sum{stage="step"} 0.75' in text
    assert 'retouch_dollars_total{tenant=""} 0.00225' in text
    assert later["caches"]["documents"] == server.worker.stats["caches"]["documents"]
    schema.Stats.model_validate(later)
    assert 'retouch_cache_hits_total{cache="documents",tier="device"} 5.0' in with_caches
    assert "retouch_step_occupancy 0.5" in with_caches


def test_the_openapi_document_is_served(server: Serving) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    assert {"/v1/images/edits", "/v1/jobs/{job}/events", "/v1/documents", "/v2/models/{model}/infer", "/metrics"} <= set(paths)
    assert "HTTPValidationError" not in str(paths), "what is wrong with a request is a 400"


def test_the_painter_has_all_that_the_serve_room_asks_of_a_worker() -> None:
    worker, fake = Worker(Options()), Painter()
    fake.close()
    names = ("options", "info", "stats", "ready", "waiting", "restarts", "submit", "close")
    assert all(hasattr(worker, name) and hasattr(fake, name) for name in names)
    assert fake.options == worker.options
    assert [*signature(fake.submit).parameters] == [*signature(worker.submit).parameters]
