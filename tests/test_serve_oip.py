"""The Open Inference Protocol under /v2: JSON and binary tensors, Triton's own client, and every way to be refused."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from retouch.serve import tensors as tensors_module
from retouch.serve.settings import Settings
from retouch.serve.tensors import HEADER
from serving import Serving, area, photo

PHOTO, MASK = photo(), area()
INFER = "/v2/models/retouch-mini/infer"


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with Serving(Settings(price=3.6, body=3_000_000)) as server:
        yield server
        server.idle()


def asked(server: Serving) -> Any:
    return server.worker.asked[-1].edit


def raw(
    server: Serving, body: str | bytes, kind: str = "application/json", path: str = INFER, **headers: Any
) -> httpx.Response:
    return server.post(path, content=body, headers={"Content-Type": kind, **headers})


def tensors(*extra: dict[str, Any], pixels: np.ndarray = PHOTO, **more: Any) -> dict[str, Any]:
    image = {"name": "image", "datatype": "UINT8", "shape": list(pixels.shape), "data": pixels.reshape(-1).tolist()}
    prompt = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a red apple"]}
    return {"inputs": [image, prompt, *extra], **more}


MASK_TENSOR = {"name": "mask", "datatype": "BOOL", "shape": list(MASK.shape), "data": MASK.tolist()}


def test_inference_with_json_tensors(server: Serving) -> None:
    seed = {"name": "seed", "datatype": "INT64", "shape": [1], "data": [2**40 + 5]}
    answer = server.post(INFER, json=tensors(MASK_TENSOR, seed, id="one")).json()
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("retouch-mini", "1", "one")
    image, seeds, usage = answer["outputs"]
    assert [one["name"] for one in answer["outputs"]] == ["image", "seed", "usage"]
    assert image["shape"] == [1, 48, 64, 3]
    pixels = np.array(image["data"], np.uint8).reshape(48, 64, 3)
    assert np.array_equal(pixels[~MASK], PHOTO[~MASK])
    assert (pixels[MASK] == (5, 9, 200)).all()
    assert seeds["data"] == [2**40 + 5]
    assert json.loads(usage["data"][0])["retouch"]["dollars"] > 0


def test_inference_takes_the_parameters_of_the_schedule(server: Serving) -> None:
    assert server.post(INFER, json=tensors(parameters={"priority": 1, "timeout": 5_000_000})).status_code == 200
    assert asked(server).priority == 99
    assert 0 < asked(server).deadline < 5, "what is left of it"
    assert server.post(INFER, json=tensors(parameters={"priority": 2**70})).status_code == 200
    assert (asked(server).priority, asked(server).deadline) == (1, None)


def test_inference_answers_what_is_wanted(server: Serving) -> None:
    answer = server.post(INFER.replace("/infer", "/versions/1/infer"), json=tensors(outputs=[{"name": "seed"}])).json()
    assert [one["name"] for one in answer["outputs"]] == ["seed"]


def test_inference_by_tritonclient(server: Serving) -> None:
    """Triton's own client, with binary tensors both ways."""
    triton = pytest.importorskip("tritonclient.http")
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    try:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("retouch-mini")
        assert client.get_server_metadata()["name"] == "retouch"
        assert [one["name"] for one in client.get_model_metadata("retouch-mini", "1")["outputs"]] == ["image", "seed", "usage"]
        inputs = []
        values = {
            "image": PHOTO, "mask": MASK, "prompt": np.array([b"a cat"], object), "n": np.array([2], np.int32),
            "seed": np.array([30], np.int64), "guidance_scale": np.array([1.5], np.float32),
        }  # fmt: skip
        kinds = {"image": "UINT8", "mask": "BOOL", "prompt": "BYTES", "n": "INT32", "seed": "INT64", "guidance_scale": "FP32"}
        for name, value in values.items():
            inputs.append(triton.InferInput(name, value.shape, kinds[name]))
            inputs[-1].set_data_from_numpy(value)
        result = client.infer("retouch-mini", inputs, request_id="x", priority=3, timeout=9_000_000)
        images = result.as_numpy("image")
        assert images.shape == (2, 48, 64, 3)
        assert np.array_equal(images[1][~MASK], PHOTO[~MASK])
        assert (images[1][MASK] == (31, 9, 200)).all()
        assert result.as_numpy("seed").tolist() == [30, 31]
        assert json.loads(result.as_numpy("usage")[0])["retouch"]["steps"] == 8
        assert (asked(server).guidance, asked(server).prompt, asked(server).priority) == (1.5, "a cat", 97)
        inputs[0] = triton.InferInput("image", (16, 16, 3), "UINT8")
        inputs[0].set_data_from_numpy(photo(16, 16))
        with pytest.raises(triton.InferenceServerException, match="mask is 64 x 48"):
            client.infer("retouch-mini", inputs)
    finally:
        client.close()


def test_pixels_of_answers_are_held_until_they_are_written(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    def written(*args: Any) -> Any:
        held.append(server.service.pixels.used)
        return write(*args)

    write = tensors_module.written
    monkeypatch.setattr(tensors_module, "written", written)
    two = {"name": "n", "datatype": "INT32", "shape": [1], "data": [2]}
    assert server.post(INFER, json=tensors(two)).status_code == 200
    assert held == [2 * 64 * 48]
    server.idle()
    assert server.service.pixels.used == 0


def test_many_numbers_are_answered_as_bytes_only(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retouch.serve.oip.MOST_NUMBERS", 64 * 48 * 3)
    assert server.post(INFER, json=tensors()).status_code == 200
    two = {"name": "n", "datatype": "INT32", "shape": [1], "data": [2]}
    before = len(server.worker.asked)
    for outputs in ({}, {"outputs": [{"name": "image"}]}):
        answer = server.post(INFER, json=tensors(two, **outputs))
        assert answer.status_code == 400
        assert "18,432 numbers" in answer.json()["error"]
        assert "binary_data_output" in answer.json()["error"]
    assert len(server.worker.asked) == before, "it is not edited first"
    assert server.service.pixels.used == 0
    for wanted in (
        {"parameters": {"binary_data_output": True}}, {"outputs": [{"name": "seed"}]},
        {"outputs": [{"name": "image", "parameters": {"binary_data": True}}]},
    ):  # fmt: skip
        assert server.post(INFER, json=tensors(two, **wanted)).status_code == 200


def test_large_answers_in_json_are_written_two_at_a_time(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retouch.serve.oip.SMALL", 100)
    write, most, now = tensors_module.written, [0], [0]

    def written(*args: Any) -> Any:
        now[0] += 1
        most[0] = max(most[0], now[0])
        time.sleep(0.05)
        now[0] -= 1
        return write(*args)

    monkeypatch.setattr(tensors_module, "written", written)
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(server.post, INFER, json=tensors()) for _ in range(6)]
    assert [answer.result().status_code for answer in answers] == [200] * 6
    assert most == [2]


# Refusals


INPUTS: list[Any] = [
    {"name": "image", "datatype": "UINT8", "shape": [2, 2, 3], "data": [0] * 12},
    {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["x"]},
]


def tensor(name: str, datatype: str, data: Any, shape: Any = (1,)) -> dict[str, Any]:
    return {"inputs": [*INPUTS, {"name": name, "datatype": datatype, "shape": list(shape), "data": data}]}


def image(**other: Any) -> dict[str, Any]:
    return {"inputs": [{**INPUTS[0], **other}, INPUTS[1]]}


BAD_TENSORS: list[Any] = [
    {}, [], {"inputs": {}}, {"inputs": []}, {"inputs": [1]}, {"inputs": [{}]}, {"inputs": INPUTS[:1]}, {"inputs": INPUTS[1:]},
    {"inputs": [*INPUTS, INPUTS[0]]}, image(name=[]), image(name="picture"), image(name="\ud800"), image(datatype=None),
    image(datatype=[]), image(datatype="FP32"), image(shape=None), image(shape=[12]), image(shape=[2, 2, 4]), image(shape=[-1]),
    image(shape=[2**30] * 4), image(shape=[1] * 100), image(shape=[True] * 3), image(shape=[2.0, 2.0, 3.0]), image(data=None),
    image(data=[0] * 11), image(data=[256] * 12), image(data=[-1] * 12), image(data=[0.5] * 12), image(data=["0"] * 12),
    image(data=[[0], 0]), image(data=[10**30] * 12), image(data=[None] * 12), image(data=[{}] * 12), image(parameters=[1]),
    image(parameters={"binary_data_size": 12}), image(parameters={"binary_data_size": -1}),
    image(parameters={"binary_data_size": "0"}), tensor("n", "INT32", [2**32 + 1]), tensor("n", "INT32", [0]),
    tensor("n", "INT32", ["1"]), tensor("n", "INT32", [True]), tensor("n", "INT32", [1, 1], [2]),
    tensor("seed", "INT64", [2**63]), tensor("seed", "INT64", [-1]), tensor("guidance_scale", "FP32", [math.inf]),
    tensor("guidance_scale", "FP32", [math.nan]), tensor("guidance_scale", "FP32", ["1"]),
    tensor("num_inference_steps", "INT32", [1000]), tensor("mask", "BOOL", [False] * 4, [2, 2]),
    tensor("mask", "BOOL", [True] * 6, [2, 3]), tensor("mask", "BOOL", ["a"] * 4, [2, 2]),
    tensor("mask", "BOOL", [True] * 4, [4]),
    {"inputs": INPUTS, "outputs": 5}, {"inputs": INPUTS, "outputs": [{"name": "picture"}]},
    {"inputs": INPUTS, "outputs": [{"name": []}]}, {"inputs": INPUTS, "outputs": [{"name": "image", "parameters": [1]}]},
    {"inputs": INPUTS, "parameters": 1}, {"inputs": INPUTS, "parameters": {"priority": -1}}, {"inputs": INPUTS, "id": 5},
    {"inputs": INPUTS, "parameters": {"seed": 5}}, image(parameters={"shared_memory_region": "x"}),
    {"inputs": INPUTS, "outputs": [{"name": "image", "parameters": {"classification": 3}}]},
    {"inputs": INPUTS, "outputs": [{"name": "seed"}] * 2},
    {"inputs": INPUTS, "parameters": {"timeout": 1.5}}, {"inputs": [INPUTS[0], {**INPUTS[1], "data": ["\ud800"]}]},
    {"inputs": [INPUTS[0], {**INPUTS[1], "data": [5]}]}, {"inputs": [INPUTS[0], {**INPUTS[1], "data": [" "]}]},
]  # fmt: skip


@pytest.mark.parametrize("body", BAD_TENSORS, ids=range(len(BAD_TENSORS)))
def test_bad_tensors_are_refused_in_the_protocols_shape(server: Serving, body: Any) -> None:
    answer = raw(server, json.dumps(body), path=INFER)
    assert answer.status_code == 400, answer.text
    assert isinstance(answer.json().pop("error"), str)


def test_bad_binary_tensors_are_refused(server: Serving) -> None:
    pixels, prompt = bytes(12), b"\x01\x00\x00\x00x"
    sizes = [{"binary_data_size": len(pixels)}, {"binary_data_size": len(prompt)}]
    head = json.dumps({"inputs": [{**one, "parameters": size} for one, size in zip(INPUTS, sizes, strict=True)]}).encode()
    whole = head + pixels + prompt

    def sent(body: bytes, length: str | bytes) -> httpx.Response:
        return raw(server, body, "application/octet-stream", INFER, **{HEADER: length})

    assert sent(whole, str(len(head))).status_code == 200
    bad = [(whole, length) for length in ("", "-1", "x", "1e3", "9" * 5000, str(len(whole) + 1), b"\xb2", str(len(head) - 1))]
    bad += [(whole[:-1], str(len(head))), (whole + b"x", str(len(head))), (head, str(len(head)))]
    for text in (b"\x02\x00\x00\x00x", b"\xff\xff\xff\xffx", b"\x01\x00\x00\x00\xff"):
        bad.append((head + pixels + text, str(len(head))))
    for body, length in bad:
        answer = sent(body, length)
        assert (answer.status_code, set(answer.json())) == (400, {"error"}), (length, answer.text)


def test_under_v2_all_refusals_have_the_protocols_shape(server: Serving) -> None:
    for path in ("/v2/nothing", "/v2/models/other", "/v2/models/other/ready", "/v2/models/retouch-mini/versions/2"):
        answer = server.get(path)
        assert (answer.status_code, type(answer.json()["error"])) == (404, str)
    for path in ("/v2/models/other/infer", "/v2/models/retouch-mini/versions/2/infer"):
        assert raw(server, "{}", path=path).status_code == 404
    assert isinstance(raw(server, b"x" * 3_000_001, path=INFER).json()["error"], str)
    compressed = raw(server, "{}", path=INFER, **{"Content-Encoding": "gzip"})
    assert (compressed.status_code, type(compressed.json()["error"])) == (415, str)
    wrong = server.client.delete(INFER)
    assert (wrong.status_code, wrong.json(), wrong.headers["allow"]) == (405, {"error": "Method Not Allowed"}, "POST")


def test_parameters_that_are_unknown_are_refused_by_name(server: Serving) -> None:
    assert "num_steps is not a parameter" in server.post(INFER, json=tensors(parameters={"num_steps": 5})).json()["error"]
    sequence = {"sequence_id": 5, "sequence_start": True, "sequence_end": True, "priority": 1, "binary_data_output": False}
    assert server.post(INFER, json=tensors(parameters=sequence)).status_code == 200
