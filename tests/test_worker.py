"""The process that may die, with a model that dies where it is told to (`dying.py`): each edit has one right answer."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dying
from patience import LONG, Heard, gone, until
from retouch import config
from retouch.edit import Edit, Edited, RetouchError, WorkerLost
from retouch.engine.worker import Options, Worker
from test_engine_flights import Stuck

HERE = Path(__file__).parent
Started = Callable[[str, str], tuple["subprocess.Popen[str]", int]]


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


def of_process(worker: Worker) -> dict[str, str]:
    """The variables that the worker's process began with."""
    lines = Path(f"/proc/{worker.pid}/environ").read_bytes().decode().split("\0")
    return dict(line.split("=", 1) for line in lines if line)


def test_its_threads_sleep_sooner_than_openmp_lets_them(
    workers: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the user has not chosen; and the variable is the process's, not ours."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert of_process(workers())["GOMP_SPINCOUNT"] == config.SPINS
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert "GOMP_SPINCOUNT" not in of_process(workers())
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    assert of_process(workers())["GOMP_SPINCOUNT"] == os.environ["GOMP_SPINCOUNT"] == "5"


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


def test_a_process_that_lacks_a_picture_ends_and_the_next_one_has_it(workers: Callable[..., Worker]) -> None:
    worker, edit = workers(), ask(7)
    worker._packer.packed(edit)  # a message that never arrived
    assert right(worker.submit(edit), 7)
    assert worker.restarts == 1


@pytest.mark.parametrize("stage", ["encode", "step", "finish"])
def test_a_process_that_lost_its_device_ends_and_the_next_one_answers_everybody(
    workers: Callable[..., Worker], stage: str
) -> None:
    """For whatever it would ask of the device would fail from then on."""
    worker = workers()
    answers = [worker.submit(ask(seed, f"lose once in {stage}" if seed == 1 else "a cat")) for seed in range(3)]
    assert all(right(answer, seed) for seed, answer in enumerate(answers))
    assert worker.restarts == 1


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


def test_where_no_process_can_be_begun_it_is_tried_again(
    workers: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For want of files or of processes; closing meanwhile is no trouble either."""
    monkeypatch.setattr("retouch.engine.worker.FAILED_STARTS", 1)
    ending, worker = workers(), workers()
    with monkeypatch.context() as short:

        def full(process: Any) -> Any:
            raise OSError(errno.EMFILE, "Too many open files")

        short.setattr(SpawnProcess, "_Popen", staticmethod(full))
        for one in (worker, ending):
            os.kill(one.pid or 0, signal.SIGKILL)
            until(lambda one=one: not one.ready)
            with pytest.raises(WorkerLost, match=r"does not start any more.*Too many open files"):
                one.submit(ask(1)).result(LONG)
        ending.close()
        with pytest.raises(OSError, match="Too many"):
            Worker(worker.options).start()
    assert right(worker.submit(ask(7)), 7)


def test_an_edit_that_cannot_be_sent_is_answered_and_its_picture_sent_with_the_next(workers: Callable[..., Worker]) -> None:
    worker, stuck = workers(), ask(1, adapters=(("ink", Stuck(1.0)),))
    with pytest.raises(RetouchError, match="cannot be sent to the model: ValueError: stuck"):
        worker.submit(stuck).result(LONG)
    assert right(worker.submit(replace(stuck, seed=2, adapters=())), 2)
    assert worker.restarts == 0


def test_an_answer_that_cannot_be_sent_is_an_error(workers: Callable[..., Worker]) -> None:
    worker = workers()
    with pytest.raises(RuntimeError, match="the answer cannot be sent"):
        worker.submit(ask(1, "jam")).result(LONG)
    assert right(worker.submit(ask(2)), 2)
    assert worker.restarts == 0


def test_an_answer_that_the_server_cannot_give_ends_no_listening(
    workers: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = workers()
    with monkeypatch.context() as short:

        def full(changed: Any, edit: Edit) -> Edited:
            raise MemoryError("no room")

        short.setattr("retouch.engine.parcels.Changed.edited", full)
        with pytest.raises(MemoryError, match="no room"):
            worker.submit(ask(1)).result(LONG)
    assert right(worker.submit(ask(2)), 2)


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
