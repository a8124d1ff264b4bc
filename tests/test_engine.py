"""The loop with a model of its own: who is served when, and that each edit has exactly one answer."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from retouch.cache.memory import Memory
from retouch.cache.store import Store
from retouch.edit import DeadlineTooSoon, Edit, InvalidPrompt, QueueFull, Usage
from retouch.engine.engine import AHEAD, Engine
from retouch.engine.scheduler import FairShare, Priority, StepClock
from retouch.engine.submitted import Submitted
from retouch.models.base import Frame

IMAGE = np.zeros((16, 16, 3), np.uint8)


class Model:
    """Counts instead of computing: a job is done after its steps, and the answer shows the seed inside the mask.

    `on` are calls that are made before a stage: of encode, preview and finish with the seed, of step with all seeds.
    """

    def __init__(self) -> None:
        self.packed: list[list[int]] = []
        self.encoded: list[str] = []
        self.on: dict[str, Callable[[Any], object]] = {}

    def _call(self, stage: str, what: Any) -> None:
        if call := self.on.get(stage):
            call(what)

    approximate = ()

    def frame(self, edit: Edit) -> Frame:
        return Frame((0, 0, 16, 16), 1.0, edit.image, (), f"{edit.tenant}/{edit.image[0, 0, 0]}")

    def size(self, edit: Edit, frame: Frame) -> tuple[int, int]:
        return 100, edit.steps or 4

    def prompt_key(self, text: str, tenant: str, frame: Frame) -> str:
        return f"{tenant}/{text}"

    def negative(self, edit: Edit) -> None:
        return None

    def encode_document(self, frame: Frame) -> Any:
        self.encoded.append(frame.key)
        return SimpleNamespace(bytes=10)

    def encode_prompt(self, key: str, text: str, document: Any) -> Any:
        if text == "too long":
            raise InvalidPrompt("too long")
        return SimpleNamespace(bytes=1, embedded=[0] * 4)

    def start(self, edit: Edit, frame: Frame, document: Any, prompt: Any, negative: Any) -> Any:
        self._call("encode", edit.seed)
        return SimpleNamespace(
            edit=edit, prompt=prompt, cells=[0] * 100, steps=edit.steps or 4, step=0, usage=Usage(), latents=None,
            width=1 + len(prompt.embedded),
        )  # fmt: skip

    def step(self, jobs: list[Any]) -> None:
        self._call("step", [job.edit.seed for job in jobs])
        self.packed.append([job.edit.seed for job in jobs])
        for job in jobs:
            job.step += 1

    def synchronize(self) -> None:
        pass

    def apart(self) -> AbstractContextManager[None]:
        return nullcontext()

    def preview(self, job: Any) -> np.ndarray:
        self._call("preview", job.edit.seed)
        return np.full_like(IMAGE, job.step)

    def finish(self, job: Any) -> np.ndarray:
        self._call("finish", job.edit.seed)
        image = job.edit.image.copy()
        image[... if job.edit.mask is None else job.edit.mask] = job.edit.seed % 256
        return image


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


@pytest.mark.parametrize("place", [0, 1, 2])
def test_edit_raises_the_first_error_and_leaves_nothing_behind(model: Model, place: int) -> None:
    """Wherever the wrong edit is: those before it have steps to go."""
    engine = Engine(model, tokens=300)
    edits = [edit(1), edit(2)]
    edits.insert(place, edit(0, prompt="too long"))
    with pytest.raises(InvalidPrompt):
        engine.edit(edits)
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


BESIDE = pytest.mark.parametrize("beside", [0, 1, 2])


@pytest.fixture
def made() -> Iterator[Callable[..., Engine]]:
    """Makes engines and closes them."""
    engines: list[Engine] = []

    def make(model: Model, *options: Any, **more: Any) -> Engine:
        engines.append(Engine(model, *options, **more))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def settled(engine: Engine) -> None:
    """Wait until nothing runs beside the loop."""
    wait([one.side for one in engine._submitted if one.side is not None], 20)


def outcome(answer: Future[Any]) -> str:
    """What came out, once it has: a seed, or the name of the error."""
    try:
        return str(answer.result(20).seed)
    except CancelledError:
        return "cancelled"
    except Exception as error:
        return type(error).__name__


@BESIDE
def test_answers_are_the_same_beside_the_loop(model: Model, made: Callable[..., Engine], beside: int) -> None:
    edits = [edit(seed, steps=1 + seed % 5, prompt=f"p{seed % 3}", tenant=f"t{seed % 2}") for seed in range(30)]
    answers = made(model, tokens=350, beside=beside).edit(edits)
    assert [answer.seed for answer in answers] == list(range(30))
    assert all((answer.image == answer.seed).all() for answer in answers)
    assert Counter(seed for step in model.packed for seed in step) == {e.seed: e.steps for e in edits}
    assert max(len(step) for step in model.packed) <= 3


@BESIDE
@pytest.mark.parametrize("seed", range(3))
def test_every_edit_has_one_answer_whatever_happens(model: Model, made: Callable[..., Engine], beside: int, seed: int) -> None:
    """Threads submit and cancel at random; edits fail in every stage; deadlines pass; the policy hears of new tenants."""
    dice = random.Random(seed)
    broken = {stage: set(dice.sample(range(100), 4)) for stage in ("encode", "preview", "finish")}

    def fails(stage: str) -> Callable[[int], None]:
        def call(number: int) -> None:
            if number in broken[stage]:
                raise ValueError(stage)

        return call

    model.on = {stage: fails(stage) for stage in broken}
    engine, stop = made(model, FairShare(), tokens=300, queue=40, beside=beside), threading.Event()
    taken: list[Submitted] = []
    answered: Counter[int] = Counter()
    refused: Counter[str] = Counter()
    late: list[int] = []

    def serve() -> None:
        while not stop.is_set():
            if not engine.tick():
                engine.wait(0.01)

    def ask(first: int) -> None:
        own = random.Random(f"{seed}/{first}")
        for number in range(first, first + 25):
            deadline = own.choice([None, None, 1e-4, 0.01, 5.0])
            more = {"tenant": f"t{own.randrange(12)}", "steps": own.randint(1, 4), "deadline": deadline}
            asked = edit(number, prompt=own.choice(["a", "b", "too long"]), **more)
            answer: Future[Any] = Future()
            answer.add_done_callback(lambda _, number=number: answered.update([number]))

            def watch(step: int, image: Any, number: int = number, answer: Future[Any] = answer) -> None:
                if answer.done() and not answer.cancelled() and answer.exception() is None:
                    late.append(number)

            try:
                taken.append(engine.submit(asked, watch, own.randrange(3), answer))
            except (QueueFull, DeadlineTooSoon) as error:
                refused.update([type(error).__name__])
                continue
            if own.random() < 0.3:
                own.choice(taken).answer.cancel()

    threads = [threading.Thread(target=ask, args=(25 * i,)) for i in range(4)]
    server = threading.Thread(target=serve)
    for thread in (server, *threads):
        thread.start()
    for thread in threads:
        thread.join(20)
    ends = [(outcome(one.answer), str(one.edit.seed)) for one in taken]
    outcomes = Counter("right" if end == right else end for end, right in ends)
    stop.set()
    server.join(20)
    assert set(outcomes) <= {"right", "cancelled", "DeadlinePassed", "InvalidPrompt", "ValueError"}, outcomes
    assert outcomes["right"] >= 5
    assert sum(outcomes.values()) + sum(refused.values()) == 100
    assert set(answered.values()) == {1}
    assert len(answered) == len(taken)
    assert not late
    settled(engine)
    assert all(one.side.exception() is None for one in taken if one.side is not None)
    assert engine.stats()["queue"]["waiting"] == engine.stats()["queue"]["running"] == 0


@BESIDE
def test_encoding_is_only_some_steps_ahead(model: Model, made: Callable[..., Engine], beside: int) -> None:
    engine = made(model, tokens=200, beside=beside)
    edits = [engine.submit(replace(edit(seed, steps=50), tenant=f"t{seed}")) for seed in range(12)]
    for _ in range(8):
        engine.tick()
        settled(engine)
    ahead = 2 if beside == 0 else 2 * AHEAD
    assert len(model.encoded) == ahead
    assert [one.job is not None for one in edits] == [True] * ahead + [False] * (12 - ahead)
    edits[0].answer.cancel()
    engine.tick()
    settled(engine)
    assert len(model.encoded) == ahead + 1


@BESIDE
@pytest.mark.parametrize("stage", ["encode", "preview", "finish"])
def test_what_fails_for_an_edit_fails_for_it_alone(model: Model, made: Callable[..., Engine], beside: int, stage: str) -> None:
    def fail(seed: int) -> None:
        if seed == 1:
            raise RuntimeError(stage)

    model.on[stage] = fail
    engine = made(model, tokens=1000, beside=beside)
    edits = [engine.submit(edit(seed), lambda step, image: None, 1) for seed in range(3)]
    run(engine)
    assert [outcome(one.answer) for one in edits] == ["0", "RuntimeError", "2"]


@BESIDE
def test_a_step_that_fails_fails_for_those_in_it(model: Model, made: Callable[..., Engine], beside: int) -> None:
    def fail(seeds: list[int]) -> None:
        if 1 in seeds:
            raise RuntimeError("out of memory")

    model.on["step"] = fail
    engine = made(model, tokens=200, beside=beside)
    edits = [engine.submit(edit(seed)) for seed in range(4)]
    while not all(one.job for one in edits[:2]):  # so that the first two are in one step
        engine._encode(edits[:2])
        settled(engine)
    run(engine)
    assert [outcome(one.answer) for one in edits] == ["RuntimeError", "RuntimeError", "2", "3"]
    assert len(engine._recent) == len(model.packed), "a step that failed says nothing of how long one takes"


@pytest.mark.parametrize("beside", [1, 2])
def test_a_thread_that_cannot_work_answers_for_its_edit(model: Model, made: Callable[..., Engine], beside: int) -> None:
    def broken() -> AbstractContextManager[None]:
        raise RuntimeError("no stream")

    engine = made(model, tokens=100, beside=beside)
    model.apart = broken  # type: ignore[method-assign]
    one = engine.submit(edit(0))
    run(engine)
    assert outcome(one.answer) == "RuntimeError"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("retouch.engine.engine.time.monotonic", lambda: now[0])
    return now


@BESIDE
def test_a_deadline_may_pass_while_waiting(model: Model, made: Callable[..., Engine], beside: int, clock: list[float]) -> None:
    engine = made(model, tokens=100, beside=beside)
    first, late, last = engine.submit(edit(0, steps=3)), engine.submit(edit(1, deadline=5.0)), engine.submit(edit(2))
    engine.tick()
    settled(engine)
    clock[0] += 5.1
    engine.tick()
    assert outcome(late.answer) == "DeadlinePassed"
    run(engine)
    assert [outcome(one.answer) for one in (first, last)] == ["0", "2"]
    assert all(1 not in step for step in model.packed)


@BESIDE
def test_a_deadline_may_pass_while_encoding(model: Model, made: Callable[..., Engine], beside: int, clock: list[float]) -> None:
    def slow(seed: int) -> None:
        clock[0] += 10 * (seed == 1)

    model.on["encode"] = slow
    heard: list[int] = []
    engine = made(model, tokens=200, beside=beside)
    late, other = engine.submit(edit(1, deadline=5.0), lambda step, image: heard.append(step)), engine.submit(edit(2))
    run(engine)
    assert outcome(late.answer) == "DeadlinePassed"
    assert outcome(other.answer) == "2"
    if beside == 0:
        assert all(1 not in step for step in model.packed), "nothing is computed that comes too late"


@BESIDE
@pytest.mark.parametrize(
    ("steps", "previews", "due"), [(4, 1, [2]), (4, 2, [1, 3]), (4, 3, [1, 2, 3]), (8, 3, [2, 4, 6]), (2, 3, [1]), (1, 2, [])]
)
def test_previews_come_at_their_steps(
    model: Model, made: Callable[..., Engine], beside: int, steps: int, previews: int, due: list[int]
) -> None:
    engine, heard = made(model, tokens=1000, beside=beside), []

    def watch(step: int, image: np.ndarray | None) -> None:
        heard.append((step, None if image is None else int(image[0, 0, 0])))

    one = engine.submit(edit(0, steps=steps), watch, previews)
    unwatched = engine.submit(edit(1, steps=steps), None, previews)
    run(engine)
    assert heard == [(0, None)] + [(step, step) for step in due]
    assert outcome(one.answer) == "0"
    assert outcome(unwatched.answer) == "1"


@pytest.mark.parametrize("beside", [1, 2])
def test_a_slow_preview_shows_its_own_step_and_comes_before_the_answer(
    model: Model, made: Callable[..., Engine], beside: int
) -> None:
    engine, stepped, heard = made(model, tokens=1000, beside=beside), threading.Event(), []
    model.on["preview"] = lambda seed: stepped.wait(20)
    one = engine.submit(edit(0), lambda step, image: heard.append((step, one.answer.done(), image is not None)), 3)
    while len(model.packed) < 4:
        engine.tick()
    assert not one.answer.done(), "its previews are still being made"
    stepped.set()
    run(engine)
    assert heard == [(0, False, False), (1, False, True), (2, False, True), (3, False, True)]
    assert set(one.answer.result(0).usage.seconds) >= {"document", "prompt", "step", "preview", "finish"}


@pytest.mark.parametrize("beside", [1, 2])
def test_no_preview_after_a_cancellation(model: Model, made: Callable[..., Engine], beside: int) -> None:
    engine, begun, gone, heard = made(model, tokens=1000, beside=beside), threading.Event(), threading.Event(), []
    model.on["preview"] = lambda seed: (begun.set(), gone.wait(20))
    one = engine.submit(edit(0, steps=50), lambda step, image: heard.append(step), 49)
    while not begun.is_set():
        engine.tick()
    assert one.answer.cancel()
    gone.set()
    run(engine)
    settled(engine)
    assert heard == [0]


def masked(seed: int = 3, **more: Any) -> Edit:
    mask = np.zeros((16, 16), bool)
    mask[4:8, 4:12] = True
    return edit(seed, **{"mask": mask, **more})


def touched(y: int, x: int) -> np.ndarray:
    image = IMAGE.copy()
    image[y, x] = 9
    return image


@BESIDE
def test_the_very_same_edit_is_answered_from_what_was_finished(model: Model, made: Callable[..., Engine], beside: int) -> None:
    engine = made(model, tokens=1000, beside=beside)
    (first,) = engine.edit([masked()])
    first.usage.dollars = 5.0
    computed = len(model.packed), len(model.encoded)
    heard: list[int] = []
    again = engine.submit(masked(priority=3, deadline=9.0), lambda step, image: heard.append(step), 2).answer.result(0)
    assert (again.image == first.image).all()
    assert again.image is not first.image
    assert again.seed == first.seed
    assert again.usage.cache_hits == ("result",)
    assert (again.usage.tokens_computed, again.usage.seconds) == (0, {})
    assert again.usage.dollars != 5.0, "what became of the first one's books is its own affair"
    assert (len(model.packed), len(model.encoded)) == computed
    assert not heard
    again.image[:] = 77
    (third,) = engine.edit([masked()])
    assert (third.image == first.image).all(), "what is answered is nobody else's picture"


@BESIDE
@pytest.mark.parametrize(
    "other",
    [
        {"seed": 4}, {"prompt": "a dog"}, {"tenant": "b"}, {"steps": 3}, {"guidance": 2.0}, {"mask": None},
        {"mask": np.eye(16, dtype=bool)}, {"image": touched(0, 0)}, {"image": touched(5, 5)},
        {"image": np.zeros((16, 16, 4), np.uint8)}, {"reuse": False},
    ],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_another_edit_is_computed(model: Model, made: Callable[..., Engine], beside: int, other: dict[str, Any]) -> None:
    engine = made(model, tokens=1000, beside=beside)
    engine.edit([masked()])
    steps = len(model.packed)
    (answer,) = engine.edit([replace(masked(), **other)])
    assert len(model.packed) > steps
    assert "result" not in answer.usage.cache_hits


@BESIDE
def test_without_reuse_nothing_is_read_or_written(model: Model, made: Callable[..., Engine], beside: int) -> None:
    engine = made(model, tokens=1000, beside=beside)
    engine.edit([masked(reuse=False)])
    assert len(engine.results) == 0
    engine.edit([masked()])
    assert len(model.packed) == 8
    engine.edit([masked(reuse=False)])
    assert len(model.packed) == 12
    assert sum(engine.results.counters.hits.values()) == 0


def test_a_full_queue_says_when_to_come_again(model: Model) -> None:
    engine = Engine(model, tokens=100, queue=3)
    for tokens in (100, 200):
        engine.clock.observe(tokens, tokens / 100)
    for seed in range(3):
        engine.submit(edit(seed, steps=40))
    with pytest.raises(QueueFull, match="3 edits wait") as refused:
        engine.submit(edit(3))
    assert refused.value.retry_after == pytest.approx(3 * 40 / 4, rel=0.01)
    idle = Engine(model, tokens=100, queue=0)
    with pytest.raises(QueueFull) as refused:
        idle.submit(edit(0))
    assert refused.value.retry_after == 1.0


@BESIDE
def test_shares_stay_fair(model: Model, made: Callable[..., Engine], beside: int) -> None:
    engine = made(model, FairShare(), tokens=100, beside=beside)
    for seed in range(12):
        engine.submit(edit(seed, tenant="many"))
    for _ in range(3):
        engine.tick()
        settled(engine)
    few = [engine.submit(edit(100 + seed, tenant="few")) for seed in range(3)]
    before = len(model.packed)
    while not all(one.answer.done() for one in few):
        engine.tick()
        settled(engine)
    served = Counter(seed >= 100 for step in model.packed[before:] for seed in step)
    assert served[True] == 3 * 4
    assert served[False] <= served[True] + 2, "the tenant with a few edits had half of the steps"


@BESIDE
def test_everything_gives_way_to_an_edit_that_is_owed(
    model: Model, made: Callable[..., Engine], beside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepClock, "room", lambda clock, tokens: tokens)  # where a step takes as long as it has tokens
    engine = made(model, FairShare(), tokens=200, beside=beside)
    done: list[int] = []
    model.on["finish"] = done.append
    flood = [engine.submit(edit(seed, tenant="many")) for seed in range(12)]
    for _ in range(6):
        engine.tick()
        settled(engine)
    few = engine.submit(edit(100, tenant="few"))
    before = (len(model.packed), len(done), sum(one.job is not None for one in flood))
    while not few.answer.done():
        engine.tick()
        settled(engine)
    alone = model.packed[before[0] :]
    assert [step for step in alone if 100 in step] == [[100]] * 4, "nobody made its steps longer"
    assert len(alone) <= 5, "nobody stepped between"
    assert done[before[1] :][0] == 100, "nobody was finished before it"
    assert sum(one.job is not None for one in flood) <= before[2] + 1, "nobody else was encoded meanwhile"
    run(engine)
    assert sorted(one.answer.result(20).seed for one in flood) == list(range(12)), "those put off are finished too"


def test_an_edit_that_is_owed_waits_for_one_that_is_being_finished_and_no_other(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepClock, "room", lambda clock, tokens: tokens)
    engine = Engine(model, FairShare(), tokens=400)
    done: list[int] = []

    def finish(seed: int) -> None:
        done.append(seed)
        if len(done) == 5:
            engine.submit(edit(100, tenant="few", steps=1))

    model.on["finish"] = finish
    for seed in range(12):
        engine.submit(edit(seed, tenant="many"))
    run(engine)
    assert done.index(100) == 5, "four more were finished in the same round"
    assert sorted(done) == [*range(12), 100]


@BESIDE
def test_what_was_put_off_is_finished_when_nobody_else_is_left(model: Model, made: Callable[..., Engine], beside: int) -> None:
    engine = made(model, FairShare(), tokens=100, beside=beside)
    engine.submit(edit(1, tenant="many"))
    one = engine.submit(edit(2, tenant="many", steps=1))
    few = engine.submit(edit(3, tenant="few"))
    engine._sides.put_off(one, engine._finished)
    few.answer.cancel()
    one.job = engine.admit(one.edit)
    run(engine)
    assert one.answer.result(20).seed == 2


@BESIDE
def test_closing_answers_everybody(model: Model, beside: int) -> None:
    engine = Engine(model, tokens=100, beside=beside)
    edits = [engine.submit(edit(seed)) for seed in range(4)]
    engine.tick()
    engine.close()
    assert {outcome(one.answer) for one in edits} == {"WorkerLost"}


def test_the_device_is_done_with_what_is_kept(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may take it at once, and waits for nothing but its own stream."""
    under_way: list[str] = []
    when_kept: list[list[str]] = []

    def begun(stage: str) -> Callable[..., Any]:
        encode = getattr(model, stage)
        return lambda *given: (under_way.append(stage), encode(*given))[1]

    def kept(value: Any) -> Any:
        when_kept.append(list(under_way))
        return value

    for stage in ("encode_document", "encode_prompt"):
        monkeypatch.setattr(model, stage, begun(stage))
    monkeypatch.setattr(model, "synchronize", under_way.clear)
    documents, prompts = (Store(Memory[Any]("device", 1000, kept)) for _ in range(2))
    Engine(model, documents=documents, prompts=prompts).admit(edit(0))
    assert when_kept == [[], []]
