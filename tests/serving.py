"""A live server around a worker that paints: the shared pieces of the tests of the serve room.

`python tests/serving.py SECONDS [DRAIN [FILE]]` serves such a worker, which takes SECONDS an edit, in a process of its own, and
records into FILE.
"""

from __future__ import annotations

import base64
import io
import json
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import numpy as np
from PIL import Image

from retouch import serve
from retouch.edit import Edit, Edited, QueueFull, Usage, WorkerLost
from retouch.engine.worker import Options
from retouch.serve import listening
from retouch.serve.listening import Server
from retouch.serve.settings import Recording, Settings

PATIENCE = 20.0
"""Seconds after which what has not happened is not going to."""

TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error", 504: "server_error"}
"""Status -> `type` of the error; "invalid_request_error" else."""

Watch = Callable[[int, np.ndarray | None], None]


@dataclass(eq=False)
class Asked:
    """One edit that the worker was given."""

    edit: Edit
    watch: Watch | None
    previews: int
    filter: str = ""
    answer: Future[Edited] = field(default_factory=Future)


class Painter:
    """In the place of `retouch.engine.worker.Worker`: fills each mask with its seed's colour, in one thread, in order.

    It begins each edit and shows its previews at once; with `hold`, it then waits for `release`. Like the engine, it refuses
    through the answer where `options.queue` edits wait. `fault` is what it answers instead of beginning an edit, `seconds` is
    what an edit takes.
    """

    def __init__(self, options: Options | None = None, hold: bool = False, seconds: float = 0.0) -> None:
        self.options = options or Options()
        self.info = {
            "steps": 4,
            "max_side": 512,
            "cell": 16,
            "dtype": "float32",
            "device": "cpu",
            "guidance": 1.0,
            "threads": 2,
        }
        self.stats: dict[str, Any] = {}
        self.ready, self.restarts, self.closed = True, 0, False
        self.asked: list[Asked] = []
        self.cancelled: list[Edit] = []
        self.fault: Exception | None = None
        self.seconds = seconds
        self._open: set[Asked] = set()
        self._changed = threading.Condition()
        self._inbox: queue.SimpleQueue[Asked | None] = queue.SimpleQueue()
        self._released = threading.Event()
        if not hold:
            self._released.set()
        self._thread = threading.Thread(target=self._paint, name="painter", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._open)

    def submit(self, edit: Edit, watch: Watch | None = None, previews: int = 0, filter: str = "") -> Future[Edited]:
        one = Asked(edit, watch, previews, filter)
        with self._changed:
            if self.closed:
                raise WorkerLost("the server is stopping; send the edit to another one.")
            full = len(self._open) >= self.options.queue
            self.asked.append(one)
            self._open.add(one)
            self._changed.notify_all()
        one.answer.add_done_callback(lambda answer: self._left(one))
        if full:
            one.answer.set_exception(QueueFull(f"{self.options.queue} edits wait already; try again later.", retry_after=3.2))
        else:
            self._inbox.put(one)
        return one.answer

    def release(self) -> None:
        self._released.set()

    def hold(self) -> None:
        self._released.clear()

    def close(self, patience: float = 30.0) -> None:
        with self._changed:
            self.closed = True
        self._released.set()
        self._inbox.put(None)
        self._thread.join(PATIENCE)

    def wait(self, so: Callable[[], bool]) -> None:
        """Until `so`, which looks at what was asked, cancelled or is waiting."""
        with self._changed:
            assert self._changed.wait_for(so, PATIENCE), (len(self.asked), len(self.cancelled), self.waiting)

    def _left(self, one: Asked) -> None:
        with self._changed:
            self._open.discard(one)
            if one.answer.cancelled():
                self.cancelled.append(one.edit)
            self._changed.notify_all()

    def _paint(self) -> None:
        while self._turn(self._inbox.get()):
            pass

    def _turn(self, one: Asked | None) -> bool:
        """Paint one; false where there is to be no more."""
        if one is None or one.answer.done():
            return one is not None
        if self.fault is not None:
            with suppress(InvalidStateError):
                one.answer.set_exception(self.fault)
            return True
        if one.watch is not None:
            one.watch(0, None)
            for step in range(one.previews):
                one.watch(step + 1, painted(one.edit, shade=step))
        time.sleep(self.seconds)
        while not self._released.wait(0.01) and not one.answer.done():
            pass
        if not one.answer.done() and one.answer.set_running_or_notify_cancel():
            one.answer.set_result(Edited(painted(one.edit), one.edit.seed, usage_of(one.edit)))
        return True


def painted(edit: Edit, shade: int = 9) -> np.ndarray:
    image = edit.image.copy()
    image[..., :3][... if edit.mask is None else edit.mask] = (edit.seed % 256, shade, 200)
    return image


def usage_of(edit: Edit) -> Usage:
    steps, tokens = edit.steps or 4, edit.image.shape[0] * edit.image.shape[1] // 256
    share = 1.0 if edit.mask is None else float(edit.mask.mean())
    return Usage(
        {"document": 0.5, "step": 0.25}, max(1, round(tokens * share)) * steps, tokens * steps, 7, steps, cache_hits=("prompt",)
    )


class Serving:
    """A server on a free port, in a thread. `with Serving() as server: server.post(...)`."""

    def __init__(self, settings: Settings | None = None, worker: Painter | None = None) -> None:
        self.worker = worker or Painter(settings.worker if settings is not None else None)
        self.settings = replace(settings or Settings(), worker=self.worker.options, port=0)
        self.server: Any = None

    def __enter__(self) -> Serving:
        caught: queue.SimpleQueue[Any] = queue.SimpleQueue()

        class Caught(Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                caught.put(self)

        bound = serve._listen(self.settings)
        self.address: tuple[str, int] = bound.getsockname()[:2]
        with mock.patch.object(listening, "Server", Caught):
            self.thread = threading.Thread(target=serve.run, args=(self.settings, self.worker, bound), daemon=True)
            self.thread.start()
            self.server = caught.get(timeout=PATIENCE)
        self.service = self.server.config.app.state.service
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE, verify=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.worker.release()
        self.stop()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()

    def stop(self) -> None:
        """As SIGTERM does."""
        self.server.handle_exit(signal.SIGTERM, None)

    @property
    def gate(self) -> Any:
        """The middleware that counts open requests."""
        layer = self.server.config.app.middleware_stack
        while type(layer).__name__ != "Gate":
            layer = layer.app
        return layer

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.client.get(path, **more)

    def post(self, path: str, **more: Any) -> httpx.Response:
        return self.client.post(path, **more)

    def edit(self, image: bytes, mask: bytes | None = None, path: str = "/v1/images/edits", **fields: Any) -> httpx.Response:
        return self.client.post(path, **form(image, mask, **fields))

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=PATIENCE)

    def idle(self) -> None:
        """Wait until nothing is open, running or waiting any more."""
        end = time.monotonic() + PATIENCE
        while self.gate.open or self.service.live or self.worker.waiting or +self.service.allowance.running:
            assert time.monotonic() < end, (self.gate.open, self.service.live, self.worker.waiting)
            time.sleep(0.01)


def form(image: bytes | Sequence[bytes] | None, mask: bytes | None = None, **fields: Any) -> dict[str, Any]:
    """Arguments of httpx for a multipart edit."""
    images = [] if image is None else [image] if isinstance(image, bytes) else image
    files = [("image" if len(images) == 1 else "image[]", ("picture", data, "image/png")) for data in images]
    if mask is not None:
        files.append(("mask", ("mask.png", mask, "image/png")))
    data = {"prompt": "a red apple", **{name: text(value) for name, value in fields.items() if value is not None}}
    return {"data": data, "files": files} if files else {"data": data, "files": [("none", (None, ""))][:0] or None}


def text(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else str(value)


def photo(width: int = 64, height: int = 48, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, channels), np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def area(width: int = 64, height: int = 48, box: tuple[int, int, int, int] = (10, 8, 40, 30)) -> np.ndarray:
    """(H, W) bool, true in the box."""
    mask = np.zeros((height, width), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def alpha_mask(mask: np.ndarray) -> bytes:
    """OpenAI's: transparent where it is edited."""
    return encoded(np.dstack([np.zeros((*mask.shape, 3), np.uint8), np.where(mask, 0, 255).astype(np.uint8)]))


def white_mask(mask: np.ndarray) -> bytes:
    return encoded(np.where(mask, 255, 0).astype(np.uint8))


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def decoded(b64: str | bytes) -> np.ndarray:
    """Of a file's bytes, or of their base64."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64) if isinstance(b64, str) else b64)))


def made(response: httpx.Response, index: int = 0) -> np.ndarray:
    """A picture of an answer."""
    assert response.status_code == 200, response.text
    return decoded(response.json()["data"][index]["b64_json"])


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Server-sent events; the name of each is the type in its data."""
    name = None
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            assert event["type"] == name
            yield event
        else:
            assert not line or line.startswith(":"), line


def refused(response: httpx.Response, status: int, code: str, param: str | None = None, says: str = "") -> None:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert error["type"] == TYPES.get(status, "invalid_request_error")
    assert says in error["message"]
    if status in (429, 503):
        assert int(response.headers["retry-after"]) >= 1


if __name__ == "__main__":
    recording = Recording(Path(sys.argv[3])) if len(sys.argv) > 3 else None
    settings = Settings(port=0, drain_seconds=float(sys.argv[2]) if len(sys.argv) > 2 else 20, record=recording)
    serve.run(settings, Painter(seconds=float(sys.argv[1])), serve._listen(settings))  # type: ignore[arg-type]
