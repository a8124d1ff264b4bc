"""Load: what is sent is what the trace says, answers are held to it, and what fails is counted with its cause."""

from __future__ import annotations

import asyncio
import base64
import email
import importlib
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from retouch import cli, picture, record, trace
from retouch.edit import Edit, InvalidOption, RetouchError, Usage
from retouch.engine import Engine
from retouch.measure import endpoint, load_command, summary, traffic
from retouch.measure.endpoint import EXTENSIONS, Endpoint
from retouch.measure.load import Answer, Replay, closed_loop, open_loop, saturation
from retouch.measure.pictures import Pictures
from retouch.measure.plan import Call, Plan, of_edits, of_trace
from retouch.measure.targets import Failed, InProcess, Served
from retouch.measure.traffic import Knobs
from retouch.serve.settings import Settings, Tenant
from retouch.trace import InvalidTrace, Request, Result, Shape, Trace, View, hash_of
from serving import Painter, Serving

WHERE = record.environment()


def photo(seed=0, size=(32, 24)):
    return np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)


def edit(seed=0, **more):
    mask = np.zeros((24, 32), bool)
    mask[4:12, 6:20] = True
    return Edit(photo(seed), "a red apple", mask, seed=seed, **more)


@pytest.fixture(scope="module")
def small():
    """A dozen requests on small pictures, most later turns on results of earlier ones."""
    knobs = Knobs(requests=12, side=(64,), commit=0.8, rate=50, think=0.1, variations=2, tenants=2)
    return traffic.make("personal", 3, knobs, Pictures())


@pytest.fixture(scope="module")
def plan(small):
    return of_trace(small, Pictures())


@pytest.fixture
def engine():
    """On one thread: two would wait for each other where the machine is busy, and these edits are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Engine(tiny.model("Flux2KleinKVPipeline"))
    torch.set_num_threads(threads)


class Fake:
    """An endpoint behind httpx. `answers` makes of a request's form what is answered; it takes `seconds`."""

    def __init__(self, answers=None, seconds=0.0):
        self.asked, self.seconds, self.running, self.most = [], seconds, 0, 0
        self.answers = answers or painted

    async def __call__(self, request):
        if request.method == "GET":
            return httpx.Response(404)
        form = form_of(request)
        self.asked.append((request, form))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
        answer = self.answers(form)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json=answer)

    def endpoint(self, send=(), **more):
        return Endpoint("http://fake/v1/", send, transport=httpx.MockTransport(self), **more)


def form_of(request):
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    parts = email.message_from_bytes(head + request.content).get_payload()
    return {part.get_param("name", header="content-disposition"): part.get_payload(decode=True) for part in parts}


def coded(pixels, kind="PNG"):
    return base64.b64encode(picture.encode(pixels, kind)).decode()


def painted(form, size=None, count=None):
    pixels = picture.read(form["image"]).pixels
    pixels = pixels if size is None else np.zeros((size[1], size[0], 3), np.uint8)
    return {"data": [{"b64_json": coded(pixels)}] * (int(form["n"]) if count is None else count)}


def run(target, loop, *arguments, **more):
    async def go():
        async with target:
            return await loop(target, *arguments, **more)

    return asyncio.run(go())


def causes(replay):
    return {cause: count for cause, count, _ in summary.causes(replay.answers)}


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


# The loops


def test_the_open_loop_waits_for_no_answer_and_counts_from_when_it_was_due():
    fake = Fake(seconds=0.3)
    plan = of_edits([edit(i) for i in range(6)], rate=40)
    replay = run(fake.endpoint(), open_loop, plan)
    assert fake.most >= 4
    due = sorted(answer.due for answer in replay.answers)
    assert np.diff(due) == pytest.approx(np.diff([call.at for call in plan.calls]))
    assert all(answer.seconds >= 0.3 + answer.late for answer in replay.answers)


def test_the_open_loop_can_go_faster_than_the_trace():
    plan = of_edits([edit(i) for i in range(5)], rate=5, seed=1)
    replay = run(Fake().endpoint(), open_loop, plan, speed=50)
    due = sorted(answer.due for answer in replay.answers)
    assert np.diff(due) == pytest.approx(np.diff([call.at for call in plan.calls]) / 50)


@pytest.mark.parametrize("clients", [1, 3])
def test_the_closed_loop_has_so_many_at_once(clients):
    fake = Fake(seconds=0.05)
    heard = []
    replay = run(fake.endpoint(), closed_loop, of_edits([edit(i) for i in range(7)]), clients, heard=heard.append)
    assert fake.most == clients
    assert sorted(answer.number for answer in replay.answers) == list(range(7))
    assert tuple(heard) == replay.answers
    assert replay.seconds >= 0.05 * 7 / clients


def test_rounds_go_on_until_they_are_cancelled():
    fake = Fake(seconds=0.01)

    async def go():
        async with fake.endpoint() as target:
            flood = asyncio.create_task(closed_loop(target, of_edits([edit(), edit(1)]), 2, rounds=1_000_000))
            await asyncio.sleep(0.3)
            flood.cancel()
            with pytest.raises(asyncio.CancelledError):
                await flood

    asyncio.run(go())
    assert len(fake.asked) > 6
    assert fake.running == 0


def test_a_trace_replayed_edits_what_it_made(small, plan):
    """Each picture that is sent is the one that the trace says, through chains of results."""
    fake = Fake(lambda form: {"data": [{"b64_json": coded(picture.read(form["image"]).pixels ^ (1 + i))} for i in range(2)]})
    for loop, more in ((closed_loop, {"clients": 3}), (open_loop, {})):
        fake.asked.clear()
        assert causes(run(fake.endpoint(), loop, plan, **more)) == {}
        sent = {form["prompt"] + form["mask"]: picture.read(form["image"]).pixels for _, form in fake.asked}
        made = {}
        for request, call in zip(small.requests, plan.calls, strict=True):
            document = request.document
            image = plan.documents[call.document] if isinstance(document, View) else made[document]
            assert (sent[call.prompt.encode() + endpoint._transparent(call.drawn())] == image).all()
            made |= {Result(call.number, i): image ^ (1 + i) for i in range(2)}


class Counting:
    """A target that answers at once, in steps of the event loop."""

    name = "counting"

    def __init__(self):
        self.sent = []

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def document(self, image, tenant):
        return "photo"

    async def kept(self, made, tenant):
        return made

    def prepare(self, call):
        return None

    async def send(self, call, prepared, document):
        await asyncio.sleep(0)
        if call.seed % 5 == 4:
            raise Failed("fifth")
        self.sent.append((call.number, document))
        return Served(time.perf_counter(), [Result(call.number, i) for i in range(call.n)])


@given(data=st.data(), clients=st.integers(1, 4), closed=st.booleans())
def test_every_call_has_one_answer(data, clients, closed):
    """In any order of sessions, with any chains of results, some of which fail."""
    calls = []
    for number in range(data.draw(st.integers(1, 12))):
        session = data.draw(st.sampled_from("abc"))
        earlier = [call for call in calls if call.session == session]
        after = data.draw(st.sampled_from([None, *(Result(call.number, call.n - 1) for call in earlier)]))
        seed, n = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 3))
        calls.append(Call(number, 0.0, session, (8, 8), "d", after, "x", None, seed, n))
    target, plan = Counting(), Plan(tuple(calls), {"d": photo()})
    replay = run(target, closed_loop, plan, clients) if closed else run(target, open_loop, plan)
    assert sorted(answer.number for answer in replay.answers) == list(range(len(calls)))
    doomed = set()
    for call in calls:
        if call.seed % 5 == 4 or (call.after is not None and call.after.request in doomed):
            doomed.add(call.number)
    assert {answer.number for answer in replay.answers if answer.error} == doomed
    for number, document in target.sent:
        assert document == (calls[number].after or "photo")


# Against our own server, and an engine


def test_a_retouch_is_recognized_and_used_in_full(small, plan):
    keys = {call.tenant: call.tenant for call in plan.calls}
    with Serving(worker=Painter()) as server:
        target = Endpoint(server.url, keys=keys)
        replay = run(target, closed_loop, plan, 2)
        assert causes(replay) == {}
        assert target.sends == EXTENSIONS
        assert target.told["device"] == "cpu"
        asked = server.worker.asked
        assert len(asked) == sum(call.n for call in plan.calls) == 24
        seeds = {call.seed + i: call for call in plan.calls for i in range(call.n)}
        for one in asked:
            call = seeds[one.edit.seed]
            assert (one.edit.mask == call.drawn()).all()
            assert (one.edit.prompt, one.edit.reuse) == (call.prompt, False)
            if call.after is None:
                assert (one.edit.image == plan.documents[call.document]).all()
        rows = {row.name: row for row in summary.records(replay, WHERE, {})}
        assert rows["device seconds an edit"].value == pytest.approx(0.75)
        assert rows["edits that found their document encoded"].value == 0
        assert 0 < rows["image tokens computed, of the whole"].value < 1
        assert server.service.metrics.totals["edits"]["succeeded"] == 24


def test_the_very_same_trace_on_an_engine(plan, engine):
    seen, submit = [], engine.submit
    engine.submit = lambda edit, *more: seen.append(edit) or submit(edit, *more)
    chained = next(session for session in plan.sessions() if any(call.after for call in session))
    short = Plan(tuple(sorted({*chained, *plan.calls[:2]}, key=lambda call: call.number)), plan.documents)
    replays = [run(InProcess(engine), closed_loop, short, 2), run(InProcess(engine), open_loop, short.alone(2), speed=10)]
    for replay, calls in zip(replays, (short.calls, short.alone(2).calls), strict=True):
        assert causes(replay) == {}
        assert sorted(answer.number for answer in replay.answers) == [call.number for call in calls]
        rows = {row.name: row for row in summary.records(replay, WHERE, {}, deadline=100.0)}
        assert rows["served in time"].value == 1
        assert rows["goodput"].value == rows["requests per second"].value
        assert rows["edits per second"].value == pytest.approx(2 * rows["requests per second"].value)
        assert rows["edits that found their document encoded"].value >= 0.5
    assert len(seen) == 2 * (len(short.calls) + 2)
    for edit_ in seen:
        call = next(call for call in short.calls if edit_.seed in (call.seed, call.seed + 1))
        assert (edit_.mask == call.drawn()).all()
        assert (edit_.image == plan.documents[call.document]).all() == (call.after is None)


def test_an_engine_refuses_by_the_name_of_its_error(engine):
    engine.queue = 1
    edits = [Edit(tiny.photo(64, 64, i), "a cat", seed=i) for i in range(3)]
    replay = run(InProcess(engine), open_loop, of_edits(edits))
    counted = causes(replay)
    assert counted.get("QueueFull", 0) >= 1
    assert sum(counted.values()) < 3


def test_an_engine_that_breaks_leaves_nobody_waiting(engine):
    engine.tick = lambda: 1 / 0
    replay = run(InProcess(engine), closed_loop, of_edits([edit(), edit(1)]), 1)
    assert len(replay.answers) == 2
    assert set(causes(replay)) <= {"ZeroDivisionError", "WorkerLost"}


# Plans


def test_edits_that_cannot_be_replayed_are_refused():
    for wrong in (edit(references=(photo(),)), edit(guidance=2.0), Edit(photo(), "x", blank=True)):
        with pytest.raises(InvalidOption, match="cannot be replayed"):
            of_edits([wrong])


def test_a_recording_without_prompts_needs_stand_ins():
    photos = Pictures()
    view = photos.view(0, 64, np.random.default_rng(0))
    made = Trace((Request(0.0, "s", view, prompt_hash="beef"),))
    with pytest.raises(InvalidOption, match="recorded without its prompts"):
        of_trace(made, photos)
    unseen = Trace((Request(0.0, "s", View("feed", (64, 32)), prompt_hash="beef"),))
    stood_in = of_trace(unseen, Pictures(stand_ins=True))
    assert stood_in.calls[0].prompt
    assert stood_in.documents["picture 0"].shape == (32, 64, 3)


def test_an_empty_mask_is_named():
    call = Call(3, 0, "s", (32, 24), "d", None, "x", Shape(polygon=(50, 50, 60, 50, 60, 60)))
    for target in (Fake().endpoint(), InProcess(None)):
        with pytest.raises(InvalidTrace, match=r"the mask of request 3 .* has no pixel"):
            target.prepare(call)


def test_a_trace_larger_than_memory_is_refused(small, monkeypatch):
    monkeypatch.setattr("retouch.measure.plan.MEMORY", 10_000)
    with pytest.raises(InvalidOption, match="replay less of it with --requests"):
        of_trace(small, Pictures())


def test_renewed_documents_are_others(plan):
    renewed = plan.renewed(2)
    for name, image in plan.documents.items():
        assert (renewed.documents[name] != image).any(2).sum() <= 1
    assert plan.renewed(0) is plan
    assert all(call.after is None for call in plan.alone(5).calls)


# Saturation and figures


@given(capacity=st.floats(0.5, 500), start=st.floats(0.1, 1000))
def test_the_saturating_rate_is_bracketed(capacity, start):
    async def probe(rate):
        return 1.0 if rate <= capacity else capacity / rate

    found = asyncio.run(saturation(probe, 0.999, start, probes=40))
    assert found.held <= capacity * 1.002
    assert found.failed > capacity
    assert found.failed <= found.held * 1.1 + 1e-9
    assert [p.good >= 0.999 for p in found.probes] == [p.rate <= found.held for p in found.probes]


def test_a_search_that_cannot_tell_says_so():
    async def always(rate):
        return 1.0

    async def never(rate):
        return 0.0

    found = asyncio.run(saturation(always, 0.9, 1.0, most=6.0))
    assert (found.held, found.failed) == (6.0, None)
    assert [probe.rate for probe in found.probes] == [1, 2, 4, 6]
    row = summary.saturated(found, WHERE, {}, 0.9, 1.0, "")
    assert row.value is None
    assert "undecided: it held 6 requests a second" in row.error
    found = asyncio.run(saturation(never, 0.9, 1.0, probes=3))
    row = summary.saturated(found, WHERE, {}, 0.9, 1.0, "unreachable")
    assert row.error == "even at 0.25 requests a second fewer than 90% were served in time (unreachable)"


def answer(seconds, error="", deadline=None, n=1):
    return Answer(0, 0.0, 0.0, seconds, n, deadline, error, usage=Usage({"step": 0.5}, 10, 40, 0, 4, ("document",)))


def test_the_figures_of_a_replay():
    answers = [answer(0.01 * (i + 1), n=2) for i in range(100)] + [answer(9.0, "timeout", n=2)]
    rows = {row.name: row for row in summary.records(Replay(tuple(answers), 10.0), WHERE, {"trace": "t"}, deadline=0.5)}
    assert [rows[f"latency p{at}"].value for at in (50, 90, 95, 99)] == pytest.approx([0.505, 0.901, 0.9505, 0.9901])
    assert (rows["latency p50"].low, rows["latency p50"].high) == pytest.approx((0.109, 0.901))
    assert rows["requests per second"].value == 10
    assert rows["edits per second"].value == 20
    assert rows["goodput"].value == 5
    assert rows["served in time"].value == pytest.approx(50 / 101)
    assert rows["device seconds an edit"].value == 0.25
    assert rows["edits that found their document encoded"].value == 0.5
    assert rows["image tokens computed, of the whole"].value == 0.25
    assert all(row.extra["trace"] == "t" for row in rows.values())
    own = [answer(2.0, deadline=1.0), answer(2.0, deadline=3.0)]
    rows = {row.name: row for row in summary.records(Replay(tuple(own), 4.0), WHERE, {})}
    assert rows["served in time"].value == 0.5
    assert "latency p90" not in rows  # two answers do not tell


@given(seconds=st.lists(st.floats(0.001, 100), min_size=1, max_size=200))
def test_percentiles_grow(seconds):
    rows = summary.records(Replay(tuple(map(answer, seconds)), 1.0), WHERE, {})
    values = [row.value for row in rows if row.name.startswith("latency")]
    assert all(a <= b for a, b in pairwise(values))
    assert min(seconds) <= values[0] <= max(seconds)


# The command


@pytest.fixture
def file(tmp_path, small):
    path = tmp_path / "small.jsonl"
    trace.write(path, small)
    return path


def test_the_command_loads_a_server(file, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    with Serving(worker=Painter()) as server:
        common = [str(file), "--url", f"{server.url}/v1", "--out", str(out)]
        assert cli.main(["load", *common, "--clients", "2", "--deadline", "30", "--fresh"]) == 0
        assert cli.main(["load", *common, "--speed", "20", "--requests", "6", "--send", "seed,use_cache"]) == 0
    rows = record.read(out)
    assert {row.suite for row in rows} == {"load"}
    first, second = ([row for row in rows if row.extra["loop"] == loop] for loop in ("closed", "open"))
    assert first[0].n == 12
    assert second[0].n == 6
    assert first[0].extra | {"target": ""} == {
        "trace": "small.jsonl", "trace_hash": hash_of(file.read_bytes()), "mix": "personal", "trace_seed": 3,
        "knobs": "requests=12 rate=50 think=0.1 variations=2 commit=0.8 side=[64] tenants=2", "new_documents": True,
        "requests": 12, "target": "", "warm_up": 3, "loop": "closed", "clients": 2,
    }  # fmt: skip
    assert (first[0].dtype, first[0].threads) == ("float32", 2)
    text = capsys.readouterr().out
    assert "latency p50" in text
    assert "served in time" in text


def test_the_command_searches_where_a_server_saturates(file, tmp_path):
    out = tmp_path / "rows.jsonl"
    with Serving(worker=Painter(seconds=0.02)) as server:
        searching = ["--deadline", "0.1", "--saturate", "0.9", "--out", str(out)]
        assert cli.main(["load", str(file), "--url", server.url, *searching]) in (0, 1)
    (row,) = record.read(out)
    assert row.name == "saturating rate"
    assert row.value or "undecided" in row.error or "even at" in row.error
    assert row.extra["probes"] >= 2


def test_the_command_says_at_once_that_nobody_is_there(file, capsys):
    started = time.perf_counter()
    assert cli.main(["load", str(file), "--url", "http://127.0.0.1:9", "--speed", "0.001"]) == 1
    assert time.perf_counter() - started < 10
    assert "unreachable" in capsys.readouterr().out


def test_the_command_loads_an_engine(file, engine, monkeypatch, capsys):
    monkeypatch.setattr("retouch.engine.load", lambda model, dtype: engine, raising=False)
    assert cli.main(["load", str(file), "--engine", "--requests", "4", "--clients", "2", "--warm-up", "1"]) == 0
    assert "edits that found their document encoded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--url", "nowhere"], "is no address"),
        (["--url", "http://x", "--clients", "0"], "--clients is 0"),
        (["--url", "http://x", "--speed", "0"], "--speed is 0"),
        (["--url", "http://x", "--saturate", "2"], "--saturate is 2"),
        (["--url", "http://x", "--clients", "2", "--saturate", "0.9"], "leave out --speed and --saturate"),
        (["--url", "http://x", "--field", "model"], "give NAME=VALUE"),
        (["--url", "http://x", "--send", "colour"], "there is no extension colour"),
        (["--url", "http://x", "--keys", "{}/none.toml"], "cannot be read"),
        (["--url", "http://x", "--pictures", "{}"], "no picture in"),
        (["--url", "http://127.0.0.1:9", "--saturate", "0.9", "--warm-up", "0"], "--saturate needs --deadline"),
    ],
)
def test_the_command_refuses_in_one_line(file, tmp_path, capsys, argv, text):
    (tmp_path / "sub").mkdir()
    assert cli.main(["load", str(file), *(part.format(tmp_path / "sub") for part in argv)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("retouch: ")
    assert error.count("\n") == 1
    assert text in error


def test_only_an_engine_wants_torch():
    code = "import sys, retouch.measure.load_command, retouch.measure.trace_command; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_bench_sends_edits_with_the_same_client(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    live = importlib.import_module("live")
    asked = [edit(i, tenant="calm") for i in range(4)]
    keys = (Tenant("calm", "calm"), Tenant("flood", "flood"))
    with Serving(Settings(tenants=keys), Painter()) as server:
        answers, seconds = live.closed(server.url, asked, 2)
        assert [one.error for one in [*answers, *live.one_by_one(server.url, asked[:1], named=False)]] == [""] * 5
        assert 0 < max(answer.seconds for answer in answers) <= seconds
        monkeypatch.setattr(live, "SETTLED", 0.2)
        flood = [edit(9 + i, tenant="flood") for i in range(3)]
        assert len(live.open_loop(server.url, asked, 50.0, flood=flood, clients=2)) == 4
        server.idle()
        assert sum(one.edit.tenant == "flood" for one in server.worker.asked) > 3


def test_keys_are_read_as_the_server_reads_them(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text('[[tenant]]\nname = "a"\nkey = "ka"\n[[tenant]]\nname = "b"\nkey = "kb"\n')
    parse = load_command._parser().parse_args
    assert load_command._keys(parse(["t", "--engine", "--keys", str(path), "--key", "all"])) == {
        "": "all",
        "a": "ka",
        "b": "kb",
    }
    path.write_text('[[tenant]]\nname = "a"\nkey = "sha256:00"\n')
    with pytest.raises(RetouchError, match="only the digest of the key of a"):
        load_command._keys(parse(["t", "--engine", "--keys", str(path)]))


def test_the_page_on_measuring_names_every_option():
    text = (Path(__file__).parent.parent / "docs" / "measuring.md").read_text(encoding="utf-8")
    for action in load_command._parser()._actions:
        for option in action.option_strings:
            assert not option.startswith("--") or option == "--help" or f"`{option}" in text, option
    assert all(name in text for name in EXTENSIONS)
