"""`retouch serve --record`: what the server is asked, as a trace on file. A thread writes it, and no edit waits for that."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import queue
import secrets
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image

from retouch import picture, trace
from retouch.boxes import Box, Size
from retouch.edit import InvalidOption, OutputFailed
from retouch.picture import Picture
from retouch.serve.orders import Order
from retouch.serve.runs import Run
from retouch.serve.settings import Recording
from retouch.trace import Request, Result, Shape, View

log = logging.getLogger(__name__)

HELD = 128 << 20
"""Bytes of pictures and masks that may wait for the thread. What comes on top is not recorded, and counted."""

KNOWN = 50_000
"""Results, requests and sessions that are remembered, of each."""

RUNS = 1_000_000
"""Stretches of a mask, at most: a line of several megabytes. A request whose mask is finer is left out."""

SUFFIXES = {
    "PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif", "PPM": ".ppm",
    "AVIF": ".avif",
}  # fmt: skip


K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """A request that was taken on. `request` lacks what takes time: session, document, mask of the crop at `box`, hashes.

    `photo` is a picture that came without a file.
    """

    run: str
    request: Request
    size: Size
    user: str | None
    source: bytes
    photo: Picture | None
    mask: np.ndarray | None
    box: Box

    @property
    def bytes(self) -> int:
        kept = len(self.source) if self.photo is None else self.photo.pixels.nbytes
        return kept + len(self.request.prompt) + (0 if self.mask is None else self.mask.nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """A picture's file that a request was answered with."""

    run: str
    variation: int
    data: bytes

    @property
    def bytes(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class _Known:
    """Of a request in the file."""

    number: int
    session: str
    tenant: str


class Recorder:
    """Raises InvalidOption, OutputFailed."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.counts = dict.fromkeys(("written", "left_out", "dropped", "forgotten"), 0)
        self._file = _opened(recording)
        self._end = self._file.write(trace.line(trace.header("recorded")).encode())
        self._salt = secrets.token_bytes(32)
        self._began = time.monotonic()
        self._held = 0
        self._failing: set[Path] = set()
        self._runs: OrderedDict[str, _Known] = OrderedDict()
        self._results: OrderedDict[tuple[str, str], tuple[_Known, int]] = OrderedDict()
        self._sessions: OrderedDict[tuple[str, bytes], str] = OrderedDict()
        self._begun = 0
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[_Asked | _Made | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="retouch-recorder", daemon=True)
        self._thread.start()

    def asked(self, run: str, order: Order, tenant: str) -> None:
        """From the event loop, in the order in which requests are taken on. It neither waits nor fails."""
        edit, fields = order.edits[0], order.fields
        if order.filter or edit.blank or edit.references or edit.guidance is not None or edit.negative or edit.adapters:
            self._count("left_out")  # a trace has no words for it
            return
        request = Request(
            round(time.monotonic() - self._began, 6), "", View("", order.photo.size), edit.prompt, seed=edit.seed, n=fields.n,
            steps=edit.steps, tenant=tenant[:200], priority=edit.priority, deadline=edit.deadline,
        )  # fmt: skip
        photo = None if order.source else order.photo
        if not self._put(_Asked(run, request, order.photo.size, fields.user, order.source, photo, edit.mask, order.box)):
            self._count("dropped")

    def made(self, run: Run, variation: int, data: bytes) -> None:
        """From any thread, before the answer is sent: who edits it on comes later."""
        if not self._put(_Made(run.id, variation, data)):
            self._count("forgotten")

    def close(self, patience: float = 5.0) -> None:
        """Write what is left, for so many seconds."""
        self._inbox.put(None)
        self._thread.join(patience)

    def _put(self, item: _Asked | _Made) -> bool:
        with self._lock:
            if self._held + item.bytes > HELD:
                return False
            self._held += item.bytes
        self._inbox.put(item)
        return True

    def _run(self) -> None:
        while (item := self._inbox.get()) is not None:
            try:
                self._made(item) if isinstance(item, _Made) else self._asked(item)
            except Exception as error:
                self._failed(self.recording.file, error)
                self._count("dropped" if isinstance(item, _Asked) else "forgotten")
            with self._lock:
                self._held -= item.bytes
            del item  # which would else be kept until the next comes
        self._file.close()

    def _count(self, kind: str) -> None:
        with self._lock:
            self.counts[kind] += 1

    def _failed(self, path: Path, error: Exception) -> None:
        """Said once, until it works again."""
        if path not in self._failing:
            log.warning("the recording %s cannot be written (%r); edits go on", path, error)
        self._failing.add(path)

    def _made(self, item: _Made) -> None:
        known = self._runs.get(item.run)
        if known is not None:
            _remember(self._results, (known.tenant, trace.hash_of(item.data)), (known, item.variation))

    def _asked(self, item: _Asked) -> None:
        request = item.request
        mask = None if item.mask is None else _shape_of(item.mask, item.box, item.size)
        if mask is None and item.mask is not None:
            self._count("left_out")
            return
        source = item.source if item.photo is None else picture.encode(item.photo.pixels, "PNG", item.photo)
        hashed = trace.hash_of(source)
        result = self._results.get((request.tenant, hashed))
        session = self._session(request.tenant, item.user, hashed, result)
        document: View | Result
        if result is not None and result[0].session == session:
            document = Result(result[0].number, result[1])
        else:
            document = View(hashed, item.size, self._kept(hashed, source))
        if not self.recording.prompts:
            request = replace(request, prompt="", prompt_hash=self._hidden(request.prompt))
        self._write(trace.line(replace(request, session=session, document=document, mask=mask)).encode())
        _remember(self._runs, item.run, _Known(self.counts["written"], session, request.tenant))
        self._count("written")

    def _session(self, tenant: str, user: str | None, hashed: str, result: tuple[_Known, int] | None) -> str:
        """The user's, where the request names one; else that of the request whose result is edited; else the document's."""
        if not user and result is not None:
            return result[0].session
        key = tenant, hashlib.blake2b((f"u{user}" if user else f"d{hashed}").encode(errors="replace")).digest()
        session = self._sessions.get(key)
        if session is None:
            self._begun += 1
            session = f"s{self._begun}"
        _remember(self._sessions, key, session)
        return session

    def _hidden(self, prompt: str) -> str:
        """The same for the same prompt of this recording. Salted: prompts are few enough to be guessed from plain hashes."""
        return hashlib.blake2b(prompt.encode(), key=self._salt, digest_size=16).hexdigest()

    def _kept(self, hashed: str, data: bytes) -> str:
        """The name under which the picture's file is kept; none where it is not."""
        folder = self.recording.pictures
        if folder is None:
            return ""
        kind = Image.open(io.BytesIO(data), formats=picture.READABLE).format or ""
        path = folder / f"{hashed}{SUFFIXES.get(kind, '.jpg')}"  # JPEG has further names, as for what cameras write
        if not path.exists():
            temporary = folder / f".retouch-{secrets.token_hex(8)}.tmp"
            try:
                temporary.write_bytes(data)
                os.replace(temporary, path)
            except OSError as error:
                with suppress(OSError):
                    temporary.unlink()
                self._failed(folder, error)
                return ""
            self._failing.discard(folder)
        return path.name

    def _write(self, row: bytes) -> None:
        """Whole or not at all, as far as a disk that is full allows it. Raises OSError."""
        try:
            if self._file.write(row) != len(row):
                raise OSError("the disk is full")
        except OSError:
            self._file.truncate(self._end)
            self._file.seek(self._end)
            raise
        self._end += len(row)
        self._failing.discard(self.recording.file)


def _opened(recording: Recording) -> BinaryIO:
    """Unbuffered, so that a process that is killed has written what it has said. Raises InvalidOption, OutputFailed."""
    folder = recording.pictures
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(recording.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError as error:
        raise InvalidOption(f"{error.filename} exists already; give --record and --record-pictures other names.") from error
    except OSError as error:
        raise OutputFailed(f"{error.filename} could not be written ({error.strerror}); record elsewhere.") from error
    return open(descriptor, "wb", buffering=0)


def _shape_of(inside: np.ndarray, box: Box, size: Size) -> Shape | None:
    """A mask (H, W) bool of a crop at `box`, as runs of the picture of `size`; None where these are too many.

    Where the crop's rows begin or end inside is where the picture's do, but that a row's end may be the next one's beginning.
    """
    width, height = size
    padded = np.pad(inside, ((0, 0), (1, 1)))
    turning = padded[:, 1:] != padded[:, :-1]
    if np.count_nonzero(turning) > RUNS:
        return None
    rows, columns = np.nonzero(turning)
    turns = (rows + box[1]) * width + columns + box[0]
    joined = np.flatnonzero(turns[1:] == turns[:-1])
    turns = np.delete(turns, np.concatenate((joined, joined + 1)))
    ends = np.concatenate(([0], turns, [width * height]))
    runs = np.diff(ends)
    return Shape(runs=tuple((runs[:-1] if not runs[-1] else runs).tolist()))


def _remember(known: OrderedDict[K, V], key: K, value: V) -> None:
    """The most recent so many."""
    known[key] = value
    known.move_to_end(key)
    if len(known) > KNOWN:
        known.popitem(last=False)
