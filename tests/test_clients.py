"""The whole house with the bundled weights: `retouch serve` as it is started, and the clients that people have."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from retouch import picture
from serving import alpha_mask, area, decoded, encoded

ROOT = Path(__file__).parent.parent
COMMAND = Path(sys.executable).with_name("retouch")
PHOTO = picture.read(ROOT / "photos" / "astronaut.jpg").pixels[:320, :384]
MASK = area(384, 320, (120, 96, 216, 192))
IMAGE, HOLE = ("photo.png", encoded(PHOTO), "image/png"), ("mask.png", alpha_mask(MASK), "image/png")
PATIENCE = 120.0


def started(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen([COMMAND, "serve", "--port", "0", *options], stdout=subprocess.PIPE, text=True)


def children(process: subprocess.Popen[str]) -> list[int]:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in found.read_text().split()] if found.exists() else []


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def ends(process: subprocess.Popen[str], pids: list[int]) -> None:
    """With all that it has started."""
    process.wait(PATIENCE)
    end = time.monotonic() + PATIENCE
    while any(map(is_running, pids)):
        assert time.monotonic() < end, pids
        time.sleep(0.05)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with started("--price", "0.1") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Retouch serves http://127.0.0.1:"), line
        try:
            yield line.split()[-1]
        finally:
            pids = children(process)
            process.send_signal(signal.SIGTERM)
            ends(process, pids)
        assert process.returncode in (0, -signal.SIGTERM)


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


def only_the_mask_changed(image: np.ndarray) -> bool:
    return np.array_equal(image[~MASK], PHOTO[~MASK]) and not np.array_equal(image[MASK], PHOTO[MASK])


def test_the_stock_openai_client_edits(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    answer = client.images.edit(image=IMAGE, mask=HOLE, prompt="a red apple", model=model, n=2, extra_body={"seed": 7})
    assert answer.data is not None
    images = [decoded(one.b64_json or "") for one in answer.data]
    assert all(map(only_the_mask_changed, images))
    assert not np.array_equal(images[0], images[1])
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens > 0
    cost = answer.usage.to_dict()["retouch"]
    assert isinstance(cost, dict)
    assert 0 < cost["dollars"] < 0.1  # type: ignore[operator]
    assert 0 < cost["tokens_computed"] < cost["tokens_whole"]  # type: ignore[operator]


def test_a_seed_makes_the_same_picture_again(client: openai.OpenAI) -> None:
    first, second = (
        client.images.edit(image=IMAGE, mask=HOLE, prompt="a star", extra_body={"seed": 3, "use_cache": False}).data
        for _ in range(2)
    )
    assert first
    assert second
    assert first[0].b64_json == second[0].b64_json


def test_the_stock_openai_client_streams(client: openai.OpenAI) -> None:
    stream = client.images.edit(image=IMAGE, mask=HOLE, prompt="a blue car", stream=True, partial_images=2)
    told: list[Any] = list(stream)
    assert told[-1].type == "image_edit.completed"
    assert [event.type for event in told[:-1]] == ["image_edit.partial_image"] * (len(told) - 1)
    assert [event.partial_image_index for event in told[:-1]] == list(range(len(told) - 1))
    assert all(np.array_equal(decoded(event.b64_json)[~MASK], PHOTO[~MASK]) for event in told)
    assert only_the_mask_changed(decoded(told[-1].b64_json))


def test_the_stock_openai_client_generates(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a green leaf", size="128x96", n=1)  # type: ignore[call-overload]
    image = decoded(answer.data[0].b64_json)
    assert image.shape == (96, 128, 3)
    assert image.std() > 1


def test_the_stock_openai_client_understands_refusals(client: openai.OpenAI) -> None:
    wrong = ("mask.png", alpha_mask(area(16, 16, (1, 1, 5, 5))), "image/png")
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(image=IMAGE, mask=wrong, prompt="x")
    assert (refused.value.code, refused.value.param) == ("invalid_mask", "mask")
    with pytest.raises(openai.NotFoundError):
        client.images.edit(image=IMAGE, prompt="x", model="gpt-image-1")
    with pytest.raises(openai.APIStatusError) as late:
        client.images.edit(image=IMAGE, prompt="x", extra_body={"deadline_ms": 1, "use_cache": False})
    assert late.value.status_code == 504


def test_tritons_client_edits(url: str) -> None:
    triton = pytest.importorskip("tritonclient.http")
    client = triton.InferenceServerClient(url.removeprefix("http://"), network_timeout=PATIENCE, connection_timeout=PATIENCE)
    try:
        assert client.is_model_ready("retouch-mini")
        inputs = []
        for name, value, kind in (
            ("image", PHOTO, "UINT8"), ("mask", MASK, "BOOL"), ("prompt", np.array([b"a red apple"], object), "BYTES"),
            ("seed", np.array([7], np.int64), "INT64"),
        ):  # fmt: skip
            inputs.append(triton.InferInput(name, value.shape, kind))
            inputs[-1].set_data_from_numpy(np.ascontiguousarray(value))
        result = client.infer("retouch-mini", inputs)
        assert only_the_mask_changed(result.as_numpy("image")[0])
        assert json.loads(result.as_numpy("usage")[0])["retouch"]["tokens_computed"] >= 0
    finally:
        client.close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_edits(url: str, tmp_path: Path) -> None:
    for name, data, _ in (IMAGE, HOLE):
        (tmp_path / name).write_bytes(data)
    fields = ["image=@photo.png", "mask=@mask.png", "prompt=a red apple", "seed=7", "output_format=webp"]
    asked = ["curl", "-sS", "--fail-with-body", *(part for field in fields for part in ("-F", field)), f"{url}/v1/images/edits"]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = json.loads(done.stdout)["data"]
    assert only_the_mask_changed(decoded(base64.b64decode(made["b64_json"])))


def is_loading(pid: int) -> bool:
    """A worker, deaf to the terminal's signals by now."""
    if b"spawn_main" not in Path(f"/proc/{pid}/cmdline").read_bytes():
        return False
    said = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    return bool(int(said["SigIgn"], 16) & 1 << (signal.SIGTERM - 1))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc to look at")
def test_an_interrupt_while_the_model_is_loaded_ends_both_processes() -> None:
    with started() as process:
        end = time.monotonic() + PATIENCE
        while not any(is_loading(pid) for pid in children(process)):
            assert time.monotonic() < end
            time.sleep(0.02)
        pids = children(process)
        process.send_signal(signal.SIGINT)
        ends(process, pids)
    assert process.returncode == 130
