"""Whatever is sent is answered, as the OpenAPI document says, and never by a 5xx: generated requests, and damaged files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from retouch.serve.settings import Settings
from serving import Serving, alpha_mask, area, data_url, decoded, encoded, form, photo, white_mask

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
PHOTO, MASK = photo(32, 24), area(32, 24, (4, 4, 20, 20))
CLEAR = photo(32, 24, channels=4)
FILES = {
    "png": encoded(PHOTO), "clear png": encoded(CLEAR), "palette png": encoded(PHOTO[..., 0] // 9, "PNG", bits=4),
    "jpeg": encoded(PHOTO, "JPEG", quality=80), "progressive jpeg": encoded(PHOTO, "JPEG", progressive=True),
    "webp": encoded(PHOTO, "WEBP"), "clear webp": encoded(CLEAR, "WEBP", lossless=True), "gif": encoded(PHOTO, "GIF"),
    "tiff": encoded(PHOTO, "TIFF"), "packed tiff": encoded(PHOTO, "TIFF", compression="tiff_lzw"), "bmp": encoded(PHOTO, "BMP"),
    "mask": alpha_mask(MASK), "white mask": white_mask(MASK),
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with Serving(Settings(body=2_000_000, body_seconds=10)) as server:
        yield server
        server.idle()


@pytest.fixture(scope="module")
def api(server: Serving) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


schemathesis.openapi.format("binary", st.sampled_from(list(FILES.values())))


def lifelike(case: Any, known: dict[str, str]) -> None:
    """Half of the cases name what exists, since what is made up at random is refused at once. A deadline that may be met is
    a minute later: else it would be over before the request is read, which is a 504.
    """
    for name, value in known.items():
        if name in (case.path_parameters or {}) and len(str(case.path_parameters[name])) % 2:
            case.path_parameters[name] = value
    body = case.body
    if isinstance(body, dict) and isinstance(body.get("images"), list):
        for image in body["images"]:
            if isinstance(image, dict) and len(image.get("image_url") or "") % 2:
                image["image_url"] = data_url(FILES["png"])
    if isinstance(body, dict) and body.get("model") is not None and len(str(body["model"])) % 2:
        del body["model"]
    schedule = body.get("parameters") if isinstance(body, dict) else None
    for fields, name, minute in ((body, "deadline_ms", 60_000), (schedule, "timeout", 60_000_000)):
        if isinstance(fields, dict) and isinstance(fields.get(name), int | float) and 1 <= fields[name] <= 80_000_000:
            fields[name] += minute


OPERATIONS = {
    "GET": [
        "/healthz", "/readyz", "/metrics", "/v1/stats", "/v1/models", "/v1/models/{name}", "/v1/jobs", "/v1/jobs/{job}",
        "/v1/jobs/{job}/events", "/v1/documents/{document}", "/v1/documents/{document}/content", "/v2", "/v2/health/live",
        "/v2/health/ready", "/v2/models/{model}", "/v2/models/{model}/ready",
    ],
    "POST": [
        "/v1/images/edits", "/v1/images/generations", "/v1/jobs", "/v1/documents", "/v2/models/{model}/infer",
    ],
    "DELETE": ["/v1/jobs/{job}", "/v1/documents/{document}"],
}  # fmt: skip


def test_every_operation_is_tried(api: Any) -> None:
    described = {(method.upper(), path) for path, methods in api.raw_schema["paths"].items() for method in methods}
    assert described == {(method, path) for method, paths in OPERATIONS.items() for path in paths}


@pytest.mark.parametrize(("method", "path"), [(method, path) for method, paths in OPERATIONS.items() for path in paths])
def test_an_operation_answers_as_it_is_described(api: Any, server: Serving, method: str, path: str) -> None:
    operation = api[path][method]
    known = {"name": "retouch-mini", "model": "retouch-mini"}

    def made() -> dict[str, str]:
        if "{job}" in path:
            known["job"] = server.edit(FILES["png"], path="/v1/jobs").json()["id"]
        if "{document}" in path:
            known["document"] = server.post("/v1/documents", files={"file": FILES["png"]}).json()["id"]
        return known

    @settings(max_examples=60 if method == "POST" else 5, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def answers(case: Any) -> None:
        lifelike(case, made())
        case.call_and_validate(checks=CHECKS, timeout=20)

    answers()


# Damaged files


def damaged(data: bytes, damage: list[tuple[str, float, bytes]]) -> bytes:
    """Bytes flipped, cut out and put in at places from 0 to 1 of the file."""
    for how, where, with_ in damage:
        at = int(where * len(data))
        if how == "flip":
            data = data[:at] + bytes(a ^ b for a, b in zip(data[at:], with_, strict=False)) + data[at + len(with_) :]
        elif how == "cut":
            data = data[:at] + data[at + len(with_) :]
        elif how == "put":
            data = data[:at] + with_ + data[at:]
        else:
            data = data[:at]
    return data


DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "flip", "cut", "put", "end"]), st.floats(0, 1), st.binary(min_size=1, max_size=8)
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files_are_edited_or_refused(server: Serving, kind: str) -> None:
    def as_image(data: bytes) -> Any:
        return server.edit(data, output_format="webp")

    def as_mask(data: bytes) -> Any:
        return server.edit(FILES["png"], data, mask_mode="white")

    def as_reference(data: bytes) -> Any:
        images = [{"image_url": data_url(one)} for one in (FILES["png"], data)]
        return server.post("/v1/images/edits", json={"prompt": "x", "images": images})

    def as_document(data: bytes) -> Any:
        return server.post("/v1/documents", files={"file": data})

    seen: Counter[int] = Counter()

    @settings(max_examples=50)
    @given(damage=DAMAGE, send=st.sampled_from([as_image, as_mask, as_reference, as_document]))
    def answers(damage: list[tuple[str, float, bytes]], send: Callable[[bytes], Any]) -> None:
        answer = send(damaged(FILES[kind], damage))
        seen[answer.status_code] += 1
        assert answer.status_code in (200, 201, 400, 413), answer.text
        if answer.status_code == 200:
            decoded(answer.json()["data"][0]["b64_json"])
        if answer.status_code == 201:
            content = server.get(f"/v1/documents/{answer.json()['id']}/content")
            assert content.status_code == 200
            assert decoded(content.content).shape[1::-1] == (answer.json()["width"], answer.json()["height"])

    answers()
    assert seen[400]


@settings(max_examples=100)
@given(damage=DAMAGE, path=st.sampled_from(["/v1/images/edits", "/v1/jobs", "/v1/documents"]))
def test_damaged_forms_are_answered(server: Serving, damage: list[tuple[str, float, bytes]], path: str) -> None:
    request = server.client.build_request("POST", path, **form(FILES["png"], FILES["mask"], n=1, seed=5))
    body = damaged(request.read(), damage)
    answer = server.post(path, content=body, headers={"Content-Type": request.headers["content-type"]})
    assert answer.status_code < 500


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
TENSORS: dict[str, Any] = {
    "id": "x", "outputs": [{"name": "seed"}], "parameters": {"priority": 1, "timeout": 10**7},
    "inputs": [
        {"name": "image", "datatype": "UINT8", "shape": [2, 2, 3], "data": [0] * 12, "parameters": {}},
        {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["x"]},
        {"name": "mask", "datatype": "BOOL", "shape": [2, 2], "data": [[True, False], [False, True]]},
        {"name": "n", "datatype": "INT32", "shape": [1], "data": [1]},
    ],
}  # fmt: skip
EDIT: dict[str, Any] = {
    "prompt": "x", "n": 1, "seed": 5, "images": [{"image_url": data_url(FILES["png"])}],
    "mask": {"image_url": data_url(FILES["mask"])}, "guidance_scale": 1.5, "size": "auto",
}  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a JSON document."""
    if path:
        yield path
    for key, inner in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(inner, (*path, key))


@pytest.mark.parametrize(("path", "body"), [("/v2/models/retouch-mini/infer", TENSORS), ("/v1/images/edits", EDIT)])
def test_json_with_anything_in_any_place_is_answered(server: Serving, path: str, body: dict[str, Any]) -> None:
    @settings(max_examples=150)
    @given(st.sampled_from(list(places(body))), JSON)
    def answers(place: tuple[Any, ...], value: Any) -> None:
        changed = json.loads(json.dumps(body))
        node = changed
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = value
        answer = server.post(path, content=json.dumps(changed), headers={"Content-Type": "application/json"})
        assert answer.status_code < 500, answer.text

    answers()
