"""The servers that Retouch is compared with: what they share, and the one that the project's own environment can run."""

from __future__ import annotations

import base64
import io
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "bench" / "peers"))

import protocol
import stock
from protocol import Ask, Refused, ask_of, crop_box, paste
from retouch.composite import composite
from retouch.edit import Edit
from retouch.engine import load
from retouch.models import checkpoint, peer

PEERS = Path(__file__).parent.parent / "bench" / "peers"
MODEL = checkpoint.find("retouch-mini")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def document(side: int = 128) -> np.ndarray:
    photo = Image.open(PEERS.parent.parent / "photos" / "astronaut.jpg")
    return np.array(photo.convert("RGB").resize((side, side)))


def box_mask(side: int = 128, box: tuple[int, int, int, int] = (40, 48, 80, 100)) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def alpha(mask: np.ndarray) -> np.ndarray:
    pixels = np.full((*mask.shape, 4), 255, np.uint8)
    pixels[mask, 3] = 0
    return pixels


def test_a_request_is_read_as_it_was_meant():
    fields = {"prompt": "a cat", "n": "3", "seed": "7", "num_inference_steps": "2", "response_format": "b64_json"}
    ask = ask_of(fields, {"image": png(document()), "mask": png(alpha(box_mask()))})
    assert (ask.prompt, ask.n, ask.seed, ask.steps) == ("a cat", 3, 7, 2)
    assert (ask.image == document()).all()
    assert (ask.mask == box_mask()).all()
    bare = ask_of({"prompt": "a cat"}, {"image": png(document())})
    assert (bare.n, bare.seed, bare.steps) == (1, 0, None)
    assert bare.mask.all()


@pytest.mark.parametrize(
    ("fields", "files", "param"),
    [
        ({}, {}, "prompt"),
        ({}, {"image": b"no picture"}, "image"),
        ({}, {"image": png(document(100))}, "image"),
        ({}, {"mask": png(alpha(box_mask(64)))}, "mask"),
        ({}, {"mask": png(alpha(box_mask() & False))}, "mask"),
        ({}, {"mask": png(document())}, "mask"),
        ({"n": "0"}, {}, "n"),
        ({"n": "many"}, {}, "n"),
        ({"seed": "-1"}, {}, "seed"),
        ({"num_inference_steps": "1000"}, {}, "num_inference_steps"),
        ({"size": "64x64"}, {}, "size"),
        ({"response_format": "url"}, {}, "response_format"),
        ({"stream": "true"}, {}, "stream"),
    ],
)
def test_what_is_wrong_is_refused_and_named(fields, files, param):
    whole = {} if param == "prompt" else {"prompt": "a cat"}
    with pytest.raises(Refused) as caught:
        ask_of({**whole, **fields}, {"image": png(document()), "mask": png(alpha(box_mask())), **files})
    assert caught.value.param == param
    assert caught.value.body()["error"]["param"] == param


def test_crops_hold_the_mask_and_its_padding_in_whole_cells():
    rng = np.random.default_rng(0)
    for _ in range(200):
        width, height = (int(side) * 16 for side in rng.integers(4, 33, 2))
        mask = np.zeros((height, width), bool)
        x, y = int(rng.integers(width)), int(rng.integers(height))
        mask[y : y + int(rng.integers(1, height)), x : x + int(rng.integers(1, width))] = True
        tight = protocol.bounds(mask)
        for sides in ((), stock.CROP_SIDES):
            x0, y0, x1, y1 = crop_box(mask, sides=sides)
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height
            assert (x1 - x0) % 16 == (y1 - y0) % 16 == 0
            assert x0 <= max(tight[0] - 32, 0)
            assert y0 <= max(tight[1] - 32, 0)
            assert x1 >= min(tight[2] + 32, width)
            assert y1 >= min(tight[3] + 32, height)
            if sides:
                assert x1 - x0 in (*sides, width)
                assert y1 - y0 in (*sides, height)
            else:
                assert x1 - x0 < tight[2] - tight[0] + 64 + 16


@pytest.mark.parametrize("feather", [0, 4])
def test_the_paste_is_retouchs_own(feather):
    rng = np.random.default_rng(1)
    original, edited = (rng.integers(0, 256, (64, 80, 3), dtype=np.uint8) for _ in range(2))
    blobs = np.array(Image.fromarray(rng.integers(0, 256, (6, 7), dtype=np.uint8)).resize((80, 64))) > 150
    thin = np.zeros((64, 80), bool)
    thin[:, 30:33] = thin[0:2] = True
    for mask in (blobs, thin, np.ones((64, 80), bool)):
        whole = (0, 0, 80, 64)
        result = paste(original, edited, mask, whole, feather)
        assert (result == composite(original, edited, mask, whole, feather)).all()
        assert (result[~mask] == original[~mask]).all()
        box = crop_box(mask, 0)
        cut = edited[box[1] : box[3], box[0] : box[2]]
        assert (paste(original, cut, mask, box, feather) == result).all()


@pytest.fixture(scope="module")
def retouch_peer():
    torch.set_num_threads(1)
    model = load("retouch-mini", "float32", "cpu").model
    return peer.load("retouch-mini", model)


@pytest.mark.parametrize("kind", ["kv", "inpaint"])
def test_pictures_are_those_of_the_peer_in_retouch(retouch_peer, kind):
    made = stock.Stock(MODEL, kind, "float32")
    ask = Ask(document(), box_mask(), "a red apple", 2, seed=5, steps=2)
    pictures = made.edit(ask)
    for turn, ours in enumerate(pictures):
        edit = Edit(ask.image, ask.prompt, ask.mask, seed=5 + turn, steps=2)
        theirs = retouch_peer.paste(edit, getattr(retouch_peer, kind)(edit))
        assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert (pictures[0] != pictures[1]).any()


def test_requests_share_a_call_and_get_what_they_get_alone():
    made = stock.Stock(MODEL, "inpaint", "float32", "cut", stock.CROP_SIDES)
    masks = (box_mask(192, (40, 48, 80, 90)), box_mask(192, (110, 100, 140, 130)), box_mask(192, (20, 20, 150, 150)))
    asks = [Ask(document(192), mask, "a cat", 1 + (seed == 1), seed, steps=1) for seed, mask in enumerate(masks)]
    calls = []
    run = made.run
    made.run = lambda parts: calls.append(len(parts)) or run(parts)
    together = made.edit_all(asks)
    assert sorted(calls) == [1, 3]
    for ask, several in zip(asks, together, strict=True):
        for one, alone in zip(several, made.edit(ask), strict=True):
            assert np.abs(one.astype(int) - alone).max() <= 1


def test_the_list_of_peers_names_what_is_there():
    listed = tomllib.loads((PEERS / "peers.toml").read_text())["peer"]
    assert len({one["name"] for one in listed}) == len(listed)
    for one in listed:
        assert set(one) == {"name", "environment", "command", "kind", "concurrency"}
        assert (PEERS / one["command"][0]).is_file()
        assert one["kind"] in ("full", "crop", "other")
        assert one["concurrency"] >= 1
        asked = (PEERS / "environments" / f"{one['environment']}.txt").read_text().split()
        pins = (PEERS / "environments" / f"{one['environment']}.constraints.txt").read_text()
        pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r"^([\w.-]+)==", pins, re.MULTILINE)}
        assert {re.split(r"[\[<>=]", name)[0] for name in asked} <= pinned
        assert "torch==2.13.0" in pins.split()
    environments = {path.name.split(".")[0] for path in (PEERS / "environments").iterdir()}
    assert environments == {one["environment"] for one in listed}


def test_peers_do_not_know_retouch():
    for path in PEERS.glob("*.py"):
        assert not re.search(r"^\s*(from|import) retouch\b", path.read_text(), re.MULTILINE), path


def start(*options: str) -> tuple[subprocess.Popen[str], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "lock.py", "--model", str(MODEL), "--port", str(port), "--threads", "1", *options]
    return subprocess.Popen(command, cwd=PEERS, stderr=subprocess.PIPE, text=True), f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def served():
    process, address = start("--pipeline", "kv", "--crop", "cut")
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(f"{address}/healthz").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.2)
    assert process.poll() is None, process.communicate()[1]
    yield f"{address}/v1/images/edits"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_a_server_answers_edits_and_leaves_the_rest_alone(served):
    files = {"image": ("i.png", png(document())), "mask": ("m.png", png(alpha(box_mask())))}
    quick = {"num_inference_steps": "1"}
    body = (
        httpx.post(served, data={"prompt": "a red apple", "n": "2", **quick}, files=files, timeout=60).raise_for_status().json()
    )
    made = [np.array(Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))) for one in body["data"]]
    assert len(made) == 2
    assert body["size"] == "128x128"
    for one in made:
        assert (one[~box_mask()] == document()[~box_mask()]).all()
        assert (one != document()).any()
    assert (made[0] != made[1]).any()
    again = httpx.post(served, data={"prompt": "a red apple", "seed": "1", **quick}, files=files, timeout=60).json()["data"][0]
    single = np.array(Image.open(io.BytesIO(base64.b64decode(again["b64_json"]))))
    assert np.abs(single.astype(int) - made[1]).max() <= 1


def test_a_server_refuses_a_bad_mask(served):
    files = {"image": ("i.png", png(document())), "mask": ("m.png", png(alpha(box_mask(64))))}
    answer = httpx.post(served, data={"prompt": "a red apple"}, files=files, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "mask"


def test_a_server_that_cannot_start_says_why_in_its_last_line(tmp_path):
    process, _ = start("--model", str(tmp_path))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.strip().splitlines()[-1].startswith("lock.py: OSError: ")
