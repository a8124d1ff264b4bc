"""A server in a process of its own, from its start until it is gone."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

from retouch import config
from retouch.edit import RetouchError
from retouch.measure.subjects import Subject

LOOK_EVERY = 0.1
STOPPING = 15.0
"""Seconds that a server is given between SIGTERM and SIGKILL."""

TAIL = 20_000
WORDS = 20
"""Bytes of what it printed that are looked at for its last lines, and how many of these are kept."""


class Broken(RetouchError):
    """A subject did not start, died, or did not serve; `log` is the end of what it printed."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class Running:
    """An asynchronous context: entered when the subject is ready, that is, `GET /healthz` gives 200.

    It has a session of its own, so that the terminal's Ctrl-C is for us to pass on, and is ended with everything that it has
    started. Raises Broken.
    """

    def __init__(self, subject: Subject, threads: int, patience: float) -> None:
        self.subject, self.patience = subject, patience
        self.environment = {**os.environ, **config.of_threads(), "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        self.start_seconds = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> Self:
        needs = self.subject.needs
        if needs is not None and not needs.exists():
            raise Broken(f"{needs.name} of its environment {needs.parents[1].name} is not there; install it: make bench-peers.")
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed in `_end`
        started = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                [*self.subject.command, "--port", str(self.port)], stdin=subprocess.DEVNULL, stdout=self._log,
                stderr=subprocess.STDOUT, cwd=self.subject.folder, env=self.environment, start_new_session=True,
            )  # fmt: skip
            await self._ready(started + self.patience)
        except OSError as error:
            self._log.close()
            raise Broken(f"it cannot be started: {error.strerror or error}.") from error
        except BaseException:
            self._end()
            raise
        self.start_seconds = time.perf_counter() - started
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    async def _ready(self, until: float) -> None:
        import httpx

        said = "nothing listens"
        async with httpx.AsyncClient(timeout=2.0) as client:
            while time.perf_counter() < until:
                if self.died:
                    log = self.log()
                    raise Broken(f"it ended with {self.died} before it was ready: {log[log.rfind(chr(10)) + 1 :]}", log)
                with suppress(httpx.HTTPError):
                    status = (await client.get(f"{self.url}/healthz")).status_code
                    if status == 200:
                        return
                    said = f"GET /healthz gives {status}"
                await asyncio.sleep(LOOK_EVERY)
        raise Broken(f"it was not ready within {self.patience:g} s ({said}).", self.log())

    @property
    def died(self) -> str:
        """How the process ended; "" while it runs."""
        code = None if self._process is None else self._process.poll()
        if code is None:
            return ""
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name

    def log(self) -> str:
        """The last lines of what it printed."""
        with suppress(OSError, ValueError):
            file = self._log.fileno()
            text = os.pread(file, TAIL, max(0, os.fstat(file).st_size - TAIL)).decode(errors="replace")
            return "\n".join(line[:300] for line in text.strip().splitlines()[-WORDS:])
        return ""

    def _end(self) -> None:
        process = self._process
        assert process is not None
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOPPING)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # its session's, and so whatever it started
        process.wait()
        self._log.close()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
