"""The very same edit twice at a time: it is computed once, and each has its own answer whatever becomes of the other."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from retouch.cache.memory import Memory
from retouch.cache.store import Store
from retouch.edit import DeadlineTooSoon, Edit
from retouch.engine.engine import Engine
from retouch.engine.scheduler import EarliestDeadline, FairShare, FirstCome, Policy, Priority
from test_engine import BESIDE, IMAGE, Model, edit, outcome, run, settled


@pytest.fixture
def made() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(*options: Any, **more: Any) -> Engine:
        engines.append(Engine(*options, **{"tokens": 1000, **more}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@BESIDE
@pytest.mark.parametrize("policy", [FirstCome, Priority, EarliestDeadline, FairShare])
@pytest.mark.parametrize("room", [0, 1 << 20])
def test_it_is_computed_once(made: Callable[..., Engine], beside: int, policy: Callable[[], Policy], room: int) -> None:
    """Also where finished results are not kept for later."""
    model = Model()
    engine = made(model, policy(), beside=beside, results=Store(Memory("host", room)))
    first, other = engine.submit(edit(7)), engine.submit(edit(8))
    engine.tick()
    again = [engine.submit(edit(7)) for _ in range(3)]
    run(engine)
    assert Counter(seed for step in model.packed for seed in step) == {7: 4, 8: 4}
    answers = [one.answer.result(0) for one in (first, *again)]
    assert all((answer.image == 7).all() and answer.seed == 7 for answer in answers)
    assert outcome(other.answer) == "8"
    assert [answer.usage.cache_hits == ("result",) for answer in answers] == [False, True, True, True]
    assert [answer.usage.tokens_computed for answer in answers[1:]] == [0, 0, 0]
    answers[1].image[:] = 0
    assert all((answer.image == 7).all() for answer in (answers[0], *answers[2:])), "each has a picture of its own"


def test_edits_of_one_call_may_be_the_same() -> None:
    model, heard = Model(), []
    answers = Engine(model, tokens=100).edit([edit(3)] * 4, lambda done, total: heard.append((done, total)))
    assert [answer.seed for answer in answers] == [3] * 4
    assert len(model.packed) == 4
    assert heard[-1] == (16, 16)
    assert heard == sorted(heard)


@BESIDE
@pytest.mark.parametrize("ticks", [0, 2])
def test_when_the_first_is_taken_back_one_of_the_others_goes_on(made: Callable[..., Engine], beside: int, ticks: int) -> None:
    model = Model()
    engine = made(model, beside=beside)
    first, second, third = (engine.submit(edit(5)) for _ in range(3))
    for _ in range(ticks):
        engine.tick()
        settled(engine)
    done = len(model.packed)
    assert first.answer.cancel()
    run(engine)
    assert [outcome(one.answer) for one in (first, second, third)] == ["cancelled", "5", "5"]
    assert model.packed[done:] == [[5]] * 4, "one of the two was computed"


@BESIDE
def test_one_that_waits_may_be_taken_back(made: Callable[..., Engine], beside: int) -> None:
    model = Model()
    engine = made(model, beside=beside)
    first, second, third = (engine.submit(edit(5)) for _ in range(3))
    engine.tick()
    assert second.answer.cancel()
    run(engine)
    assert [outcome(one.answer) for one in (first, second, third)] == ["5", "cancelled", "5"]
    assert model.packed == [[5]] * 4


@BESIDE
@pytest.mark.parametrize("stage", ["encode", "step", "finish"])
def test_what_failed_for_the_first_is_tried_for_the_next(made: Callable[..., Engine], beside: int, stage: str) -> None:
    model = Model()
    tries = iter([True])

    def fail(what: Any) -> None:
        if next(tries, False):
            raise RuntimeError(stage)

    model.on[stage] = fail
    engine = made(model, beside=beside)
    edits = [engine.submit(edit(5)) for _ in range(3)]
    run(engine)
    assert [outcome(one.answer) for one in edits] == ["RuntimeError", "5", "5"]


def test_an_answer_that_cannot_be_handed_on_is_that_ones_alone(
    made: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = made(Model())
    first, second = engine.submit(edit(5)), engine.submit(edit(5))

    def full(edit: Edit, known: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("retouch.engine.submitted.recalled", full)
    run(engine)
    assert [outcome(one.answer) for one in (first, second)] == ["5", "MemoryError"]


@pytest.mark.parametrize(
    ("policy", "more"),
    [(Priority, {"priority": 1}), (EarliestDeadline, {"deadline": 60.0}), (FirstCome, {"reuse": False})],
    ids=["priority", "deadline", "reuse"],
)
def test_who_would_come_first_or_wants_its_own_is_computed(
    made: Callable[..., Engine], policy: Callable[[], Policy], more: dict[str, Any]
) -> None:
    model = Model()
    engine = made(model, policy(), tokens=100)
    first, second = engine.submit(edit(5)), engine.submit(edit(5, **more))
    assert second.awaits is None
    run(engine)
    assert len(model.packed) == 8
    assert [outcome(one.answer) for one in (first, second)] == ["5", "5"]


def test_who_has_previews_to_show_is_computed(made: Callable[..., Engine]) -> None:
    model, heard = Model(), []
    engine = made(model)
    engine.submit(edit(5))
    engine.submit(edit(5), lambda step, image: heard.append(step), 1)
    unwatched = engine.submit(edit(5), None, 1)
    begun = engine.submit(edit(5), lambda step, image: None, 0)
    assert unwatched.awaits is begun.awaits is not None
    run(engine)
    assert heard == [0, 2]


def test_its_deadline_is_held_against_the_answer_it_waits_for(
    made: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = made(Model(), tokens=100)
    for tokens in (100, 200):
        engine.clock.observe(tokens, tokens / 100)
    engine.submit(edit(1))
    for seed in range(2, 12):
        engine.submit(edit(seed))
    assert engine.submit(edit(1, deadline=4.5)).awaits is not None
    with pytest.raises(DeadlineTooSoon, match=r"48\.0 s"):
        engine.submit(edit(50, deadline=4.5))
    with pytest.raises(DeadlineTooSoon, match=r"4\.0 s"):
        engine.submit(edit(1, deadline=3.5))
    late = engine.submit(edit(1, deadline=4.5)).answer
    now = time.monotonic
    monkeypatch.setattr("retouch.engine.engine.time.monotonic", lambda: now() + 60)
    engine.tick()
    assert outcome(late) == "DeadlinePassed"


@BESIDE
def test_closing_answers_those_who_wait(beside: int) -> None:
    engine = Engine(Model(), tokens=100, beside=beside)
    edits = [engine.submit(edit(5)) for _ in range(3)]
    engine.tick()
    engine.close()
    assert [outcome(one.answer) for one in edits] == ["WorkerLost"] * 3


@BESIDE
def test_everybody_is_answered_whoever_leaves(made: Callable[..., Engine], beside: int) -> None:
    """Threads ask for the same few edits, and take some back; some fail."""
    model = Model()
    dice = random.Random(beside)

    def fail(seed: int) -> None:
        if dice.random() < 0.1:
            raise ValueError("finish")

    model.on["finish"] = fail
    engine, stop = made(model, FairShare(), tokens=300, beside=beside), threading.Event()
    answers: list[tuple[int, Future[Any]]] = []

    def serve() -> None:
        while not stop.is_set():
            if not engine.tick():
                engine.wait(0.01)

    def ask(number: int) -> None:
        own = random.Random(number)
        for turn in range(40):
            picture = np.full_like(IMAGE, turn // 4)  # so that few are answered from what was finished
            seed = own.randrange(2)
            one = engine.submit(replace(edit(seed, tenant=own.choice("ab")), image=picture))
            answers.append((seed, one.answer))
            if own.random() < 0.3:
                own.choice(answers)[1].cancel()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    server = threading.Thread(target=serve)
    for thread in (server, *threads):
        thread.start()
    for thread in threads:
        thread.join(20)
    ends = Counter("right" if (end := outcome(answer)) == str(seed) else end for seed, answer in answers)
    stop.set()
    server.join(20)
    assert set(ends) <= {"right", "cancelled", "ValueError"}
    assert sum(ends.values()) == 160
    assert ends["right"] > 40
    assert engine.stats()["queue"]["waiting"] == engine.stats()["queue"]["running"] == 0
