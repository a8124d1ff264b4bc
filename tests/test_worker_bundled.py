"""The process that may die, with the bundled weights: killed at any stage, its edits are answered as if it had not been."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import retouch
from patience import LONG, Heard, gone, until
from retouch import picture
from retouch.edit import DeadlinePassed, DeadlineTooSoon, Edit, Edited, InvalidPrompt, QueueFull, UnknownCheckpoint, WorkerLost
from retouch.engine import Engine
from retouch.engine.worker import Options, Worker

PHOTOS = Path(__file__).parent.parent / "photos"


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker(Options(dtype="float32", tokens=300, queue=6, beside=0, threads=1))
    worker.start()
    yield worker
    worker.close()
    assert worker.pid is not None
    assert gone(worker.pid)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """With as many threads as the worker: sums come out alike, and neither keeps the other from its core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield retouch.load(dtype="float32", beside=0)
    torch.set_num_threads(threads)


def photo(name: str, side: int = 512) -> np.ndarray:
    return picture.read(PHOTOS / f"{name}.jpg").pixels[:side, :side]


def small(seed: int, **more: Any) -> Edit:
    image = photo(("meadow", "stream", "sunset")[seed % 3], 96)
    return Edit(image, "a red apple", picture.box_mask((20, 20, 40, 30), image.shape[1::-1]), seed=seed, **more)


def idle(worker: Worker) -> bool:
    queue = worker.stats.get("queue")
    return queue is not None and queue["waiting"] == queue["running"] == 0


def differs(engine: Engine, answer: Future[Edited], edit: Edit) -> int:
    """By so many levels from the answer of this process: 0 where it ran alone, 1 where it was packed with others."""
    edited = answer.result(LONG)
    assert edited.seed == edit.seed
    return int(np.abs(edited.image.astype(int) - engine.edit([edit])[0].image).max())


def test_answers_are_those_of_an_engine_in_this_process(worker: Worker, engine: Engine) -> None:
    edits = [small(0), small(1, steps=2), Edit(photo("fig", 128), "a panda", seed=2, blank=True)]
    assert [differs(engine, worker.submit(edit), edit) for edit in edits] == [0, 0, 0]
    together = [small(seed) for seed in range(3, 7)]
    answers = [worker.submit(edit) for edit in together]
    assert max(differs(engine, answer, edit) for answer, edit in zip(answers, together, strict=True)) <= 1
    again = worker.submit(edits[0]).result(LONG)
    assert again.usage.cache_hits == ("result",)
    assert worker.info["steps"] == 4
    assert worker.info["max_side"] == 512


def test_an_unknown_checkpoint_is_said_at_the_start() -> None:
    with pytest.raises(UnknownCheckpoint, match="retouch-mini"):
        Worker(Options("nowhere")).start()


def test_refusals_cross_the_pipe(worker: Worker) -> None:
    with pytest.raises(InvalidPrompt, match="tokens"):
        worker.submit(Edit(photo("fig", 64), "word " * 500)).result(LONG)
    with pytest.raises(DeadlineTooSoon, match="would take"):
        worker.submit(small(50, steps=100, deadline=0.01, reuse=False)).result(LONG)
    long = [worker.submit(Edit(photo("fig", 256), "a cat", seed=seed, steps=100)) for seed in range(12)]
    full = [answer.exception(LONG) for answer in long[6:]]
    assert all(isinstance(error, QueueFull) and error.retry_after >= 1 for error in full)
    assert not any(answer.done() for answer in long[:6])
    for answer in long[:6]:
        assert answer.cancel()
    until(lambda: idle(worker))


def test_a_cancelled_edit_stops_at_a_step(worker: Worker, engine: Engine) -> None:
    heard = Heard()
    answer = worker.submit(Edit(photo("fig", 256), "a cat", steps=100), heard, 99)
    heard.wait(2)
    assert answer.cancel()
    until(lambda: idle(worker))
    assert max(heard.steps) < 90
    with pytest.raises(CancelledError):
        answer.result(0)
    assert differs(engine, worker.submit(small(60)), small(60)) == 0
    assert worker.waiting == 0


def kill(worker: Worker) -> None:
    """Once the next process loads, this returns."""
    pid = worker.pid or 0
    os.kill(pid, signal.SIGKILL)
    until(lambda: worker.pid != pid)


def computing(worker: Worker, seconds: float, unless: Callable[[], bool]) -> float:
    """Wait until the process has computed for so long from now on; returns how long it did."""

    def spent() -> float:
        times = psutil.Process(worker.pid).cpu_times()
        return times.user + times.system

    before = spent()
    until(lambda: spent() - before >= seconds or unless())
    return spent() - before


def test_killed_while_stepping_queued_and_loading(worker: Worker, engine: Engine) -> None:
    restarts, heard = worker.restarts, Heard()
    large = Edit(photo("meadow", 288), "a red apple", seed=1, steps=6)
    edits = [large, *(small(seed) for seed in range(70, 73))]
    answers = [worker.submit(large, heard, 5)]
    heard.wait(2)
    answers += [worker.submit(edit) for edit in edits[1:]]
    kill(worker)
    assert not any(answer.done() for answer in answers)
    answers.append(worker.submit(small(73)))
    kill(worker)
    assert not worker.ready
    edits.append(small(73))
    assert max(differs(engine, answer, edit) for answer, edit in zip(answers, edits, strict=True)) <= 1
    assert worker.restarts == restarts + 1, "one that died while loading is no restart of its own"
    assert worker.waiting == 0


def test_killed_while_encoding(worker: Worker, engine: Engine) -> None:
    image, heard = photo("mountain"), Heard()
    edit = Edit(image, "a red apple", picture.box_mask((200, 200, 60, 50), image.shape[1::-1]), seed=1)
    answer = worker.submit(edit, heard, 0)
    computing(worker, 0.05, lambda: bool(heard.steps))
    assert not heard.steps, "its document is being encoded"
    kill(worker)
    assert differs(engine, answer, edit) == 0


def test_killed_while_finishing(worker: Worker, engine: Engine) -> None:
    """As near to the end as can be hit from outside; `dying.py` dies in the very stage."""
    for seed in range(6):
        edit, heard = Edit(photo("stream", 256), "a red apple", seed=seed, steps=3), Heard()
        answer = worker.submit(edit, heard, 2)
        heard.wait(1)
        step = computing(worker, LONG, lambda heard=heard: 2 in heard.steps)  # type: ignore[misc]
        computing(worker, (1.1 - 0.15 * seed) * step, answer.done)
        if not answer.done():
            kill(worker)
            break
    assert differs(engine, answer, edit) == 0
    assert worker.restarts


def test_a_deadline_counts_from_the_first_submission(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    until(lambda: worker.ready)
    heard = Heard()
    late = worker.submit(Edit(photo("fig", 192), "a cat", steps=20, deadline=500.0), heard, 19)
    early = worker.submit(Edit(photo("fig", 192), "a cat", steps=20, seed=1, deadline=5000.0))
    heard.wait(0)
    kill(worker)
    assert not late.done()
    now = time.monotonic
    monkeypatch.setattr("retouch.engine.worker.time", SimpleNamespace(monotonic=lambda: now() + 1000))
    with pytest.raises(DeadlinePassed):
        late.result(LONG)
    assert early.result(LONG).seed == 1


def test_closing_the_real_one_answers_everybody(worker: Worker) -> None:
    until(lambda: worker.ready)
    answers = [worker.submit(Edit(photo("fig", 256), "a cat", seed=seed, steps=100)) for seed in range(4)]
    worker.close()
    for answer in answers:
        with pytest.raises(WorkerLost):
            answer.result(0)
