"""The process that may die: each edit has one right answer all the same. With the bundled weights, and with a model that dies
where it is told to (`dying.py`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
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

import dying
import retouch
from retouch import picture
from retouch.edit import (
    DeadlinePassed,
    DeadlineTooSoon,
    Edit,
    Edited,
    InvalidPrompt,
    QueueFull,
    UnknownCheckpoint,
    WorkerLost,
)
from retouch.engine import Engine
from retouch.engine.worker import Options, Worker

HERE = Path(__file__).parent
PHOTOS = HERE.parent / "photos"
LONG = 90.0
"""Seconds after which what has not happened is not going to."""


Started = Callable[[str, str], tuple["subprocess.Popen[str]", int]]


def until(what: Callable[[], object], seconds: float = LONG) -> None:
    """Wait for what tells nobody when it happens."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


class Heard:
    """A watch that remembers, and lets wait for a step."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.looks: list[np.ndarray | None] = []
        self._news = threading.Condition()

    def __call__(self, step: int, image: np.ndarray | None) -> None:
        with self._news:
            self.steps.append(step)
            self.looks.append(image)
            self._news.notify_all()

    def wait(self, step: int) -> None:
        with self._news:
            assert self._news.wait_for(lambda: step in self.steps, LONG)


# With a model that dies where it is told to.


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Worker]]:
    """Starts workers around `dying.Dying` and closes them."""
    monkeypatch.setattr("retouch.engine.worker.serve", dying.serve)
    started: list[Worker] = []

    def start(**options: Any) -> Worker:
        started.append(Worker(Options(**{"cache": tmp_path, "tokens": 1000, "beside": 0, **options})))
        started[-1].start()
        return started[-1]

    yield start
    for worker in started:
        worker.close()
        assert worker.waiting == 0
        assert worker.pid is not None
        assert gone(worker.pid)


def ask(seed: int, prompt: str = "a cat", **more: Any) -> Edit:
    return Edit(np.zeros((16, 16, 3), np.uint8), prompt, seed=seed, **more)


def right(answer: Future[Edited], seed: int) -> bool:
    edited = answer.result(LONG)
    return edited.seed == seed and bool((edited.image == seed).all())


@pytest.mark.parametrize("beside", [0, 1])
def test_whichever_stage_it_dies_in_the_next_process_answers(workers: Callable[..., Worker], beside: int) -> None:
    worker = workers(beside=beside)
    for count, stage in enumerate(("take", "encode", "step", "preview", "finish")):
        other, heard = worker.submit(ask(200)), Heard()
        answer = worker.submit(ask(count, f"die once in {stage}"), heard, 3)
        assert right(answer, count)
        assert right(other, 200)
        assert worker.restarts == count + 1
        assert heard.steps[-4:] == [0, 1, 2, 3]
    until(lambda: worker.stats)
    assert worker.stats["queue"]["running"] == worker.stats["queue"]["waiting"] == 0


def test_an_edit_that_kills_three_processes_is_given_up_and_nobody_else(workers: Callable[..., Worker]) -> None:
    worker = workers(tokens=250)
    bad = 3
    answers = [worker.submit(ask(seed, "die in step" if seed == bad else "a cat")) for seed in range(8)]
    with pytest.raises(WorkerLost, match="died 3 times under this edit"):
        answers[bad].result(LONG)
    assert all(right(answer, seed) for seed, answer in enumerate(answers) if seed != bad)
    assert worker.restarts == 3
    assert right(worker.submit(ask(9)), 9)


def test_what_comes_while_one_is_alone_waits_for_it(workers: Callable[..., Worker], tmp_path: Path) -> None:
    """After two deaths an edit goes alone; what is asked for meanwhile is answered after it."""
    worker = workers()
    hold = tmp_path / "hold"
    hold.touch()
    alone, heard = worker.submit(ask(1), begun := Heard()), []
    for count in (1, 2):
        begun.wait(0)
        begun.steps.clear()
        os.kill(worker.pid or 0, signal.SIGKILL)
        until(lambda count=count: worker.restarts == count and worker.ready)
    alone.add_done_callback(lambda _: heard.append(1))
    late, cancelled = worker.submit(ask(2)), worker.submit(ask(3))
    late.add_done_callback(lambda _: heard.append(2))
    assert cancelled.cancel()
    assert not late.done()
    hold.unlink()
    assert right(late, 2)
    assert right(alone, 1)
    assert heard == [1, 2]


def test_an_error_that_no_pipe_can_carry_arrives_as_text(workers: Callable[..., Worker]) -> None:
    worker = workers()
    answers = [worker.submit(ask(seed, text)) for seed, text in enumerate(("fail in encode", "a cat", "fail in take"))]
    with pytest.raises(RuntimeError, match="Unreadable: encode"):
        answers[0].result(LONG)
    with pytest.raises(RuntimeError, match="Unreadable: take"):
        answers[2].result(LONG)
    assert right(answers[1], 1)
    assert worker.restarts == 0


def test_a_watch_that_fails_is_its_own_affair(workers: Callable[..., Worker]) -> None:
    def watch(step: int, image: np.ndarray | None) -> None:
        raise ValueError("the listener's loop is closed")

    worker = workers()
    assert right(worker.submit(ask(1), watch, 2), 1)
    assert right(worker.submit(ask(2)), 2)


def test_a_process_that_does_not_come_up_again_is_said(
    workers: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("retouch.engine.worker.FAILED_STARTS", 1)
    worker = workers(model="mortal")
    (tmp_path / "hold").touch()
    answers = [worker.submit(ask(seed)) for seed in range(3)]
    os.kill(worker.pid or 0, signal.SIGKILL)
    for answer in answers:
        with pytest.raises(WorkerLost, match="does not start any more"):
            answer.result(LONG)
    assert not worker.ready
    later = worker.submit(ask(7))
    (tmp_path / "hold").unlink()
    (tmp_path / "loaded").unlink()
    assert right(later, 7), "when it comes up again, it goes on"


def test_a_process_that_cannot_load_is_said_at_the_start(workers: Callable[..., Worker]) -> None:
    with pytest.raises(WorkerLost, match="died while it loaded"):
        workers(model="broken")


def test_closing_answers_everybody(workers: Callable[..., Worker], tmp_path: Path) -> None:
    worker = workers(tokens=100)
    answers = [worker.submit(ask(seed, "slow", steps=100)) for seed in range(5)]
    cancelled = worker.submit(ask(9, "slow", steps=100))
    cancelled.cancel()
    began = time.monotonic()
    worker.close()
    assert time.monotonic() - began < 20
    for answer in answers:
        with pytest.raises(WorkerLost):
            answer.result(0)
    with pytest.raises(WorkerLost, match="is stopping"):
        worker.submit(ask(1))
    worker.close()


def test_closing_does_not_wait_for_a_process_that_loads(workers: Callable[..., Worker], tmp_path: Path) -> None:
    worker = workers(model="slow")
    pid = worker.pid or 0
    (tmp_path / "hold").touch()
    answer = worker.submit(ask(1))
    os.kill(pid, signal.SIGKILL)
    until(lambda: worker.pid != pid)
    began = time.monotonic()
    worker.close()
    assert time.monotonic() - began < 20, "less than the patience with one that works"
    with pytest.raises(WorkerLost):
        answer.result(0)


def test_a_process_that_hangs_is_ended(workers: Callable[..., Worker]) -> None:
    worker = workers()
    os.kill(worker.pid or 0, signal.SIGSTOP)
    answer = worker.submit(ask(1))
    worker.close(patience=0.5)
    with pytest.raises(WorkerLost):
        answer.result(0)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    """Starts `dying.py` as a server, which ends as it is told to; returns it and its worker's process id."""
    servers: list[subprocess.Popen[str]] = []

    def start(model: str, end: str) -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, str(HERE / "dying.py"), model, str(tmp_path), end]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        servers.append(server)
        assert server.stdout is not None
        return server, int(server.stdout.readline())

    yield start
    for server in servers:
        server.kill()
        server.wait()


@pytest.mark.parametrize("model", ["slow", "retouch-mini"])
def test_when_the_server_is_killed_its_process_ends(started: Started, model: str) -> None:
    server, pid = started(model, "wait")
    server.kill()
    server.wait(LONG)
    until(lambda: gone(pid))


@pytest.mark.parametrize(("end", "code"), [("return", 0), ("error", 1)])
def test_a_server_that_forgets_to_close_ends_all_the_same(started: Started, end: str, code: int) -> None:
    server, pid = started("slow", end)
    assert server.wait(LONG) == code
    until(lambda: gone(pid))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_server_that_is_stopped_while_it_loads_leaves_nothing(
    started: Started, tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "hold").touch()
    server, pid = started("slow", "load")
    server.send_signal(number)
    assert server.wait(LONG) != 0
    (tmp_path / "hold").unlink()
    until(lambda: gone(pid))


# With the bundled weights.


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
