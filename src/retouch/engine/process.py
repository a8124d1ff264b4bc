"""The process that holds the engine: its end of the pipe. Messages are pickled tuples: (kind, edit's number, content)."""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np

from retouch.edit import Edit, Edited, RetouchError, WorkerLost
from retouch.engine.parcels import Asked, Changed

if TYPE_CHECKING:
    from retouch.engine.worker import Options

log = logging.getLogger(__name__)

STATS_EVERY = 0.5

LAST_MOMENTS = 60.0
"""Seconds after the server's end at which the process ends whatever it is doing."""


def receive(connection: Connection) -> Any:
    """The next message; None where the other end is gone, or what it sent cannot be read."""
    try:
        return connection.recv()
    except (EOFError, OSError):
        return None
    except Exception:
        log.exception("a message cannot be read")
        return None


def write(connection: Connection, outbox: queue.SimpleQueue[Any], unsent: Callable[[Any, Exception], None]) -> None:
    """Send what is put into the outbox, until it says None or the other end is gone. `unsent` hears of a message that cannot be
    written, and why: somebody waits for what it would have said.
    """
    while (message := outbox.get()) is not None:
        try:
            connection.send(message)
        except OSError:
            return
        except Exception as error:
            log.exception("a message of the kind %r cannot be sent", message[0])
            unsent(message, error)


def serve(connection: Connection, options: Options) -> None:
    """The process's main: load, then edit until the pipe closes. Signals of the terminal are the server's to hear."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(format="retouch worker: %(message)s", level=options.log_level)
    try:
        engines, told = _filters(options)
        engine, info = load_engine(options)
    except BaseException as error:
        connection.send(("failed", None, error if isinstance(error, RetouchError) else WorkerLost(repr(error))))
        return
    for one in engines.values():
        one.results = engine.results  # its keys name weights: they share its room
    _Loop(engine, connection, engines).run(info | {"filters": told})


def _filters(options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """Engines by name, and what the server is told of them."""
    if not options.filters:
        return {}, {}
    from retouch.engine.filters import described, load_filters

    engines = load_filters(options)
    return engines, described(engines)


def load_engine(options: Options) -> tuple[Any, dict[str, Any]]:
    """The engine, and what the server is told of it."""
    import torch

    from retouch.engine.build import load

    if options.threads:
        torch.set_num_threads(options.threads)
    names = (
        "model", "dtype", "device", "cache", "policy", "tokens", "queue", "beside", "memory", "host", "disk", "savings",
        "adapters", "compile", "base", "offload", "device_map",
    )  # fmt: skip
    engine = load(options=options.computed, **{name: getattr(options, name) for name in names})
    model: Any = engine.model
    info = {
        "steps": model.family.steps, "max_side": model.family.max_side, "cell": model.cell,
        "dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device),
        "guidance": model.family.guidance, "threads": torch.get_num_threads(),
    }  # fmt: skip
    return engine, info


@contextmanager
def _vital(what: str) -> Iterator[None]:
    """A thread that cannot go on ends the process, as the main one would: another process begins again what this one had."""
    try:
        yield
    except BaseException:
        log.exception("%s broke the worker", what)
        os._exit(1)


class _Loop:
    """One thread hears, one writes, one tells how it stands, this one ticks.

    Each filter has one of its own that ticks, so that no edit waits until a large picture is upscaled, and no filter for edits;
    they share the device as two processes would.
    """

    def __init__(self, engine: Any, connection: Connection, filters: dict[str, Any]) -> None:
        self.engine, self.connection, self.filters = engine, connection, filters
        self.answers: dict[int, Future[Edited]] = {}
        self.shelf: dict[int, np.ndarray] = {}
        self.outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.closed = threading.Event()

    def run(self, info: dict[str, Any]) -> None:
        writer = threading.Thread(target=write, args=(self.connection, self.outbox, self._unsent), daemon=True)
        writer.start()
        self.outbox.put(("ready", None, info))
        threading.Thread(target=self._hear, daemon=True).start()
        threading.Thread(target=self._tell, daemon=True).start()
        for name, engine in self.filters.items():
            threading.Thread(target=self._tick_apart, args=(name, engine), daemon=True).start()
        self._tick(self.engine)
        self.engine.close()
        self.outbox.put(None)
        writer.join(5)
        os._exit(0)  # a native thread that hangs does not keep the process

    def _tick(self, engine: Any) -> None:
        while not self.closed.is_set():
            if not engine.tick():
                engine.wait(0.2)

    def _tick_apart(self, name: str, engine: Any) -> None:
        with _vital(f"the filter {name}"):
            self._tick(engine)

    def _hear(self) -> None:
        while (message := receive(self.connection)) is not None and message[0] != "close":
            if message[0] == "cancel":
                if answer := self.answers.get(message[1]):
                    answer.cancel()
            else:
                with _vital("what was sent"):
                    self._take(*message[1:])
        self.closed.set()
        if message is None:  # the server is gone, and nobody else will end a step that hangs
            time.sleep(LAST_MOMENTS)
            os._exit(1)

    def _take(self, number: int, asked: Asked, watched: bool, previews: int, filter: str) -> None:
        edit = asked.opened(self.shelf)
        self.answers[number] = answer = Future[Edited]()
        answer.add_done_callback(lambda done: self._answered(number, edit, done))

        def watch(step: int, image: np.ndarray | None) -> None:
            self.outbox.put(("preview", number, (step, None if image is None else Changed.of(edit, image))))

        try:
            engine = self.filters[filter] if filter else self.engine
            engine.submit(edit, watch if watched else None, previews, answer)
        except Exception as error:
            answer.set_exception(error)

    def _answered(self, number: int, edit: Edit, answer: Future[Edited]) -> None:
        self.answers.pop(number, None)
        if answer.cancelled():
            return
        content: Changed | BaseException
        error = answer.exception()
        try:
            content = Changed.of(edit, answer.result().image, answer.result().usage) if error is None else _sendable(error)
        except Exception as failed:  # no memory, say
            content = _sendable(failed)
        self.outbox.put(("answer", number, content))

    def _unsent(self, message: tuple[Any, ...], error: Exception) -> None:
        """An answer that cannot be written has an error in its place. Where not even that can be, or not that the process has
        come up, another process may do better.
        """
        kind, number, content = message
        if kind == "answer" and type(content) is not RuntimeError:
            self.outbox.put(("answer", number, RuntimeError(f"the answer cannot be sent: {type(error).__name__}: {error}")))
        elif kind in ("answer", "ready"):
            os._exit(1)

    def _tell(self) -> None:
        while not self.closed.wait(STATS_EVERY):
            self.outbox.put(("stats", None, self._stats()))

    def _stats(self) -> dict[str, Any]:
        """The model's; those who wait for a filter, or are in it, are in the queue too."""
        stats: dict[str, Any] = self.engine.stats()
        for engine in self.filters.values():
            queue = engine.stats()["queue"]
            for name in ("waiting", "running"):
                stats["queue"][name] += queue[name]
        return stats


def _end_if_broken(error: BaseException) -> None:
    """After a kernel that failed, CUDA fails whatever the process asks for from then on: another one begins its edits again."""
    import torch

    if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
        log.critical("the device is lost to this process, which ends", exc_info=error)
        os._exit(1)


def _sendable(error: BaseException) -> BaseException:
    """Typed errors go as they are; what else may be raised cannot be sure to be read at the other end, so its text goes.

    Ends the process where the device is lost.
    """
    _end_if_broken(error)
    if isinstance(error, RetouchError):
        return error
    log.error("an edit failed", exc_info=error)
    return RuntimeError(f"{type(error).__name__}: {error}")
