"""Whatever is wrong with a request is said in words, in OpenAI's shape, with its own status; nothing bad is a 5xx."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from retouch.serve.settings import Settings
from serving import Serving, alpha_mask, area, data_url, encoded, form, photo, refused, white_mask

PHOTO, MASK = photo(), area()
IMAGE, HOLE = encoded(PHOTO), alpha_mask(MASK)
EDITS = "/v1/images/edits"


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with Serving(Settings(body=3_000_000, file=1_000_000)) as server:
        yield server
        assert server.worker.waiting == 0


def raw(
    server: Serving, body: str | bytes, kind: str = "application/json", path: str = EDITS, **headers: str
) -> httpx.Response:
    return server.post(path, content=body, headers={"Content-Type": kind, **headers})


def as_json(server: Serving, **body: Any) -> httpx.Response:
    return raw(server, json.dumps({"prompt": "a cat", "images": [{"image_url": data_url(IMAGE)}], **body}))


# Fields


BAD_FIELDS = {
    "n": [0, 11, -1, "x", "", "1.5", "1e1", "NaN", "9" * 30, "9" * 5000, "0x1", "null", "[1]"],
    "seed": [-1, 2**62, 2**64, "9" * 5000, "1.5", "nan", "seven"],
    "guidance_scale": ["nan", "inf", "-inf", "1e999", -0.1, 100.1, "x", "9" * 400],
    "num_inference_steps": [0, 101, "many"],
    "partial_images": [-1, 4, "x"],
    "priority": [-101, 101, "high"],
    "deadline_ms": [0, -5, 86_400_001, "soon"],
    "size": ["0x0", "64", "64x", "-1x5", "64x48x3", "100000x1", "1024 x 1024"],
    "quality": ["best", ""],
    "background": ["transparent"],
    "output_format": ["gif", "PNG", "jpg"],
    "output_compression": [-1, 101],
    "response_format": ["url"],
    "stream": ["maybe", 2],
    "use_cache": ["sometimes"],
    "mask_mode": ["auto", "black"],
    "input_fidelity": ["low"],
    "document": ["d" * 81],
    "prompt": ["", "x" * 32_001, "x" * 40_000],
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_values_out_of_their_range_are_refused(server: Serving, field: str) -> None:
    before = len(server.worker.asked)
    for value in BAD_FIELDS[field]:
        refused(server.edit(IMAGE, HOLE, **{field: value}), 400, "bad_request", field, field)
    assert len(server.worker.asked) == before


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", "1e999"), ("n", "NaN"), ("n", "1" + "0" * 4000), ("n", "null"), ("n", "[]"), ("n", "{}"), ("n", "1.5"),
     ("seed", "Infinity"), ("seed", "1" + "0" * 4000), ("guidance_scale", "1e999"), ("guidance_scale", "-Infinity"),
     ("guidance_scale", "1" + "0" * 4000), ("guidance_scale", "NaN"), ("prompt", "1"), ("prompt", "null"),
     ("prompt", '"\\ud800"'), ("prompt", '["a"]'), ("stream", "7"), ("deadline_ms", "1e999"), ("images", "{}"),
     ("images.0", "[1]"), ("images.0", '["data:"]'), ("mask", '"data:"'), ("mask.image_url", '{"image_url": 5}')],
)  # fmt: skip
def test_numbers_and_types_of_json_are_refused(server: Serving, field: str, value: str) -> None:
    body = {"prompt": '"a cat"', "images": json.dumps([{"image_url": data_url(IMAGE)}]), field.partition(".")[0]: value}
    text = "{" + ", ".join(f'"{name}": {said}' for name, said in body.items()) + "}"
    refused(raw(server, text), 400, "bad_request", field)


def test_a_number_too_long_to_read_is_no_json(server: Serving) -> None:
    refused(raw(server, '{"prompt": "x", "n": ' + "9" * 5000 + "}"), 400, "bad_request", None, "no JSON")


def test_unknown_fields_are_refused_by_name(server: Serving) -> None:
    refused(server.edit(IMAGE, HOLE, strength=0.5), 400, "bad_request", "strength", "strength is not a field")
    refused(as_json(server, strength=0.5), 400, "bad_request", "strength", "strength is not a field")
    refused(as_json(server, images=[{"url": "x"}]), 400, "bad_request", "images.0.url", "images.0.url is not a field")
    generation = raw(server, '{"prompt": "x", "mask": {}}', path="/v1/images/generations")
    refused(generation, 400, "bad_request", "mask", "mask is not a field")
    files = {"file": ("x", IMAGE), "expires": (None, "5")}
    refused(server.post("/v1/documents", files=files), 400, "bad_request", "expires", "expires is not a field")
    files = {"image": ("x", IMAGE), "second": ("x", IMAGE)}
    refused(server.post(EDITS, files=files, data={"prompt": "x"}), 400, "bad_request", "second")


def test_a_name_that_cannot_be_written_is_refused_all_the_same(server: Serving) -> None:
    for text in ('{"prompt": "x", "\\ud800": 1}', '{"\\ud800": 1, "\\ud800": 2}'):
        answer = raw(server, text)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_request")
    answer = as_json(server, **{"x" * 500_000: 1})
    assert answer.status_code == 400
    assert len(answer.content) < 5000


def test_what_is_given_twice_is_refused(server: Serving) -> None:
    twice = form(IMAGE, HOLE)
    twice["data"]["n"] = ["1", "2"]
    refused(server.post(EDITS, **twice), 400, "bad_request", "n", "n is given twice")
    masks = form(IMAGE, HOLE)
    masks["files"].append(("mask", ("again.png", HOLE)))
    refused(server.post(EDITS, **masks), 400, "bad_request", "mask", "mask is given twice")
    refused(raw(server, '{"prompt": "x", "n": 1, "n": 2}'), 400, "bad_request", "n", "n is given twice")
    inside = '{"prompt": "x", "images": [{"file_id": "a", "file_id": "b"}]}'
    refused(raw(server, inside), 400, "bad_request", "file_id", "file_id is given twice")
    files = [("file", ("a", IMAGE)), ("file", ("b", IMAGE))]
    refused(server.post("/v1/documents", files=files), 400, "bad_request", "file")


def test_fields_that_contradict_each_other_are_refused(server: Serving) -> None:
    refused(server.edit(IMAGE, HOLE, quality="high", num_inference_steps=3), 400, "bad_request", "quality")
    refused(server.edit(IMAGE, HOLE, partial_images=1), 400, "invalid_option", None, "stream")
    refused(server.edit(IMAGE, HOLE, output_compression=50), 400, "invalid_option", None, "output_compression")
    refused(server.edit(IMAGE, HOLE, size="48x64"), 400, "invalid_option", None, "size is 48x64")
    both = [{"image_url": data_url(IMAGE), "file_id": "doc_1"}]
    refused(as_json(server, images=both), 400, "bad_request", "images.0", "one of the two")
    refused(as_json(server, images=[{}]), 400, "bad_request", "images.0", "one of the two")
    refused(as_json(server, mask={"file_id": "doc_1"}), 400, "bad_request", "mask")


@pytest.mark.parametrize("size", ["513x512", "512x8", "99999x99999"])
def test_sizes_that_the_model_does_not_make_are_refused(server: Serving, size: str) -> None:
    answer = raw(server, json.dumps({"prompt": "x", "size": size}), path="/v1/images/generations")
    refused(answer, 400, "bad_request", "size", size)


def test_a_prompt_of_spaces_is_empty(server: Serving) -> None:
    refused(server.edit(IMAGE, HOLE, prompt=" \n\t "), 400, "invalid_prompt", "prompt")


# Bodies


def test_other_kinds_of_bodies_are_refused(server: Serving) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "image/png", "application/jsonx", "multipart/mixed", ""):
        refused(raw(server, "prompt=x", kind), 415, "wrong_content_type")
        refused(raw(server, "prompt=x", kind, "/v1/jobs"), 415, "wrong_content_type")
        refused(raw(server, "prompt=x", kind, "/v1/images/generations"), 415, "wrong_content_type")
        refused(raw(server, "prompt=x", kind, "/v1/documents"), 415, "wrong_content_type")
    refused(server.post(EDITS), 415, "wrong_content_type")
    refused(server.post("/v1/images/generations", **form(None, prompt="x", n=1)), 415, "wrong_content_type")


@pytest.mark.parametrize(
    "body",
    ["", "{", "nonsense", "{'prompt': 'x'}", b"\xff\xfe", b"\x80abc", '{"prompt": "x"} trailing', "[" * 100_000,
     '{"a":' * 100_000, "\x00", "//"],
    ids=range(11),
)  # fmt: skip
def test_broken_json_is_refused(server: Serving, body: str | bytes) -> None:
    refused(raw(server, body), 400, "bad_request", None, "no JSON")
    refused(raw(server, body, path="/v1/images/generations"), 400, "bad_request", None, "no JSON")
    answer = raw(server, body, path="/v2/models/retouch-mini/infer")
    assert (answer.status_code, set(answer.json())) == (400, {"error"})


@pytest.mark.parametrize("body", ["[]", "1", "null", '"x"', "[[[[]]]]", "true"])
def test_json_that_is_no_object_is_refused(server: Serving, body: str) -> None:
    refused(raw(server, body), 400, "bad_request")


def parts(*, end: bytes = b"--B--\r\n") -> bytes:
    """A whole multipart body, the mask last."""
    content = [(b'"prompt"', b"a cat"), (b'"image"; filename="a.png"', IMAGE), (b'"mask"; filename="m.png"', HOLE)]
    return b"".join(b"--B\r\nContent-Disposition: form-data; name=%b\r\n\r\n%b\r\n" % part for part in content) + end


def test_a_form_that_is_cut_off_is_refused(server: Serving) -> None:
    """A mask that was only half there is not left out: that would edit the whole picture."""
    kind, whole = "multipart/form-data; boundary=B", parts()
    assert raw(server, whole, kind).status_code == 200
    assert raw(server, whole.removesuffix(b"\r\n"), kind).status_code == 200
    before = len(server.worker.asked)
    for end in (0, 3, 50, 200, len(whole) - 400, len(whole) - 60, len(whole) - 10, len(whole) - 6, len(whole) - 3):
        refused(raw(server, whole[:end], kind), 400, "bad_request")
        refused(raw(server, whole[:end], kind, "/v1/documents"), 400, "bad_request")
    refused(raw(server, parts(end=b""), kind), 400, "bad_request", None, "closing boundary")
    assert len(server.worker.asked) == before


@pytest.mark.parametrize(
    "kind",
    ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=C",
     "multipart/form-data; boundary=" + "B" * 3000],
)  # fmt: skip
def test_a_boundary_that_is_none_is_refused(server: Serving, kind: str) -> None:
    refused(raw(server, parts(), kind), 400, "bad_request")


@pytest.mark.parametrize("charset", ["bogus", "undefined", "idna", "zlib", "rot13", "utf-16", "utf-7", "punycode", "base64"])
def test_strange_charsets_are_no_server_errors(server: Serving, charset: str) -> None:
    answer = raw(server, parts(), f"multipart/form-data; boundary=B; charset={charset}")
    assert answer.status_code in (200, 400), answer.text


def test_a_part_without_a_name_is_refused(server: Serving) -> None:
    body = b"--B\r\nContent-Disposition: form-data\r\n\r\nx\r\n--B--\r\n"
    refused(raw(server, body, "multipart/form-data; boundary=B"), 400, "bad_request")


def test_too_many_parts_are_refused(server: Serving) -> None:
    refused(server.edit([IMAGE] * 17, HOLE), 400, "bad_request", "image", "17 images")
    refused(server.edit([IMAGE] * 30, HOLE), 400, "bad_request")
    refused(as_json(server, images=[{"image_url": data_url(IMAGE)}] * 17), 400, "bad_request", "images")
    refused(server.edit(IMAGE, HOLE, **{f"field{i}": i for i in range(100)}), 400, "bad_request")
    refused(server.edit(IMAGE, HOLE, prompt="x" * 1_100_000), 400, "bad_request")


def test_bodies_and_files_over_their_limits_are_refused(server: Serving) -> None:
    refused(server.edit(b"x" * 3_000_001), 413, "body_too_large", None, "3 MB")
    refused(server.edit(b"x" * 1_000_001), 413, "image_too_large", "image")
    refused(server.edit(IMAGE, b"x" * 1_000_001), 413, "image_too_large", "mask")
    refused(as_json(server, images=[{"image_url": data_url(b"x" * 1_000_001)}]), 413, "image_too_large", "image")
    refused(server.post("/v1/documents", files={"file": ("x", b"x" * 1_000_001)}), 413, "image_too_large", "file")


def test_a_body_of_no_said_length_over_the_limit_is_refused(server: Serving) -> None:
    chunks = (b"x" * 100_000 for _ in range(50))
    with httpx.Client(base_url=server.url) as client:
        refused(client.post(EDITS, content=chunks, headers={"Content-Type": "application/json"}), 413, "body_too_large")


# Pictures


def png_head(width: int, height: int) -> bytes:
    """A tiny file that says it is huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


NOT_PICTURES = {
    "empty": b"", "text": b"hello", "zeros": bytes(1000), "pdf": b"%PDF-1.7\n", "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "half": IMAGE[: len(IMAGE) // 2], "head": IMAGE[:30], "jpeg half": encoded(PHOTO, "JPEG")[:400],
    "webp half": encoded(PHOTO, "WEBP")[:300], "gif head": encoded(PHOTO, "GIF")[:20], "no data": png_head(64, 48),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_PICTURES)
def test_what_is_no_picture_is_refused(server: Serving, name: str) -> None:
    data = NOT_PICTURES[name]
    refused(server.edit(data, HOLE), 400, "invalid_image", "image")
    refused(server.edit(IMAGE, data), 400, "invalid_image", "mask")
    refused(server.edit([IMAGE, data]), 400, "invalid_image", "image")
    refused(as_json(server, images=[{"image_url": data_url(data)}]), 400, "invalid_image", "image")
    refused(server.post("/v1/documents", files={"file": ("x", data)}), 400, "invalid_image", "file")


@pytest.mark.parametrize("size", [(20_000, 20_000), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs_are_refused_unopened(server: Serving, size: tuple[int, int]) -> None:
    bomb = png_head(*size)
    assert len(bomb) < 200
    refused(server.edit(bomb, HOLE), 413, "image_too_large", "image")
    refused(server.edit(IMAGE, bomb), 413, "image_too_large", "mask")
    refused(server.post("/v1/documents", files={"file": ("x", bomb)}), 413, "image_too_large", "file")


@pytest.mark.parametrize(
    ("mask", "mode", "says"),
    [
        (alpha_mask(area(48, 64)), "alpha", "48 x 64"), (encoded(photo()), "alpha", "no alpha"),
        (alpha_mask(np.zeros((48, 64), bool)), "alpha", "empty"), (white_mask(np.zeros((48, 64), bool)), "white", "empty"),
        (encoded(np.full((48, 64, 4), 1, np.uint8)), "alpha", "empty"), (alpha_mask(area(1, 1)), "white", "1 x 1"),
    ],
)  # fmt: skip
def test_masks_that_are_none_are_refused(server: Serving, mask: bytes, mode: str, says: str) -> None:
    refused(server.edit(IMAGE, mask, mask_mode=mode), 400, "invalid_mask", "mask", says)


def test_a_mask_has_the_size_of_the_picture_as_it_is_seen(server: Serving) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    refused(server.edit(encoded(PHOTO, "JPEG", exif=exif), HOLE), 400, "invalid_mask", "mask", "48 x 64")


def test_a_picture_or_mask_that_is_missing_or_no_file_is_refused(server: Serving) -> None:
    refused(server.edit([], HOLE), 400, "bad_request", "image", "no picture")  # type: ignore[arg-type]
    refused(as_json(server, images=[]), 400, "bad_request", "image", "no picture")
    refused(raw(server, '{"prompt": "x"}'), 400, "bad_request", "image", "no picture")
    refused(server.post(EDITS, data={"prompt": "x", "image": "text"}, files={"mask": HOLE}), 400, "bad_request", "image")
    refused(server.post(EDITS, data={"prompt": "x", "mask": "text"}, files={"image": IMAGE}), 400, "bad_request", "mask")
    refused(server.post(EDITS, files={"image": IMAGE}), 400, "bad_request", "prompt", "missing")
    refused(server.post("/v1/documents", files={"purpose": (None, "x")}), 400, "bad_request", "file")
    refused(server.post("/v1/documents", files={"file": (None, "text")}), 400, "bad_request", "file")


@pytest.mark.parametrize(
    "url",
    ["http://example.com/a.png", "https://example.com/a.png", "file:///etc/passwd", "ftp://x/y", "HTTP://EXAMPLE.COM/a.png",
     "/etc/passwd", "data:image/png,abc", "data:image/png;base64,%%%", "data:image/png;base64,abc", "data:", "ü" * 8, "a b c d",
     "data:image/png;base64,iVBO\nRw0K", "\x00\x00\x00\x00"],
)  # fmt: skip
def test_pictures_are_not_fetched_and_have_to_be_base64(server: Serving, url: str) -> None:
    refused(as_json(server, images=[{"image_url": url}]), 400, "bad_request", "images.0")
    refused(as_json(server, mask={"image_url": url}), 400, "bad_request", "mask")


def test_formats_that_cannot_hold_the_picture_are_refused(server: Serving) -> None:
    wide = encoded(np.zeros((1, 16_400, 3), np.uint8))
    refused(server.edit(wide, output_format="webp"), 400, "invalid_option", None, "16,383")
    assert server.edit(wide, output_format="jpeg").status_code == 200
    refused(server.edit(encoded(photo(channels=4)), output_format="jpeg"), 400, "invalid_option", None, "transparency")
    exif = Image.Exif()
    exif[0x010E] = "x" * 70_000  # a description
    much = encoded(PHOTO, "PNG", exif=exif)
    refused(server.edit(much, output_format="jpeg"), 400, "invalid_option", None, "EXIF")
    assert server.edit(much, output_format="webp").status_code == 200


# What is not there


def test_what_is_not_there(server: Serving) -> None:
    refused(server.get("/v1/documents/doc_1"), 404, "not_found")
    refused(server.get("/v1/documents/doc_1/content"), 404, "not_found")
    refused(server.client.delete("/v1/documents/doc_1"), 404, "not_found")
    refused(server.get("/v1/documents/..%2f..%2fetc%2fpasswd"), 404, "not_found")
    refused(server.get("/v1/jobs/job_1"), 404, "not_found")
    refused(server.get("/v1/jobs/job_1/events"), 404, "not_found")
    refused(server.client.delete("/v1/jobs/job_1"), 404, "not_found")
    refused(server.get("/v1/models/gpt-image-1"), 404, "not_found", None, "retouch-mini")
    refused(server.edit(IMAGE, HOLE, model="gpt-image-1"), 404, "not_found", None, "retouch-mini")
    refused(server.edit([], HOLE, document="../../etc/passwd"), 404, "not_found")  # type: ignore[arg-type]
    refused(as_json(server, images=[{"file_id": "doc_\x00"}]), 404, "not_found")
    refused(server.get("/v1/nothing"), 404, "not_found")
    refused(server.get("/studio/../../../etc/passwd"), 404, "not_found")
    refused(server.get("/studio/%2e%2e/%2e%2e/app.py"), 404, "not_found")


def test_other_methods_are_refused(server: Serving) -> None:
    for path in (EDITS, "/v1/images/generations", "/v1/documents"):
        answer = server.get(path)
        refused(answer, 405, "http_error")
        assert answer.headers["allow"] == "POST"
    refused(server.client.put("/v1/jobs", content=b"{}"), 405, "http_error")
    refused(server.client.patch("/v1/models", content=b"{}"), 405, "http_error")


def test_no_file_of_the_studio_outlives_an_upgrade(server: Serving) -> None:
    page = server.get("/studio/index.html")
    assert (page.status_code, page.headers["cache-control"]) == (200, "no-cache")
    again = server.get("/studio/index.html", headers={"If-None-Match": page.headers["etag"]})
    assert (again.status_code, again.headers["cache-control"]) == (304, "no-cache")
