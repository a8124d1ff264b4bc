"""Shared pieces of the tests of the ledger: entries, a writer, a Postgres, and a process that writes until it is killed.

`python tests/books.py ADDRESS RUN COUNT RATE` writes COUNT entries of the runs RUN-0, ... at RATE a second, and says each.
"""

from __future__ import annotations

import itertools
import logging
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retouch.ledger import Entry, Lease, Ledger, Writer
from retouch.ledger import sums as ledger_sums
from retouch.ledger.sums import Sum

if TYPE_CHECKING:
    import pytest

NOW = 1_790_000_000.0
"""When the entries of these tests ended: on a day in September 2026, at 14:13:20 UTC."""

PATIENCE = 20.0
"""Seconds that a test waits for what is bound to come."""

_runs = itertools.count()


def entry(**more: Any) -> Entry:
    """A succeeded edit that took half a second of a device at 3.6 dollars an hour: 500,000 nanodollars."""
    usual: dict[str, Any] = {
        "run": f"job_{next(_runs)}", "part": 0, "time": NOW, "tenant": "ann", "model": "mini", "device": "cpu", "latency": 0.7,
        "steps": 4, "seconds": {"document": 0.2, "step": 0.25, "finish": 0.05}, "tokens_computed": 400, "tokens_whole": 4096,
        "cache_hits": ("prompt",), "price": 3.6, "dollars": 0.0005, "version": "0.1.0", "commit": "abc", "lease": "l1",
    }  # fmt: skip
    return Entry(**{**usual, **more})


def total(address: str, since: float = 0.0, until: float = 2 * NOW) -> Sum:
    with Ledger(address) as ledger:
        return ledger_sums.joined(
            one for group in ledger_sums.by(ledger, "tenant", since, until).values() for one in group.values()
        )


def by(address: str, key: str, since: float = 0.0, until: float = 2 * NOW) -> dict[str | None, Sum]:
    with Ledger(address) as ledger:
        return {name: ledger_sums.joined(group.values()) for name, group in ledger_sums.by(ledger, key, since, until).items()}


def until(so: Callable[[], object], patience: float = PATIENCE) -> None:
    end = time.monotonic() + patience
    while not so():
        assert time.monotonic() < end
        time.sleep(0.01)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@contextmanager
def writing(address: str, **options: float) -> Iterator[Writer]:
    writer = Writer(address, **{"every": 0.02, "wait": 0.1, **options})  # type: ignore[arg-type]
    yield writer
    writer.close()


class Postgres:
    """A cluster in a temporary folder, reached by a socket in it. Each `fresh` is an empty schema."""

    def __init__(self, binaries: Path) -> None:
        self.binaries, self.schemas = binaries, itertools.count()
        self.folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # a socket's path has to be short
        self.user = None
        if os.geteuid() == 0:  # which Postgres refuses to run as
            names = {user.pw_name: user for user in pwd.getpwall()}
            self.user = names.get("postgres", names["nobody"]).pw_name
            shutil.chown(self.folder, self.user)
        try:
            self._run("initdb", "-U", "retouch", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
            self.start()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses='' -c fsync=off"
        self._run("pg_ctl", "-o", options, "-w", "-l", str(self.folder / "log"), "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-m", "immediate", "-w", "stop")

    def fresh(self) -> str:
        import psycopg

        address, schema = f"postgresql://retouch@/postgres?host={self.folder}", f"books{next(self.schemas)}"
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {schema}".encode())
        return f"{address}&options=-csearch_path%3D{schema}"

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, name: str, *options: str) -> None:
        command = [str(self.binaries / name), "-D", str(self.folder / "data"), *options]
        said = self.folder / "said"  # a file, since a pipe stays open for as long as a server that was started
        with said.open("wb") as file:
            done = subprocess.run(command, user=self.user, cwd=self.folder, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            told = [path.read_text(errors="replace")[-2000:] for path in (said, self.folder / "log") if path.exists()]
            raise RuntimeError(f"{name} of {self.binaries} failed with {done.returncode}:\n" + "\n".join(told))


def postgres() -> Iterator[Postgres | None]:
    """One that runs meanwhile; None where it is not installed. Raises RuntimeError, OSError where it is, and does not start."""
    found = shutil.which("initdb")
    binaries = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    cluster = Postgres(binaries[-1]) if binaries else None
    yield cluster
    if cluster is not None:
        cluster.remove()


def main(address: str, run: str, count: int, rate: float) -> None:
    writer = Writer(address, Lease("cpu", "mini", 3.6))
    for number in range(count):
        writer.add(entry(run=f"{run}-{number}", tenant=run, lease=writer.lease.id if writer.lease else ""))
        print(number, time.time(), flush=True)
        time.sleep(1 / rate if rate else 0)
    writer.close(60)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
