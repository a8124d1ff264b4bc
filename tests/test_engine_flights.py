"""What cannot be sent or given between the server and the worker's process is an error of that edit, and nobody else's."""

from __future__ import annotations

import pickle
import queue
import threading
from concurrent.futures import Future
from multiprocessing.connection import Pipe
from typing import Any

import numpy as np
import pytest

from retouch.edit import DeadlinePassed, Edit, Edited, Usage
from retouch.engine import process
from retouch.engine.flights import Flight
from retouch.engine.parcels import Changed, Packer
from retouch.engine.process import _Loop, write

IMAGE = np.zeros((16, 16, 3), np.uint8)
EDIT = Edit(IMAGE, "a cat", deadline=5.0)


class Stuck(float):
    """A number that no pipe can carry."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError("stuck")


def flight() -> Flight:
    return Flight(0, EDIT, None, 0, arrived=100.0)


def test_an_answer_that_cannot_be_made_is_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(changed: Changed, edit: Edit) -> Edited:
        raise MemoryError("no room")

    monkeypatch.setattr(Changed, "edited", full)
    one = flight()
    one.settle(Changed(IMAGE))
    with pytest.raises(MemoryError, match="no room"):
        one.answer.result(0)


def test_one_that_was_taken_back_has_no_answer() -> None:
    one = flight()
    one.answer.cancel()
    one.settle(ValueError())
    assert one.answer.cancelled()


def test_a_deadline_goes_on_counting() -> None:
    assert flight().left(103.0).deadline == 2.0
    with pytest.raises(DeadlinePassed):
        flight().left(105.0)


def test_writing_says_what_it_could_not_and_goes_on() -> None:
    ours, theirs = Pipe()
    outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    unsent: list[tuple[Any, str]] = []
    for message in (("a", 1, Stuck()), ("b", 2, "content"), None):
        outbox.put(message)
    write(ours, outbox, lambda message, error: unsent.append((message[1], str(error))))
    assert unsent == [(1, "stuck")]
    assert theirs.recv() == ("b", 2, "content")


def test_pictures_that_were_not_sent_are_sent_with_the_next_edit() -> None:
    packer, shelf = Packer(), dict[int, np.ndarray]()
    gone = IMAGE.copy()
    pickle.loads(pickle.dumps(packer.packed(Edit(gone, "a cat")))).opened(shelf)
    del gone
    unsent = packer.packed(EDIT)
    assert (len(unsent.pictures), len(unsent.gone)) == (1, 1)
    packer.unsent(unsent)
    pickle.loads(pickle.dumps(packer.packed(EDIT))).opened(shelf)
    assert len(shelf) == 1, "and what was to go is gone"
    assert packer.bytes == IMAGE.nbytes
    assert not packer.packed(EDIT).pictures


@pytest.fixture
def loop() -> _Loop:
    return _Loop(None, None, {})  # type: ignore[arg-type]


def test_an_answer_that_the_process_cannot_pack_is_an_error(loop: _Loop) -> None:
    answer: Future[Edited] = Future()
    answer.set_result(Edited(None, 0, Usage()))  # type: ignore[arg-type]
    loop._answered(3, EDIT, answer)
    kind, number, content = loop.outbox.get_nowait()
    assert (kind, number, type(content)) == ("answer", 3, RuntimeError)


def test_an_answer_that_cannot_be_written_has_an_error_in_its_place(loop: _Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(process.os, "_exit", ended.append)
    ours, theirs = Pipe()
    for content in (Changed(IMAGE, Usage(dollars=Stuck())), None):
        loop.outbox.put(None if content is None else ("answer", 7, content))
    write(ours, loop.outbox, loop._unsent)
    loop.outbox.put(None)
    write(ours, loop.outbox, loop._unsent)
    kind, number, content = theirs.recv()
    assert (kind, number) == ("answer", 7)
    assert "cannot be sent: ValueError: stuck" in str(content)
    assert not ended
    for message in (("answer", 7, content), ("ready", None, {})):
        loop._unsent(message, MemoryError())
    loop._unsent(("stats", None, {}), MemoryError())
    assert ended == [1, 1], "another process may do better"


def test_a_preview_that_is_not_heard_is_nobody_elses_affair() -> None:
    one = flight()
    heard = threading.Event()

    def watch(step: int, image: np.ndarray | None) -> None:
        heard.set()
        raise ValueError("the listener's loop is closed")

    one.watch = watch
    one.shown(1, Changed(IMAGE))
    assert heard.is_set()
