"""A server of one's own, and edits sent to it by the clients of `retouch.measure.load`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from retouch.edit import Edit
from retouch.measure.endpoint import EXTENSIONS, Endpoint
from retouch.measure.load import Answer, Replay
from retouch.measure.load import closed_loop as _closed_loop
from retouch.measure.load import open_loop as _open_loop
from retouch.measure.plan import of_edits

READY = "Retouch serves "
FOREVER = 1_000_000
SETTLED = 3.0
"""Seconds until a flood's queue stands."""


@contextmanager
def server(*options: str) -> Iterator[str]:
    """The address of a `retouch serve` with these options, on a free port."""
    command = [sys.executable, "-m", "retouch.cli", "serve", "--port", "0", "--ledger", "none", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith(READY):
            raise RuntimeError(f"{' '.join(command)} did not start")
        yield line.removeprefix(READY).strip()
    finally:
        process.terminate()
        process.wait()


def _endpoint(address: str, edits: Sequence[Edit], named: bool = True) -> Endpoint:
    """A tenant's key is its name. `named`: documents are uploaded before the clock runs, else each edit sends its picture."""
    keys = {edit.tenant: edit.tenant for edit in edits if edit.tenant}
    return Endpoint(address, EXTENSIONS if named else EXTENSIONS - {"documents"}, keys)


def one_by_one(address: str, edits: Sequence[Edit], named: bool = True) -> list[Answer]:
    return closed(address, edits, 1, named)[0]


def closed(address: str, edits: Sequence[Edit], clients: int, named: bool = True) -> tuple[list[Answer], float]:
    """So many clients, each sending its next edit when the last is answered; also the seconds of it all."""

    async def run() -> Replay:
        async with _endpoint(address, edits, named) as target:
            return await _closed_loop(target, of_edits(edits), clients)

    replay = asyncio.run(run())
    return list(replay.answers), replay.seconds


def open_loop(
    address: str, edits: Sequence[Edit], rate: float, seed: int = 0, flood: Sequence[Edit] = (), clients: int = 32
) -> list[Answer]:
    """Poisson arrivals of `rate` a second that wait for no answer. Meanwhile `clients` send `flood` again and again."""

    async def run() -> Replay:
        async with _endpoint(address, [*edits, *flood]) as target:
            rounds = FOREVER if flood else 0
            flooding = asyncio.create_task(_closed_loop(target, of_edits(flood), clients, rounds=rounds))
            await asyncio.sleep(SETTLED if flood else 0.0)
            replay = await _open_loop(target, of_edits(edits, rate, seed))
            flooding.cancel()
            await asyncio.gather(flooding, return_exceptions=True)
            return replay

    return list(asyncio.run(run()).answers)
