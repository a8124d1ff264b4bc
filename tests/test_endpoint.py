"""An endpoint under load: what it is sent is what the trace says, and what is wrong with its answers is counted."""

from __future__ import annotations

import base64
import sys
import time

import httpx
import pytest

from endpoints import WHERE, Fake, causes, coded, edit, painted, photo, run
from retouch import picture
from retouch.edit import Edit, InvalidOption
from retouch.measure import summary
from retouch.measure.endpoint import EXTENSIONS, Endpoint
from retouch.measure.load import closed_loop, open_loop
from retouch.measure.plan import Call, Plan, of_edits
from retouch.trace import Result, Shape

# What is sent


def test_a_plain_endpoint_is_sent_what_openai_says_and_no_more():
    fake = Fake()
    asked = edit(5, steps=3, priority=2, deadline=9.0)
    replay = run(fake.endpoint(keys={"": "secret"}, fields={"model": "m-1"}), closed_loop, of_edits([asked]), 1)
    assert causes(replay) == {}
    ((request, form),) = fake.asked
    assert request.url == "http://fake/v1/images/edits"
    assert request.headers["authorization"] == "Bearer secret"
    assert set(form) == {"image", "mask", "prompt", "n", "model"}
    assert (form["prompt"], form["n"], form["model"]) == (b"a red apple", b"1", b"m-1")
    assert (picture.read(form["image"]).pixels == asked.image).all()
    assert (picture.read_mask(form["mask"], (32, 24), "alpha") == asked.mask).all()


def test_extensions_are_sent_where_they_are_known():
    fake = Fake()
    asked = edit(5, steps=3, priority=2, deadline=9.0, reuse=False)
    run(fake.endpoint(EXTENSIONS - {"documents"}), closed_loop, of_edits([asked]), 1)
    ((_, form),) = fake.asked
    texts = {name: form[name] for name in ("seed", "num_inference_steps", "priority", "deadline_ms", "use_cache", "mask_mode")}
    assert list(texts.values()) == [b"5", b"3", b"2", b"9000", b"false", b"white"]
    assert (picture.read_mask(form["mask"], (32, 24), "white") == asked.mask).all()


def test_an_edit_of_the_whole_picture_has_no_mask():
    fake = Fake()
    run(fake.endpoint(EXTENSIONS - {"documents"}), closed_loop, of_edits([Edit(photo(), "x")]), 1)
    assert "mask" not in fake.asked[0][1]
    assert "mask_mode" not in fake.asked[0][1]


@pytest.mark.parametrize("kind", ["WEBP", "JPEG"])
def test_results_go_back_as_they_came(kind):
    def answered(form):
        pixels = picture.read(form["image"]).pixels
        return {"data": [{"b64_json": coded(pixels // 2, kind)}]}

    fake = Fake(answered)
    size = (32, 24)
    calls = [Call(0, 0, "s", size, "d", None, "x", None), Call(1, 0, "s", size, "d", Result(0), "y", Shape(box=(0, 0, 9, 9)))]
    assert causes(run(fake.endpoint(), closed_loop, Plan(tuple(calls), {"d": photo()}), 1)) == {}
    (_, first), (second, form) = fake.asked
    assert form["image"] == base64.b64decode(answered(first)["data"][0]["b64_json"])
    assert f"image/{kind.lower()}".encode() in second.content


# What is answered


def refusal(status, code):
    return httpx.Response(status, json={"error": {"message": "too many wait; come later", "type": "t", "code": code}})


@pytest.mark.parametrize(
    ("answers", "cause", "detail"),
    [
        (lambda form: painted(form, size=(64, 48)), "wrong size", "the document is 32x24, the answer's picture 64x48"),
        (lambda form: painted(form) | {"size": "9x9"}, "wrong size", "the answer says 9x9, but its picture is 32x24"),
        (lambda form: painted(form, count=2), "wrong number of pictures", "1 were asked for, 2 came"),
        (lambda form: painted(form, count=0), "wrong number of pictures", "1 were asked for, 0 came"),
        (lambda form: {"data": [{"url": "http://elsewhere/x.png"}]}, "no picture", "KeyError 'b64_json'"),
        (lambda form: {"data": [{"b64_json": "AAAA"}]}, "no picture", "UnidentifiedImageError"),
        (lambda form: {"data": [{"b64_json": "%%%"}]}, "no picture", "Error"),
        (lambda form: [1], "no picture", "TypeError"),
        (lambda form: httpx.Response(200, text="<html>hello"), "no picture", "<html>hello"),
        (lambda form: refusal(429, "queue_full"), "429 queue_full", "too many wait"),
        (lambda form: refusal(400, None), "400 t", "too many wait"),
        (lambda form: httpx.Response(502, text="bad gateway"), "502 Bad Gateway", "bad gateway"),
        (lambda form: httpx.Response(301, headers={"location": "/"}), "301 Moved Permanently", ""),
        (lambda form: httpx.ConnectError("refused"), "unreachable", "http://fake: refused"),
        (lambda form: httpx.ConnectTimeout("slow"), "unreachable", "takes no connection"),
        (lambda form: httpx.ReadError("reset"), "connection lost", "ReadError: reset"),
        (lambda form: httpx.ReadTimeout(""), "timeout", "no answer in 600 s"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_counted_by_its_cause_and_ends_nothing(answers, cause, detail):
    served = iter([True, False, True])
    fake = Fake(lambda form: painted(form) if next(served) else answers(form))
    replay = run(fake.endpoint(), closed_loop, of_edits([edit(i) for i in range(3)]), 1)
    assert causes(replay) == {cause: 1}
    assert [bool(answer.error) for answer in replay.answers] == [False, True, False]
    assert detail in replay.answers[1].detail
    rows = summary.records(replay, WHERE, {"trace": "t"})
    (row,) = [row for row in rows if row.name == "errors"]
    assert (row.value, row.extra["cause"]) == (1, cause)
    assert detail in row.extra["detail"]


def test_a_slow_endpoint_is_given_up():
    fake = Fake(seconds=30)
    started = time.perf_counter()
    replay = run(fake.endpoint(timeout=0.1), closed_loop, of_edits([edit(), edit(1)]), 2)
    assert causes(replay) == {"timeout": 2}
    assert time.perf_counter() - started < 5
    assert all(0.1 <= answer.seconds < 5 for answer in replay.answers)


def test_where_nothing_is_served_one_row_says_why():
    fake = Fake(lambda form: httpx.ConnectError("refused"))
    replay = run(fake.endpoint(), open_loop, of_edits([edit(i) for i in range(4)]))
    first, errors = summary.records(replay, WHERE, {})
    assert first.value is None
    assert first.error == "nothing was served: 4 x unreachable (http://fake: refused)"
    assert errors.value == 4


def test_what_edits_a_failed_result_fails_with_it():
    size = (32, 24)
    calls = [Call(0, 0, "s", size, "d", None, "x", None), Call(1, 0, "s", size, "d", Result(0), "y", None)]
    calls += [Call(2, 0, "s", size, "d", Result(1), "y", None), Call(3, 0, "t", size, "d", None, "z", None)]
    fake = Fake(lambda form: painted(form) if form["prompt"] != b"x" else refusal(500, "boom"))
    replay = run(fake.endpoint(), open_loop, Plan(tuple(calls), {"d": photo()}))
    assert causes(replay) == {"500 boom": 1, "its document failed": 2}
    assert len(fake.asked) == 2


def test_addresses_and_extensions_are_checked():
    for url in ("localhost:8000", "ftp://x", "http://", ""):
        with pytest.raises(InvalidOption, match="is no address of a server"):
            Endpoint(url)
    with pytest.raises(InvalidOption, match="there is no extension colour; there are deadline_ms, documents"):
        Endpoint("http://x", {"colour", "seed"})
    assert Endpoint("https://x:1/v1/").name == "https://x:1"


def test_without_httpx_the_mend_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(InvalidOption, match=r"pip install 'retouch\[bench\]', or use --engine"):
        Endpoint("http://x")
