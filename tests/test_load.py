"""Load: the loops send when they should, answers are held to the plan, on a server and on an engine alike."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from endpoints import WHERE, Fake, causes, coded, edit, photo, run
from retouch import picture
from retouch.edit import Edit, InvalidOption
from retouch.measure import endpoint, summary
from retouch.measure.endpoint import EXTENSIONS, Endpoint
from retouch.measure.load import closed_loop, open_loop
from retouch.measure.pictures import Pictures
from retouch.measure.plan import Call, Plan, of_edits, of_trace
from retouch.measure.targets import Failed, InProcess, Served
from retouch.trace import InvalidTrace, Request, Result, Shape, Trace, View
from serving import Painter, Serving

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
