"""Edits over HTTP, for OpenAI's and Triton's clients, and a studio for people."""

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
from retouch.engine import savings
from retouch.engine.scheduler import POLICIES
from retouch.engine.worker import Options, Worker
from retouch.models.options import KEYS
from retouch.models.options import Options as Computed
from retouch.serve.filters import check_filters
from retouch.serve.settings import MB, Recording, Settings, read_keys

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to stop. Raises RetouchError for whatever it refuses."""
    args = _parser().parse_args(argv)
    logging.getLogger("retouch").setLevel(logging.INFO if args.verbose else logging.WARNING)
    settings = _settings(args)
    check_filters(settings.worker.filters, settings.worker.name)
    _check_ledger(settings)
    if settings.record is not None and settings.record.file.exists():
        raise InvalidOption(f"{settings.record.file} exists already; give --record another name.")
    listening = _listen(settings)
    worker = Worker(settings.worker)
    try:
        worker.start()
        run(settings, worker, listening)
    finally:
        worker.close(patience=2.0)  # it is closed already unless the start failed or a second Ctrl-C was pressed
    return 0


def _parser() -> argparse.ArgumentParser:
    usage = "retouch serve [options], for edits over HTTP and a studio"
    parser = argparse.ArgumentParser("retouch serve", usage, add_help=False, allow_abbrev=False)
    add = parser.add_argument_group().add_argument
    add("-h", "--help", action="help", help=argparse.SUPPRESS)
    add("--model", default="retouch-mini", help="a bundled name, a directory, a file or a hub name")
    add("--base", metavar="DIR", help="or hub name, with what a .safetensors --model lacks")
    add("--filter", action="append", default=[], metavar="NAME", help="and a one-shot filter, or its .toml; again for more")
    add("--host", default="127.0.0.1", help="any but a loopback address wants --keys (%(default)s)")
    add("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    add("--keys", type=Path, metavar="FILE", help="TOML of [[tenant]]: name, key, limits")
    add("--price", type=float, metavar="USD", help="dollars an hour of the device, for the books")
    add("--prices", type=Path, metavar="FILE", help="else TOML of [[price]] by device; some are known")
    add("--ledger", metavar="ADDRESS", help="of the books: file, URL, or none (in the data folder)")
    policies = ", ".join(POLICIES)
    add("--policy", choices=list(POLICIES), default="first-come", metavar="NAME", help=f"{policies} (%(default)s)")
    add("--tokens", type=int, metavar="N", help="budget of a packed step (found from step times)")
    add("--queue", type=int, default=1000, metavar="N", help="edits that may wait (%(default)s)")
    add("--bodies", type=int, default=1024, metavar="MB", help="of requests that are read at once (%(default)s)")
    add("--pixels", type=float, default=1000, metavar="MP", help="of pictures in flight, in millions (%(default)s)")
    add("--memory", type=int, default=2048, metavar="MB", help="encoded documents on the device (%(default)s)")
    add("--host-memory", type=int, default=0, metavar="MB", help="and of those in host memory (%(default)s)")
    add("--cache", type=Path, metavar="DIR", help="and on disk; uploads are kept there too, over restarts")
    add("--disk", type=int, default=8192, metavar="MB", help="documents; uploads as much again, prompts 1/8 (%(default)s)")
    add("--documents", choices=KEYS, default="exact", metavar="FORM", help="kept exact, in int8 or in fp8 (%(default)s)")
    add("--adapters", type=Path, metavar="DIR", help="of LoRA adapters that edits may wear")
    add("--refresh", metavar="F,K", help="full steps: the first F, then every K-th")
    add("--context", type=int, metavar="PX", help="seen around the mask (the whole picture)")
    add("--savings", default="all", metavar="NAMES", help=f"all, none, or of {','.join(savings.SAVINGS)} (%(default)s)")
    add("--compile", action="store_true", help="take a minute or two to compile the decoder")
    add("--beside", type=int, metavar="N", help="threads that encode and decode beside the step loop")
    add("--dtype", default="auto", help="auto (the fastest here), float32 or bfloat16")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--offload", metavar="HOW", help="stages: the model's parts are on the device in turn")
    add("--device-map", metavar="HOW", help="balanced or auto: the transformer over several GPUs")
    add("--record", type=Path, metavar="FILE", help="a trace of what is asked, hashed or --record-prompts")
    add("--record-prompts", action="store_true", help=argparse.SUPPRESS)
    add("--record-pictures", type=Path, metavar="IN", help="and pictures, in this folder")
    add("--request-seconds", type=float, default=600.0, metavar="S", help="that an edit without a deadline has (%(default)s)")
    add("--drain", type=float, default=60.0, metavar="S", help="how long edits may go on after SIGTERM (%(default)s)")
    add("-v", "--verbose", action="store_true")
    return parser


def _settings(args: argparse.Namespace) -> Settings:
    """Raises InvalidOption."""
    for name in ("queue", "memory", "disk"):
        if getattr(args, name) < 1:
            raise InvalidOption(f"--{name} is {getattr(args, name)}; give at least 1.")
    computed = Computed(keys=args.documents, refresh=args.refresh, context=args.context)
    if args.tokens is not None and args.tokens < 1:
        raise InvalidOption(f"--tokens is {args.tokens}; give at least 1, or leave it out.")
    if args.host_memory < 0 or args.drain < 0 or (args.beside or 0) < 0:
        raise InvalidOption("--host-memory, --drain and --beside cannot be negative.")
    if not 0 < args.pixels < 1e9:
        raise InvalidOption(f"--pixels is {args.pixels:g}; give millions of pixels, above 0.")
    if args.record is None and (args.record_prompts or args.record_pictures is not None):
        raise InvalidOption("--record-prompts and --record-pictures say what is in a recording; give --record FILE too.")
    recording = None if args.record is None else Recording(args.record, args.record_prompts, args.record_pictures)
    options = Options(
        args.model, args.dtype, args.device, args.cache, args.policy, args.tokens, args.queue, args.beside, args.memory * MB,
        args.host_memory * MB, args.disk * MB, computed=computed, compile=args.compile, adapters=args.adapters,
        base=args.base, offload=args.offload, device_map=args.device_map,
        filters=tuple(args.filter), savings=savings.parsed(args.savings),
        log_level=logging.INFO if args.verbose else logging.WARNING,
    )  # fmt: skip
    tenants = () if args.keys is None else read_keys(args.keys)
    table = prices.table(args.prices or config.prices_file())
    ledger = str(config.ledger_file()) if args.ledger is None else args.ledger
    ledger = None if ledger == "none" else ledger
    return Settings(
        options, args.host, args.port, tenants, args.price, table, ledger, request_seconds=args.request_seconds,
        drain_seconds=args.drain, bodies=args.bodies * MB, pixels=round(args.pixels * 1e6), record=recording,
    )  # fmt: skip


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
    app = create(settings, worker)
    try:
        Server(app).run(sockets=[listening])
    finally:
        app.state.service.close()  # it is closed already unless a second Ctrl-C was pressed
