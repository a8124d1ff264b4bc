"""`retouch serve`: edits over HTTP, as OpenAI's and Triton's clients ask for them, and a studio page for people."""

from __future__ import annotations

import argparse
import logging
import resource
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from retouch import config, prices
from retouch.edit import InvalidOption
from retouch.engine.scheduler import POLICIES
from retouch.engine.worker import Options, Worker
from retouch.serve.settings import MB, Settings, read_keys

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to stop. Raises RetouchError for whatever it refuses."""
    args = _parser().parse_args(argv)
    logging.getLogger("retouch").setLevel(logging.INFO if args.verbose else logging.WARNING)
    settings = _settings(args)
    _check_ledger(settings)
    listening = _listen(settings)
    worker = Worker(settings.worker)
    try:
        worker.start()
        run(settings, worker, listening)
    finally:
        worker.close(patience=2.0)  # it is closed already unless the start failed or a second Ctrl-C was pressed
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("retouch serve", "retouch serve [options]", __doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="retouch-mini", help="a bundled name, a pipeline directory or a hub name")
    add("--host", default="127.0.0.1", help="any but a loopback address wants --keys (%(default)s)")
    add("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    add("--keys", type=Path, metavar="FILE", help="TOML of [[tenant]] name, key, rate, concurrency, pixels")
    add("--price", type=float, metavar="USD", help="dollars an hour of the device, for the books")
    add("--prices", type=Path, metavar="FILE", help="else TOML of [[price]] by device; some are known")
    add("--ledger", metavar="ADDRESS", help="of the books: file or SQLAlchemy URL; none keeps none (data folder)")
    add("--policy", choices=list(POLICIES), default="first-come", help="who comes first (%(default)s)")
    add("--tokens", type=int, metavar="N", help="budget of a packed step (found from its measured times)")
    add("--queue", type=int, default=1000, metavar="N", help="edits that may wait (%(default)s)")
    add("--memory", type=int, default=2048, metavar="MB", help="encoded documents on the device (%(default)s)")
    add("--host-memory", type=int, default=0, metavar="MB", help="and of those in host memory (%(default)s)")
    add("--cache", type=Path, metavar="DIR", help="and on disk; uploads are kept there too, over restarts")
    add("--disk", type=int, default=8192, metavar="MB", help="how much in it (%(default)s)")
    add("--documents", choices=("exact", "int8", "fp8"), default="exact", help="how they are kept (%(default)s)")
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
        args.host_memory * MB, args.disk * MB, documents=args.documents,
        log_level=logging.INFO if args.verbose else logging.WARNING,
    )  # fmt: skip
    tenants = () if args.keys is None else read_keys(args.keys)
    table = prices.table(args.prices or config.prices_file())
    ledger = str(config.ledger_file()) if args.ledger is None else args.ledger
    ledger = None if ledger == "none" else ledger
    return Settings(options, args.host, args.port, tenants, args.price, table, ledger, drain_seconds=args.drain)


def _check_ledger(settings: Settings) -> None:
    """One that is damaged or too new is refused before a model is loaded. Raises InvalidOption, InvalidLedger.

    One that is locked or away is not: it may be back, and edits do not wait for it.
    """
    from retouch.ledger import Ledger, LedgerAway

    if settings.ledger is not None:
        with suppress(LedgerAway):
            Ledger(settings.ledger, write=True).close()


def _listen(settings: Settings) -> socket.socket:
    """The socket, before the model is loaded: a port that is taken is said at once. Raises InvalidOption."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # The protocol is named since asyncio would else not know TCP, and leave on what delays every answer by 40 ms (Nagle).
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
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
    from retouch.serve.app import create
    from retouch.serve.listening import Server

    with suppress(ValueError, OSError):  # thousands of clients at once want as many descriptors as may be had
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    listening.listen(4096)
    host, port = listening.getsockname()[:2]
    print(f"Retouch serves http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    Server(create(settings, worker)).run(sockets=[listening])
