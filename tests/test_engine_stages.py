"""What a stage took, whose bill that is on, and what an estimate makes of it."""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from patience import until
from retouch.cache.memory import Memory
from retouch.cache.store import Store
from retouch.edit import DeadlineTooSoon, Edit
from retouch.engine.engine import Engine
from test_engine import IMAGE, Model, edit, run


def test_who_waits_for_anothers_making_is_not_billed_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    engine = Engine(model)
    encode = model.encode_document

    def slow(frame: Any) -> Any:
        until(lambda: engine.documents.counters.joined == 1)
        time.sleep(0.1)
        return encode(frame)

    monkeypatch.setattr(model, "encode_document", slow)
    with ThreadPoolExecutor(2) as pool:
        jobs = list(pool.map(engine.admit, [edit(0), edit(1, prompt="a dog")]))
    maker, other = sorted(jobs, key=lambda job: "document" in job.usage.cache_hits)
    assert model.encoded == ["/0"]
    assert maker.usage.cache_hits == ()
    assert maker.usage.seconds["document"] >= 0.1
    assert other.usage.cache_hits == ("document",)
    assert other.usage.seconds["document"] < 0.01
    assert other.usage.seconds.keys() == maker.usage.seconds.keys()


def test_who_fetches_from_a_slower_tier_is_billed_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("retouch.engine.stages.time.perf_counter", lambda: now[0])

    def back(value: Any) -> Any:
        now[0] += 0.5
        return value

    engine = Engine(Model(), documents=Store(Memory("device", 0), Memory("host", 1000, None, back)))
    assert engine.admit(edit(0)).usage.seconds["document"] == 0
    job = engine.admit(edit(1))
    assert job.usage.cache_hits == ("document", "prompt")
    assert job.usage.seconds["document"] == 0.5


class Slow(Model):
    """Each stage takes its seconds, by a clock that nothing else moves."""

    def __init__(self, now: list[float]) -> None:
        super().__init__()
        self.now = now
        self.on["finish"] = lambda seed: self.spend(0.05)
        self.on["step"] = lambda seeds: self.spend(0.02 + 0.0005 * 100 * len(seeds))

    def spend(self, seconds: float) -> None:
        self.now[0] += seconds

    def encode_document(self, frame: Any) -> Any:
        self.spend(0.2)
        return super().encode_document(frame)

    def encode_prompt(self, key: str, text: str, document: Any) -> Any:
        self.spend(0.03)
        return super().encode_prompt(key, text, document)


def own(number: int, picture: int, prompt: str, **more: Any) -> Edit:
    return replace(edit(number, prompt=prompt, **more), image=np.full_like(IMAGE, picture))


@pytest.mark.parametrize("pictures", ["each its own", "all one", "one that is known"])
@pytest.mark.parametrize("prompts", ["each its own", "all one"])
@pytest.mark.parametrize("begun", [0, 2])
def test_the_estimate_for_a_deadline_comes_true(
    monkeypatch: pytest.MonkeyPatch, pictures: str, prompts: str, begun: int
) -> None:
    """Of an edit behind twenty others, where all is done in turn."""
    now = [100.0]
    for clock in ("perf_counter", "monotonic"):
        monkeypatch.setattr(f"retouch.engine.engine.time.{clock}", lambda: now[0])
    engine = Engine(Slow(now), tokens=300)
    engine.edit([own(200, 200, "before")])
    engine.edit([own(201, 201, "and"), own(202, 202, "after")])

    def ask(number: int, **more: Any) -> Edit:
        picture = {"each its own": number, "all one": 1, "one that is known": 200}[pictures]
        return own(number, picture, f"a cat, {number}" if prompts == "each its own" else "a cat", **more)

    for number in range(20):
        engine.submit(ask(number))
    for _ in range(begun):
        engine.tick()
    with pytest.raises(DeadlineTooSoon) as refused:
        engine.submit(ask(20, deadline=0.001))
    last = engine.submit(ask(20))
    since = now[0]
    run(engine)
    assert last.answer.done()
    said = re.search(r"about ([\d.]+) s", str(refused.value))
    assert said is not None
    assert float(said[1]) == pytest.approx(now[0] - since, rel=0.06, abs=0.1)


def test_what_is_not_known_yet_is_not_counted() -> None:
    engine = Engine(Model())
    one = edit(0)
    assert engine.aside([(one, engine.model.frame(one))], 3) == 0


def test_nobody_waits_for_the_threads_of_an_engine_longer_than_for_its_steps() -> None:
    """With threads beside the loop the estimate is the longer of the two, and one's own work after it."""
    engine = Engine(Model(), tokens=100, beside=2)
    for tokens in (100, 200):
        engine.clock.observe(tokens, tokens / 1000)
    engine._off_loop.update(document=2.0, finish=0.5)
    stop = threading.Event()
    engine.model.on["encode"] = lambda seed: stop.wait(20)  # type: ignore[attr-defined]
    for number in range(10):
        engine.submit(own(number, number, "a cat"))
    with pytest.raises(DeadlineTooSoon, match=r"about 15\.0 s"):  # ten of 2.5 s by two threads, and 2.5 s
        engine.submit(own(10, 10, "a cat", deadline=0.01))
    engine._off_loop.update(document=0.2, finish=0.0)
    with pytest.raises(DeadlineTooSoon, match=r"about 4\.6 s"):  # 44 steps of 0.1 s, and 0.2 s
        engine.submit(own(10, 10, "a cat", deadline=0.01))
    stop.set()
    engine.close()
