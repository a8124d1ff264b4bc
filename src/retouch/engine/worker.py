"""One device, one process: an engine that a server talks to, and that may die without the server's noticing more than a wait.

`Worker` lives in the server. It knows every edit that has no answer yet; where the process (`process.py`) dies, those begin
again on a new one.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import multiprocessing
import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from retouch import config
from retouch.edit import Edit, Edited, RetouchError, WorkerLost
from retouch.engine.flights import Flight, Watch
from retouch.engine.parcels import Changed, Packer
from retouch.engine.process import receive, serve, write
from retouch.engine.savings import SAVINGS
from retouch.models.options import Options as Computed

log = logging.getLogger(__name__)

TRIES = 3
"""How often an edit is begun at most: once, and again on two further processes."""

FAILED_STARTS = 3
"""After so many processes in a row that did not come up, everybody who waits is told so."""


@dataclass(frozen=True, slots=True)
class Options:
    """What `retouch.load` is called with in the worker's process; see there. `filters` are served beside the model."""

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
    computed: Computed = field(default_factory=Computed)
    compile: bool = False
    savings: tuple[str, ...] = SAVINGS
    adapters: Path | None = None
    base: str | None = None
    offload: str | None = None
    device_map: str | None = None
    filters: tuple[str, ...] = ()
    log_level: int = logging.WARNING

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.model.rstrip("/").rsplit("/", 1)[-1]


class Worker:
    """The server's end. `start` blocks until the model is loaded; all else may be called from any thread."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.info: dict[str, Any] = {}
        self.stats: dict[str, Any] = {}
        self.restarts = 0
        self._flights: dict[int, Flight] = {}
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        self._suspects: deque[Flight] = deque()
        self._alone: Flight | None = None
        self._closing = threading.Event()
        self._process: Any = None
        self._outbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._packer = Packer()
        self._ready = threading.Event()

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
        atexit.register(self._kill)
        connection = self._load()
        threading.Thread(target=self._listen, args=(connection,), name="retouch-worker", daemon=True).start()

    def submit(self, edit: Edit, watch: Watch | None = None, previews: int = 0, filter: str = "") -> Future[Edited]:
        """The answer: an Edited, or a typed error. Cancelling it stops the edit at its next step. `filter` names the one that
        it is for, where that is not the model.
        """
        flight = Flight(next(self._numbers), edit, watch, previews, time.monotonic(), filter)
        with self._lock:
            if self._closing.is_set():
                raise WorkerLost("the server is stopping; send the edit to another one.")
            self._flights[flight.number] = flight
            if self.ready and self._alone is None:
                self._send(flight)
        flight.answer.add_done_callback(lambda answer: self._cancelled(flight) if answer.cancelled() else None)
        return flight.answer

    def close(self, patience: float = 30.0) -> None:
        """Let the process keep what it has encoded, and end it. Edits without an answer get WorkerLost."""
        with self._lock:
            self._closing.set()
            process = self._process
            if self.ready:
                self._outbox.put(("close",))
            else:
                self._kill()  # one that still loads has nothing to keep
        if process is not None:
            process.join(patience)
            if process.is_alive():
                process.kill()
                process.join()
        self._fail_all(WorkerLost("the server was stopped before the edit was done; send it again."))
        atexit.unregister(self._kill)

    def _kill(self) -> None:
        """At this process's exit too, which would else wait for the other: that is deaf to SIGTERM."""
        self._closing.set()
        if self._process is not None:
            self._process.kill()

    def _load(self) -> Connection:
        """A process that has come up. Raises what it raised, or what kept it from being begun: too few files, say."""
        with self._lock:
            if self._closing.is_set():
                raise WorkerLost("the server is stopping.")
            connection = self._spawn()
        try:
            first = receive(connection)
            if first is None or first[0] == "failed":
                raise first[2] if first else WorkerLost("the worker's process died while it loaded the model; see its log.")
            self._came_up(connection, first[2])
        except Exception:
            self._process.kill()
            self._process.join()
            connection.close()
            raise
        return connection

    def _spawn(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, self.options), name="retouch-worker", daemon=True)
        try:
            with config.sharing():
                process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._process = process  # one that was begun: no other can be ended, or waited for
        return ours

    def _came_up(self, connection: Connection, info: dict[str, Any]) -> None:
        outbox, packer = queue.SimpleQueue[Any](), Packer()
        unsent = partial(self._unsent, packer)
        threading.Thread(target=write, args=(connection, outbox, unsent), name="retouch-outbox", daemon=True).start()
        self.info = info
        with self._lock:
            self._outbox, self._packer = outbox, packer
            self._ready.set()
            if self._closing.is_set():
                outbox.put(("close",))
            self._send_waiting()

    def _send_waiting(self) -> None:
        """An edit goes alone where one more death would be its last try: it is known then whose fault that was. These go first,
        one after the other, and then all the rest at once.
        """
        with self._lock:
            self._alone = None
            if self._closing.is_set():
                return
            while self._suspects and self._alone is None:
                flight = self._suspects.popleft()
                if flight.number in self._flights and self._send(flight):
                    self._alone = flight
            if self._alone is None:
                for flight in [flight for flight in self._flights.values() if not flight.sent]:
                    self._send(flight)

    def _send(self, flight: Flight) -> bool:
        """False where it is answered instead: it came too late, or there is no memory to send it."""
        try:
            asked = self._packer.packed(flight.left(time.monotonic()))
        except Exception as error:
            self._answer(flight.number, error)
            return False
        flight.sent = True
        flight.tries += 1
        self._outbox.put(("edit", flight.number, asked, flight.watch is not None, flight.previews, flight.filter))
        return True

    def _unsent(self, packer: Packer, message: tuple[Any, ...], error: Exception) -> None:
        """The process never hears of an edit that cannot be written into the pipe, so its answer is given here."""
        if message[0] == "edit":
            with self._lock:
                packer.unsent(message[2])
            self._answer(message[1], RetouchError(f"the edit cannot be sent to the model: {type(error).__name__}: {error}"))

    def _listen(self, connection: Connection | None) -> None:
        """Deliver what the process says; where it dies, begin again with a new one. Runs until `close`."""
        while connection is not None:
            while (message := receive(connection)) is not None:
                self._deliver(message)
            self._died()
            connection = self._another()

    def _died(self) -> None:
        """Whoever was alone in the process was its death; the others are cleared of it."""
        with self._lock:
            self._ready.clear()
            self._outbox.put(None)
            self.stats = {}
            guilty, self._alone = self._alone, None
            for flight in self._flights.values():
                flight.sent = False
                flight.tries = 0 if guilty else flight.tries
            self._suspects = deque(flight for flight in self._flights.values() if flight.tries >= TRIES - 1)
        if guilty is not None:
            text = f"the worker's process died {TRIES} times under this edit; it is not tried again."
            self._answer(guilty.number, WorkerLost(text))
        self._process.kill()
        self._process.join()

    def _another(self) -> Connection | None:
        """A process that has come up; None where the worker is closed."""
        if not self._closing.is_set():
            self.restarts += 1
            log.error("the worker's process ended (%s); starting another", self._process.exitcode)
        for failed in itertools.count(1):
            try:
                return self._load()
            except Exception as error:
                if self._closing.is_set():
                    break
                log.error("the worker's process did not come up: %s", reason := str(error) or repr(error))
            if failed >= FAILED_STARTS:
                self._fail_all(WorkerLost(f"the model's process does not start any more ({reason}); try again later."))
            self._closing.wait(min(30.0, 0.5 * 2**failed))
        return None

    def _deliver(self, message: tuple[Any, ...]) -> None:
        kind, number, content = message
        if kind == "stats":
            self.stats = content
        elif kind == "preview":
            if (flight := self._flights.get(number)) is not None:
                flight.shown(*content)
        else:
            self._answer(number, content)

    def _answer(self, number: int, content: Changed | BaseException) -> None:
        with self._lock:
            flight = self._flights.pop(number, None)
        if flight is not None:
            flight.settle(content)
            self._gone(flight)

    def _cancelled(self, flight: Flight) -> None:
        with self._lock:
            self._flights.pop(flight.number, None)
            self._outbox.put(("cancel", flight.number))
        self._gone(flight)

    def _gone(self, flight: Flight) -> None:
        with self._lock:
            if flight is self._alone:
                self._send_waiting()

    def _fail_all(self, error: RetouchError) -> None:
        for number in list(self._flights):
            self._answer(number, error)
