"""One device, one process: an engine that a server talks to, and that may die without the server's noticing more than a wait.

`Worker` lives in the server. It knows every edit that has no answer yet; where the process dies, those begin again on a new
one.
Messages are pickled tuples over a pipe: (kind, edit's number, content).
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from retouch.edit import DeadlinePassed, Edit, Edited, RetouchError, WorkerLost

log = logging.getLogger(__name__)

Watch = Callable[[int, np.ndarray | None], None]

TRIES = 3
"""How often an edit is begun at most: once, and again on two further processes."""

FAILED_STARTS = 3
"""After so many processes in a row that did not come up, everybody who waits is told so."""

STATS_EVERY = 0.5


@dataclass(frozen=True, slots=True)
class Options:
    """What `retouch.load` is called with in the worker's process; see there."""

    model: str = "retouch-mini"
    dtype: str = "auto"
    device: str = "auto"
    cache: Path | None = None
    policy: str = "first-come"
    tokens: int | None = None
    queue: int = 1000
    beside: int | None = None
    memory: int = 2 << 30
    host: int = 0
    disk: int = 8 << 30
    threads: int | None = None
    documents: str = "exact"
    log_level: int = logging.WARNING


@dataclass(slots=True, eq=False)
class _Flight:
    """An edit without an answer yet."""

    number: int
    edit: Edit
    watch: Watch | None
    previews: int
    arrived: float
    tries: int = 0
    answer: Future[Edited] = field(default_factory=Future)


class Worker:
    """The server's end. `start` blocks until the model is loaded; all else may be called from any thread."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.info: dict[str, Any] = {}
        self.stats: dict[str, Any] = {}
        self.restarts = 0
        self._flights: dict[int, _Flight] = {}
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        self._closing = False
        self._process: Any = None
        self._outbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._ready = threading.Event()
        self._watcher: threading.Thread | None = None

    @property
    def ready(self) -> bool:
        return self._ready.is_set()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def waiting(self) -> int:
        """Edits without an answer."""
        return len(self._flights)

    def start(self) -> None:
        """Raises what loading the model raises."""
        connection = self._spawn()
        first = _receive(connection)
        if first is None or first[0] == "failed":
            self._process.join()
            raise first[2] if first else WorkerLost("the worker's process died while it loaded the model; see its log.")
        self._came_up(connection, first[2])
        self._watcher = threading.Thread(target=self._listen, args=(connection,), name="retouch-worker", daemon=True)
        self._watcher.start()

    def submit(self, edit: Edit, watch: Watch | None = None, previews: int = 0) -> Future[Edited]:
        """The answer: an Edited, or a typed error. Cancelling it stops the edit at its next step."""
        flight = _Flight(next(self._numbers), edit, watch, previews, time.monotonic())
        with self._lock:
            if self._closing:
                raise WorkerLost("the server is stopping; send the edit to another one.")
            self._flights[flight.number] = flight
            self._send(flight)
        flight.answer.add_done_callback(lambda answer: self._cancelled(flight) if answer.cancelled() else None)
        return flight.answer

    def close(self, patience: float = 30.0) -> None:
        """Let the process keep what it has encoded, and end it. Edits without an answer get WorkerLost."""
        with self._lock:
            self._closing = True
        self._outbox.put(("close",))
        if self._process is not None:
            self._process.join(patience)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        self._fail_all(WorkerLost("the server was stopped before the edit was done; send it again."))

    def _spawn(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self.options), name="retouch-worker", daemon=True)
        self._process.start()
        theirs.close()
        return ours

    def _came_up(self, connection: Connection, info: dict[str, Any]) -> None:
        self.info = info
        self._outbox = outbox = queue.SimpleQueue[Any]()
        threading.Thread(target=_write, args=(connection, outbox), name="retouch-outbox", daemon=True).start()
        with self._lock:
            self._ready.set()
            for flight in list(self._flights.values()):
                self._send(flight)

    def _send(self, flight: _Flight) -> None:
        """The deadline that is sent is what is left of it."""
        if not self._ready.is_set():
            return  # it is sent when the next process has come up
        edit = flight.edit
        if edit.deadline is not None:
            left = edit.deadline - (time.monotonic() - flight.arrived)
            if left <= 0:
                passed = "its time ran out before the edit was done; allow more, or come later."
                self._answer(flight.number, DeadlinePassed(passed))
                return
            edit = replace(edit, deadline=left)
        flight.tries += 1
        self._outbox.put(("edit", flight.number, edit, flight.watch is not None, flight.previews))

    def _listen(self, connection: Connection) -> None:
        """Deliver what the process says; where it dies, begin again with a new one. Runs until `close`."""
        failed = 0
        while True:
            message = _receive(connection)
            if message is not None:
                self._deliver(message)
                failed = 0
                continue
            self._ready.clear()
            self._outbox.put(None)
            self._process.kill()
            self._process.join()
            if self._closing:
                return
            self.restarts += 1
            log.error("the worker's process ended (%s); starting another", self._process.exitcode)
            self._give_up_often_tried()
            while not self._closing:
                connection = self._spawn()
                first = _receive(connection)
                if first is not None and first[0] == "ready":
                    self._came_up(connection, first[2])
                    break
                failed += 1
                self._process.join()
                reason = first[2] if first is not None else "it died while loading"
                log.error("the worker's process did not come up: %s", reason)
                if failed >= FAILED_STARTS:
                    self._fail_all(WorkerLost(f"the model's process does not start any more ({reason}); try again later."))
                time.sleep(min(30.0, 0.5 * 2**failed))

    def _deliver(self, message: tuple[Any, ...]) -> None:
        kind, number, content = message
        if kind == "stats":
            self.stats = content
        elif kind == "preview":
            flight = self._flights.get(number)
            if flight is not None and flight.watch is not None and not flight.answer.done():
                flight.watch(*content)
        else:
            self._answer(number, content)

    def _answer(self, number: int, content: Edited | BaseException) -> None:
        with self._lock:
            flight = self._flights.pop(number, None)
        if flight is None or not flight.answer.set_running_or_notify_cancel():
            return
        if isinstance(content, BaseException):
            flight.answer.set_exception(content)
        else:
            flight.answer.set_result(content)

    def _cancelled(self, flight: _Flight) -> None:
        with self._lock:
            self._flights.pop(flight.number, None)
        self._outbox.put(("cancel", flight.number))

    def _give_up_often_tried(self) -> None:
        for flight in list(self._flights.values()):
            if flight.tries >= TRIES:
                text = f"the worker's process died {TRIES} times under this edit; it is not tried again."
                self._answer(flight.number, WorkerLost(text))

    def _fail_all(self, error: RetouchError) -> None:
        for number in list(self._flights):
            self._answer(number, error)


def _receive(connection: Connection) -> Any:
    """The next message; None where the other end is gone."""
    try:
        return connection.recv()
    except (EOFError, OSError):
        return None


def _write(connection: Connection, outbox: queue.SimpleQueue[Any]) -> None:
    """Send what is put into the outbox, until it says None or the other end is gone."""
    while (message := outbox.get()) is not None:
        try:
            connection.send(message)
        except OSError:
            return


def serve(connection: Connection, options: Options) -> None:
    """The process's main: load, then edit until the pipe closes. Signals of the terminal are the server's to hear."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(format="retouch worker: %(message)s", level=options.log_level)
    try:
        engine, info = _load(options)
    except BaseException as error:
        connection.send(("failed", None, error if isinstance(error, RetouchError) else WorkerLost(repr(error))))
        return
    _Loop(engine, connection).run(info)


def _load(options: Options) -> tuple[Any, dict[str, Any]]:
    import torch

    from retouch.engine.build import load
    from retouch.models.flux2 import Options as Kept

    if options.threads:
        torch.set_num_threads(options.threads)
    names = ("model", "dtype", "device", "cache", "policy", "tokens", "queue", "beside", "memory", "host", "disk")
    kept = Kept(keys=options.documents)
    engine = load(options=kept, **{name: getattr(options, name) for name in names})
    model: Any = engine.model
    info = {
        "steps": model.family.steps, "max_side": model.family.max_side, "cell": model.cell,
        "dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device),
        "guidance": model.family.guidance, "threads": torch.get_num_threads(),
    }  # fmt: skip
    return engine, info


class _Loop:
    """The worker's end: one thread hears, one writes, this one ticks."""

    def __init__(self, engine: Any, connection: Connection) -> None:
        self.engine, self.connection = engine, connection
        self.answers: dict[int, Future[Edited]] = {}
        self.outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.closed = threading.Event()

    def run(self, info: dict[str, Any]) -> None:
        writer = threading.Thread(target=_write, args=(self.connection, self.outbox), daemon=True)
        writer.start()
        self.outbox.put(("ready", None, info))
        threading.Thread(target=self._hear, daemon=True).start()
        threading.Thread(target=self._tell, daemon=True).start()
        while not self.closed.is_set():
            if not self.engine.tick():
                self.engine.wait(0.2)
        self.engine.close()
        self.outbox.put(None)
        writer.join(5)
        os._exit(0)  # a native thread that hangs does not keep the process

    def _hear(self) -> None:
        while (message := _receive(self.connection)) is not None and message[0] != "close":
            if message[0] == "cancel":
                if answer := self.answers.get(message[1]):
                    answer.cancel()
            else:
                self._take(*message[1:])
        self.closed.set()

    def _take(self, number: int, edit: Edit, watched: bool, previews: int) -> None:
        self.answers[number] = answer = Future[Edited]()
        answer.add_done_callback(lambda done: self._answered(number, done))
        watch = (lambda step, image: self.outbox.put(("preview", number, (step, image)))) if watched else None
        try:
            self.engine.submit(edit, watch, previews, answer)
        except Exception as error:
            answer.set_exception(error)

    def _answered(self, number: int, answer: Future[Edited]) -> None:
        self.answers.pop(number, None)
        if not answer.cancelled():
            self.outbox.put(("answer", number, answer.exception() or answer.result()))

    def _tell(self) -> None:
        while not self.closed.wait(STATS_EVERY):
            self.outbox.put(("stats", None, self.engine.stats()))
