"""The loop with a model of its own: who is served when, and that each edit has exactly one answer."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from retouch.edit import DeadlineTooSoon, Edit, InvalidPrompt, QueueFull, Usage
from retouch.engine.engine import Engine
from retouch.engine.scheduler import Priority
from retouch.models.base import Frame

IMAGE = np.zeros((16, 16, 3), np.uint8)


class Model:
    """Counts instead of computing: a job is done after its steps, and the answer shows the seed."""

    def __init__(self) -> None:
        self.packed: list[list[int]] = []
        self.encoded: list[str] = []

    def frame(self, edit: Edit) -> Frame:
        return Frame((0, 0, 16, 16), 1.0, edit.image, (), f"{edit.tenant}/{edit.image[0, 0, 0]}")

    def size(self, edit: Edit, frame: Frame) -> tuple[int, int]:
        return 100, edit.steps or 4

    def prompt_key(self, text: str, tenant: str) -> str:
        return f"{tenant}/{text}"

    def negative(self, edit: Edit) -> None:
        return None

    def encode_document(self, frame: Frame) -> Any:
        self.encoded.append(frame.key)
        return SimpleNamespace(bytes=10)

    def encode_prompt(self, text: str, tenant: str) -> Any:
        if text == "too long":
            raise InvalidPrompt("too long")
        return SimpleNamespace(bytes=1, embedded=[0] * 4)

    def start(self, edit: Edit, frame: Frame, document: Any, prompt: Any, negative: Any) -> Any:
        return SimpleNamespace(edit=edit, prompt=prompt, cells=[0] * 100, steps=edit.steps or 4, usage=Usage())

    def step(self, jobs: list[Any]) -> None:
        self.packed.append([job.edit.seed for job in jobs])

    def synchronize(self) -> None:
        pass

    def finish(self, job: Any) -> np.ndarray:
        return np.full_like(IMAGE, job.edit.seed)


def edit(seed: int, **more: Any) -> Edit:
    return Edit(IMAGE, more.pop("prompt", "a cat"), seed=seed, **more)


@pytest.fixture
def model() -> Model:
    return Model()


def run(engine: Engine) -> None:
    while engine.tick():
        pass


def test_answers_come_in_the_order_of_the_edits(model: Model) -> None:
    answers = Engine(model, tokens=250).edit([edit(seed, steps=4 - seed) for seed in range(3)])
    assert [int(answer.image[0, 0, 0]) for answer in answers] == [0, 1, 2]
    assert [answer.seed for answer in answers] == [0, 1, 2]
    assert max(len(step) for step in model.packed) == 2
    assert sum(len(step) for step in model.packed) == 4 + 3 + 2


def test_edits_join_and_leave_at_every_step(model: Model) -> None:
    engine = Engine(model, tokens=1000)
    engine.submit(edit(0, steps=3))
    engine.tick()
    engine.submit(edit(1, steps=1))
    run(engine)
    assert model.packed == [[0], [0, 1], [0]]


def test_progress_counts_every_step_once(model: Model) -> None:
    heard: list[tuple[int, int]] = []
    Engine(model, tokens=100).edit([edit(0, steps=2), edit(1, steps=1)], lambda done, total: heard.append((done, total)))
    assert heard == [(1, 3), (2, 3), (3, 3)]


def test_the_policy_says_who_is_first(model: Model) -> None:
    engine = Engine(model, Priority(), tokens=100)
    for seed, priority in enumerate((0, 5, 1)):
        engine.submit(edit(seed, steps=1, priority=priority))
    run(engine)
    assert model.packed == [[1], [2], [0]]


def test_a_failed_edit_is_nobody_elses_concern(model: Model) -> None:
    engine = Engine(model, tokens=1000)
    good, bad, other = (engine.submit(edit(seed, prompt=text)) for seed, text in enumerate(("a", "too long", "b")))
    run(engine)
    assert good.answer.result(0).seed == 0
    assert other.answer.result(0).seed == 2
    with pytest.raises(InvalidPrompt):
        bad.answer.result(0)


def test_edit_raises_the_first_error_and_leaves_nothing_behind(model: Model) -> None:
    engine = Engine(model, tokens=100)
    with pytest.raises(InvalidPrompt):
        engine.edit([edit(0, prompt="too long"), edit(1)])
    assert not engine.tick()


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_a_cancelled_edit_leaves_at_the_next_step(model: Model, steps_before: int) -> None:
    engine = Engine(model, tokens=1000)
    gone, stays = engine.submit(edit(0)), engine.submit(edit(1))
    for _ in range(steps_before):
        engine.tick()
    assert gone.answer.cancel()
    run(engine)
    assert sum(0 in step for step in model.packed) == steps_before
    assert stays.answer.result(0).seed == 1
    with pytest.raises(CancelledError):
        gone.answer.result(0)


def test_a_model_that_fails_in_a_step_loses_no_edit(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, tokens=1000)
    one = engine.submit(edit(0))

    def fail(jobs: list[Any]) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "step", fail)
    assert engine.tick()
    with pytest.raises(RuntimeError, match="out of memory"):
        one.answer.result(0)
    assert not engine.tick()


def test_the_queue_is_bounded(model: Model) -> None:
    engine = Engine(model, tokens=100, queue=2)
    engine.submit(edit(0))
    engine.submit(edit(1))
    with pytest.raises(QueueFull):
        engine.submit(edit(2))
    run(engine)
    engine.submit(edit(2))
    assert len(Engine(model, tokens=100, queue=2).edit([edit(seed) for seed in range(7)])) == 7


def test_a_deadline_that_cannot_be_met_is_refused_on_arrival(model: Model) -> None:
    engine = Engine(model, tokens=100)
    for tokens in (100, 200):
        engine.clock.observe(tokens, tokens / 100)
    assert engine.submit(edit(0, deadline=4.5))
    with pytest.raises(DeadlineTooSoon, match=r"8\.0 s"):
        engine.submit(edit(1, deadline=4.5))
    engine.submit(edit(2, deadline=9.0))


def test_many_threads_submit_and_one_serves(model: Model) -> None:
    engine, answers, stop = Engine(model, tokens=1000), [], threading.Event()

    def serve() -> None:
        while not stop.is_set():
            if not engine.tick():
                engine.wait(0.01)

    def ask(seed: int) -> None:
        answers.append(engine.submit(replace(edit(0), seed=seed)).answer.result(20).seed)

    server = threading.Thread(target=serve)
    server.start()
    askers = [threading.Thread(target=ask, args=(seed,)) for seed in range(50)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(20)
    stop.set()
    server.join(20)
    assert sorted(answers) == list(range(50))
    assert model.encoded == ["/0"], "one document, encoded once"
