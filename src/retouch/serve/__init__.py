"""`retouch serve`: edits over HTTP, as OpenAI's and Triton's clients ask for them, and a studio page for people."""

from __future__ import annotations

import argparse
import asyncio
import logging
import resource
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from retouch.edit import InvalidOption
from retouch.engine.scheduler import POLICIES
from retouch.engine.worker import Options, Worker
from retouch.serve.settings import MB, Settings, read_keys

log = logging.getLogger(__name__)

HEAD_SECONDS = 20.0
"""A connection that has not sent the head of its request by then is closed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to stop. Raises RetouchError for whatever it refuses."""
    args = _parser().parse_args(argv)
    logging.getLogger("retouch").setLevel(logging.INFO if args.verbose else logging.WARNING)
    settings = _settings(args)
    listening = _listen(settings)
    worker = Worker(settings.worker)
    worker.start()
    run(settings, worker, listening)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("retouch serve", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="retouch-mini", help="a bundled name, a pipeline directory or a hub name")
    add("--host", default="127.0.0.1", help="any but a loopback address wants --keys (%(default)s)")
    add("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    add("--keys", type=Path, metavar="FILE", help="TOML of [[tenant]] name, key, rate, concurrency, pixels")
    add("--price", type=float, metavar="USD", help="dollars an hour of the device, for the books")
    add("--policy", choices=list(POLICIES), default="first-come", help="who comes first (%(default)s)")
    add("--tokens", type=int, metavar="N", help="budget of a packed step (found from its measured times)")
    add("--queue", type=int, default=1000, metavar="N", help="edits that may wait (%(default)s)")
    add("--memory", type=int, default=2048, metavar="MB", help="encoded documents on the device (%(default)s)")
    add("--host-memory", type=int, default=0, metavar="MB", help="and of those in host memory (%(default)s)")
    add("--cache", type=Path, metavar="DIR", help="and on disk; uploads are kept there too, over restarts")
    add("--disk", type=int, default=8192, metavar="MB", help="how much in it (%(default)s)")
    add("--beside", type=int, metavar="N", help="threads that encode and decode beside the step loop")
    add("--dtype", default="auto", help="auto, float32 or bfloat16; auto takes what is fastest here")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--drain", type=float, default=60.0, metavar="S", help="how long edits may go on after SIGTERM (%(default)s)")
    add("-v", "--verbose", action="store_true")
    return parser


def _settings(args: argparse.Namespace) -> Settings:
    """Raises InvalidOption."""
    for name in ("queue", "memory", "disk"):
        if getattr(args, name) < 1:
            raise InvalidOption(f"--{name} is {getattr(args, name)}; give at least 1.")
    if args.tokens is not None and args.tokens < 1:
        raise InvalidOption(f"--tokens is {args.tokens}; give at least 1, or leave it out.")
    if args.host_memory < 0 or args.drain < 0 or (args.beside or 0) < 0:
        raise InvalidOption("--host-memory, --drain and --beside cannot be negative.")
    options = Options(
        args.model, args.dtype, args.device, args.cache, args.policy, args.tokens, args.queue, args.beside, args.memory * MB,
        args.host_memory * MB, args.disk * MB, log_level=logging.INFO if args.verbose else logging.WARNING,
    )  # fmt: skip
    tenants = () if args.keys is None else read_keys(args.keys)
    return Settings(options, args.host, args.port, tenants, args.price, drain_seconds=args.drain)


def _listen(settings: Settings) -> socket.socket:
    """The socket, before the model is loaded: a port that is taken is said at once. Raises InvalidOption."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
    except OSError as error:
        listening.close()
        raise InvalidOption(
            f"{settings.host}:{settings.port} cannot be served on ({error.strerror or error}); give another --host or --port."
        ) from error
    return listening


def run(settings: Settings, worker: Worker, listening: socket.socket) -> None:
    """Serve on a bound socket until SIGINT or SIGTERM, then let what runs come to its end."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from retouch.serve.app import create

    with suppress(ValueError, OSError):  # thousands of clients at once want as many descriptors as may be had
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    class Patient(H11Protocol):
        """Closes a connection on which the head of a request does not come to its end."""

        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._arm()

        def data_received(self, data: bytes) -> None:
            self._arm()
            super().data_received(data)

        def _arm(self) -> None:
            if self.timer is None and self._between():
                self.timer = self.loop.call_later(HEAD_SECONDS, self._check)

        def _between(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _check(self) -> None:
            self.timer = None
            if self._between() and not self.transport.is_closing():
                self.transport.close()

    app = create(settings, worker)

    class Server(uvicorn.Server):
        """Says no to new requests from the signal on."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            app.state.service.draining = True
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        app, http=Patient, ws="none", log_level="warning", access_log=False, lifespan="on", server_header=False, backlog=4096,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)), timeout_keep_alive=15,
    )  # fmt: skip
    listening.listen(4096)
    host, port = listening.getsockname()[:2]
    print(f"Retouch serves http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    Server(config).run(sockets=[listening])
