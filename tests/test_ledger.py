"""The books hold every edit, whatever happens to the process or the database; the same tests on SQLite and on a Postgres."""

from __future__ import annotations

import logging
import os
import random
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from sqlalchemy import select, text, update

import books
from books import NOW, Postgres, by, entry, total
from retouch import serve
from retouch.edit import InvalidOption
from retouch.ledger import Entry, InvalidEntry, InvalidLedger, Lease, Ledger, LedgerAway, Writer, address_of, sums, tables
from retouch.record import Record

PATIENCE = 20.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


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


# What is written


def test_a_row_holds_what_was_said(address: str) -> None:
    with Ledger(address, write=True) as ledger:
        ledger.add([entry(run="job_a", part=2, cache_hits=("document", "prompt", "prompt"), approximate=("int8", "preview"))])
        with ledger.begin() as connection:
            (row,) = connection.execute(select(tables.edits)).mappings().all()
    assert (row["run"], row["part"], row["time"], row["tenant"], row["status"]) == (
        "job_a",
        2,
        int(NOW * 1000),
        "ann",
        "succeeded",
    )
    assert [row[f"{stage}_us"] for stage in (*tables.STAGES, "other")] == [200_000, 0, 0, 250_000, 0, 50_000, 0]
    assert (row["busy_us"], row["latency_us"], row["nanodollars"], row["price"]) == (500_000, 700_000, 500_000, 3.6)
    assert (row["document_hit"], row["prompt_hit"], row["result_hit"], row["approximate"]) == (1, 1, 0, "int8,preview")
    assert (row["tokens_computed"], row["tokens_whole"], row["steps"], row["lease"]) == (400, 4096, 4, "l1")
    assert (row["version"], row["commit_hash"], row["model"], row["device"]) == ("0.1.0", "abc", "mini", "cpu")


def test_sums_are_exact_in_any_order(address: str) -> None:
    draw = random.Random(7)
    rows = [
        entry(
            tenant=draw.choice(["ann", "ben"]), model=draw.choice(["mini", "klein"]), time=NOW - draw.randrange(3) * 86_400,
            seconds={stage: draw.randrange(1, 10**7) / 1e6 for stage in (*tables.STAGES, "upscale", "restore")},
            dollars=draw.randrange(10**9) / 1e9, tokens_computed=draw.randrange(10**6), lease=draw.choice("abc"),
        )
        for _ in range(3000)
    ]  # fmt: skip
    shuffled = draw.sample(rows, len(rows))
    with Ledger(address, write=True) as ledger:
        for start in range(0, len(rows), 700):
            ledger.add(shuffled[start : start + 700])
    for key, of in (
        ("tenant", lambda one: one.tenant),
        ("model", lambda one: one.model),
        ("day", lambda one: str(int(one.time // 86_400))),
    ):
        expected: dict[str, Counter[str]] = {}
        for one in rows:
            counts = expected.setdefault(of(one), Counter())
            counts["edits"] += 1
            counts["busy"] += sum(round(seconds * 1e6) for seconds in one.seconds.values())
            counts["other"] += round(one.seconds["upscale"] * 1e6) + round(one.seconds["restore"] * 1e6)
            counts["nano"] += round((one.dollars or 0) * 1e9)
            counts["tokens"] += one.tokens_computed
        found = by(address, key)
        assert found.keys() == expected.keys()
        for name, one in found.items():
            want = expected[name]
            assert (one.edits, one.busy_us, one.nanodollars) == (want["edits"], want["busy"], want["nano"])
            assert (one.tokens_computed, one.stages["other"]) == (want["tokens"], want["other"])
            assert sum(one.stages.values()) == one.busy_us
            assert sum(one.stage_dollars.values()) == pytest.approx(one.busy_us / 1e6 * 3.6 / 3600)


def test_a_window_has_its_start_and_not_its_end(address: str) -> None:
    with Ledger(address, write=True) as ledger:
        ledger.add([entry(time=NOW + i) for i in range(10)])
    assert total(address, NOW + 2, NOW + 5).edits == 3
    assert total(address, NOW + 5, NOW + 10).edits == 5


def test_the_same_edit_counts_once(address: str) -> None:
    """A commit whose outcome was not heard is tried again."""
    rows = [entry(run="job_once", part=part) for part in range(3)]
    with Ledger(address, write=True) as ledger:
        ledger.add(rows)
        ledger.add([*rows, entry(run="job_once", part=3)])
    assert total(address).edits == 4


def test_tenants_in_any_script(address: str) -> None:
    names = ["", "Łódź", "東京 🎨", "שלום", "a'b\"c; DROP TABLE retouch_edits; --", "%s %(x)s ? :y", "x" * 5000]
    with Ledger(address, write=True) as ledger:
        ledger.add([entry(tenant=name) for name in names])
        ledger.add([entry(tenant="nul\0half\ud800", error="\0")])
    found = by(address, "tenant")
    assert found.keys() == {*names, "nulhalf?"}
    assert all(one.edits == 1 for one in found.values())


def test_failed_and_unpriced_edits_are_told_apart(address: str) -> None:
    ended = {"seconds": {}, "dollars": None, "steps": 0, "tokens_computed": 0, "tokens_whole": 0, "cache_hits": ()}
    with Ledger(address, write=True) as ledger:
        ledger.add([entry(), entry(price=None, dollars=None), entry(status="failed", error="queue_full", **ended)])
        ledger.add([entry(status="cancelled", **ended), entry(seconds={}, dollars=0.0, cache_hits=("result",))])
    one = total(address)
    assert (one.edits, one.failed, one.cancelled, one.unpriced) == (3, 1, 1, 1)
    assert (one.busy_us, one.priced_us, one.nanodollars) == (1_000_000, 500_000, 500_000)
    assert (one.result_hits, one.prompt_hits, one.document_hits) == (1, 2, 0)


def test_benchmark_records_go_in_and_come_back(address: str) -> None:
    first = Record("suite", "name", 0.25, "s", 0.2, 0.3, 5, 0.1, dirty=True, extra={"mask": 0.11, "text": "Łódź", "none": None})
    failed = Record("suite", "name", None, "s", error="RuntimeError: no compiler", commit="abc")
    with writing(address) as writer:
        for one in (first, failed, entry()):
            writer.add(one)
    with Ledger(address) as ledger:
        assert ledger.records() == [first, failed]
    assert total(address).edits == 1


def test_what_is_old_is_forgotten(address: str) -> None:
    with Ledger(address, write=True) as ledger:
        ledger.add([entry(time=NOW - day * 86_400) for day in range(10)], Lease(id="new"))
        ledger.add([], Lease(id="old"))
        with ledger.begin() as connection:
            connection.execute(
                update(tables.leases).where(tables.leases.c.lease == "old").values(seen=int(NOW * 1000) - 86_400_000)
            )
        assert ledger.forget(NOW - 4 * 86_400) == 5
        assert ledger.forget(NOW - 4 * 86_400) == 0
        assert {one.lease for one in sums.held(ledger, 0, 3 * NOW)} == {"new", "old"}
        ledger.forget(NOW - 60)
        assert {one.lease for one in sums.held(ledger, 0, 3 * NOW)} == {"new"}
    assert total(address).edits == 1


def test_a_device_is_held_from_the_start_until_it_is_last_seen(address: str) -> None:
    lease = Lease("NVIDIA H100", "mini", 4.0, "a list", started=NOW)
    with Ledger(address, write=True) as ledger:
        for _ in range(2):
            ledger.add([], lease)
        with ledger.begin() as connection:
            connection.execute(update(tables.leases).values(seen=int((NOW + 7200) * 1000)))
        (one,) = sums.held(ledger, NOW - 10, NOW + 1e6)
        assert (one.device, one.seconds, one.price, one.source) == ("NVIDIA H100", 7200, 4.0, "a list")
        assert sums.held(ledger, NOW + 600, NOW + 1200)[0].seconds == 600
        assert sums.held(ledger, NOW + 7200, NOW + 9000) == sums.held(ledger, NOW - 10, NOW) == []


# The writer


def test_rows_are_there_within_a_second(address: str) -> None:
    writer = Writer(address, Lease(id="l1"))
    until(lambda: writer._seen > 0)
    for _ in range(3):
        added = time.monotonic()
        before = writer.written
        writer.add(entry())
        until(lambda before=before: writer.written > before)
        assert time.monotonic() - added < 1
    assert total(address).edits == 3
    writer.close()


def test_what_is_left_is_written_at_the_end(address: str) -> None:
    writer = Writer(address, Lease(id="l1"), every=60)
    for _ in range(2500):
        writer.add(entry())
    writer.close()
    assert (writer.written, writer.dropped, writer.waiting) == (2500, 0, 0)
    assert total(address).edits == 2500
    writer.add(entry())
    assert (writer.dropped, total(address).edits) == (1, 2500)
    with Ledger(address) as ledger:
        assert [one.lease for one in sums.held(ledger, 0, 3 * NOW)] == ["l1"]


def test_a_row_that_no_database_takes_is_left_out(address: str, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[Entry] = [
        entry(),
        entry(steps=2**70),
        entry(),
        entry(seconds={"step": float("nan")}),
        entry(tenant=None),
        entry(),
    ]
    with writing(address) as writer:
        for one in rows:
            writer.add(one)
    assert (writer.written, writer.dropped, total(address).edits) == (3, 3, 3)
    assert len(warnings(caplog)) == 3
    with Ledger(address, write=True) as ledger, pytest.raises(InvalidEntry):
        ledger.add(rows)


def test_a_killed_process_loses_at_most_its_last_second(address: str) -> None:
    command = [sys.executable, books.__file__, address, "killed", "100000", "200"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline() for _ in range(500)]
        process.send_signal(signal.SIGKILL)
        killed = time.time()
    finally:
        process.kill()
        process.wait()
    lines += process.stdout.readlines()
    process.stdout.close()
    added = {}
    for line in lines:
        with suppress(ValueError):  # the last may be cut off
            number, moment = line.split()
            added[f"killed-{number}"] = float(moment)
    with Ledger(address) as ledger, ledger.begin() as connection:
        found = set(connection.execute(select(tables.edits.c.run)).scalars())
    assert len(found) >= 100
    assert not {run for run, moment in added.items() if moment < killed - 1.0} - found
    assert total(address).nanodollars == 500_000 * len(found)
    with writing(address) as writer:  # and the next process goes on with it
        writer.add(entry())
    assert total(address).edits == len(found) + 1


def test_two_processes_write_at_once(address: str) -> None:
    commands = [[sys.executable, books.__file__, address, run, "1500", "0"] for run in ("one", "two")]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    assert [process.wait(60) for process in processes] == [0, 0]
    found = by(address, "tenant")
    assert {name: (one.edits, one.nanodollars) for name, one in found.items()} == dict.fromkeys(
        ("one", "two"), (1500, 750_000_000)
    )


# What may happen to it


@contextmanager
def locked(address: str) -> Iterator[None]:
    """As somebody does who writes, and does not end."""
    with Ledger(address, write=True) as ledger, ledger.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("LOCK TABLE retouch_edits IN ACCESS EXCLUSIVE MODE"))
        yield


def test_a_locked_ledger_is_waited_for(address: str, caplog: pytest.LogCaptureFixture) -> None:
    Ledger(address, write=True).close()
    with writing(address) as writer:
        writer.add(entry())
        until(lambda: writer.written == 1)
        with locked(address):
            started = time.monotonic()
            for _ in range(50):
                writer.add(entry())
            assert time.monotonic() - started < 0.1
            until(lambda: writer._failures >= 3)
            assert (writer.waiting, len(warnings(caplog))) == (50, 1)
        until(lambda: writer.written == 51)
        until(lambda: len(warnings(caplog)) == 2)
    assert "locked" in warnings(caplog)[0] or "lock timeout" in warnings(caplog)[0]
    assert "0 rows were lost" in warnings(caplog)[1]
    assert (total(address).edits, writer.dropped) == (51, 0)


def test_a_backlog_is_bounded_and_what_is_dropped_is_counted(address: str, caplog: pytest.LogCaptureFixture) -> None:
    Ledger(address, write=True).close()
    with writing(address, most=10) as writer:
        with locked(address):
            writer.add(entry())
            until(lambda: writer._failures)
            for _ in range(24):
                writer.add(entry())
            assert (writer.waiting, writer.dropped) == (10, 15)
        until(lambda: writer.written == 10)
        until(lambda: len(warnings(caplog)) == 2)
        assert "15 rows were lost" in warnings(caplog)[1]
        writer.add(entry())
    assert (total(address).edits, writer.dropped) == (11, 15)


def test_what_cannot_be_written_at_the_end_is_said(address: str, caplog: pytest.LogCaptureFixture) -> None:
    Ledger(address, write=True).close()
    with locked(address):
        writer = Writer(address, every=0.02, wait=0.1)
        writer.add(entry())
        writer.close()
    assert (writer.dropped, writer.waiting, writer.written) == (1, 0, 0)
    assert "1 rows of the ledger" in warnings(caplog)[-1]


def test_a_newer_ledger_is_refused_and_left_alone(address: str, caplog: pytest.LogCaptureFixture) -> None:
    with Ledger(address, write=True) as ledger:
        ledger.add([entry()])
        with ledger.begin() as connection:
            connection.execute(update(tables.about).values(version=tables.VERSION + 1))
    for write in (False, True):
        with pytest.raises(InvalidLedger, match=r"newer Retouch \(version 2 of the ledger, this one knows 1\); update"):
            Ledger(address, write=write)
    with pytest.raises(InvalidLedger, match="newer"):
        serve.main(["--port", "0", "--ledger", address])
    with writing(address) as writer:
        writer.add(entry())
        until(lambda: writer._failures >= 2)
    assert writer.dropped == 1
    assert len(warnings(caplog)) == 2


def test_a_reader_begins_no_ledger(address: str) -> None:
    with pytest.raises(InvalidLedger, match="no ledger"):
        Ledger(address)
    with pytest.raises(InvalidLedger, match="no ledger"):
        Ledger(address)


def test_a_postgres_that_goes_away_and_comes_back(postgres: Postgres | None, caplog: pytest.LogCaptureFixture) -> None:
    if postgres is None:
        pytest.skip("no Postgres is installed here")
    address = postgres.fresh()
    with writing(address) as writer:
        writer.add(entry())
        until(lambda: writer.written == 1)
        postgres.stop()
        try:
            for _ in range(30):
                writer.add(entry())
            until(lambda: writer._failures >= 2)
            assert len(warnings(caplog)) == 1
        finally:
            postgres.start()
        until(lambda: writer.written == 31)
    assert total(address).edits == 31


def test_a_database_that_is_away_is_said_without_its_password(caplog: pytest.LogCaptureFixture) -> None:
    address = "postgresql://ann:secret@127.0.0.1:1/books"
    with pytest.raises(LedgerAway, match=r"ann:\*\*\*@127.0.0.1:1/books") as caught:
        Ledger(address)
    assert "secret" not in str(caught.value)
    with writing(address) as writer:
        writer.add(entry())
        until(lambda: writer._failures)
    assert writer.dropped == 1
    assert "secret" not in caplog.text


def test_what_is_no_address_is_refused() -> None:
    for wrong in ("", "sqlite://", "sqlite:///:memory:", ":memory:", "sqlite:///x?mode=ro", "nosuch://x/y", "http://["):
        with pytest.raises(InvalidOption):
            Ledger(wrong)
    with pytest.raises(InvalidOption, match=r"asynchronous|driver"):
        Ledger("postgresql+asyncpg://x/y")
    with pytest.raises(InvalidOption):
        Writer("sqlite://")
    assert address_of("~/books.sqlite").database == str(Path("~/books.sqlite").expanduser())
    assert address_of("postgres://x/y").drivername == address_of("postgresql://x/y").drivername == "postgresql+psycopg"


# What may happen to a file


@pytest.mark.parametrize(
    "content", [b"not a database, but long enough to have a header, " * 40, b"SQLite format 3\0" + bytes(4080)]
)
def test_a_damaged_file_is_refused_and_left_alone(file: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    file.write_bytes(content)
    for write in (False, True):
        with pytest.raises(
            InvalidLedger, match=r"ledger.sqlite is (damaged|a database of something else).*(move it away|another file)"
        ):
            Ledger(str(file), write=write)
    with pytest.raises(InvalidLedger):
        serve.main(["--port", "0", "--ledger", str(file)])
    with writing(str(file)) as writer:
        writer.add(entry())
        until(lambda: writer._failures >= 2)
    assert file.read_bytes() == content
    assert len(warnings(caplog)) == 2


def test_a_file_with_damage_inside_is_refused_where_it_is_read(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Ledger(str(file), write=True) as ledger:
        ledger.add([entry(tenant="x" * 500) for _ in range(2000)])
    data = bytearray(file.read_bytes())
    for start in range(8 * 4096, len(data), 4096):
        data[start : start + 4096] = os.urandom(4096)
    file.write_bytes(data)
    with pytest.raises(InvalidLedger, match=r"damaged.*\.recover"):
        total(str(file))
    with writing(str(file)) as writer:
        for _ in range(100):
            writer.add(entry())
        until(lambda: writer._failures >= 2)
    assert writer.dropped == 100
    assert len(warnings(caplog)) == 2


def test_a_database_of_something_else_is_refused(file: Path) -> None:
    with sqlite3.connect(file) as other:
        other.execute("CREATE TABLE photos (name TEXT)")
    for write in (False, True):
        with pytest.raises(InvalidLedger, match="something else"):
            Ledger(str(file), write=write)
    assert [row[0] for row in sqlite3.connect(file).execute("SELECT name FROM sqlite_master")] == ["photos"]


@contextmanager
def nobody() -> Iterator[Path]:
    """In a folder that may be read, as somebody who may not write there."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield folder
        folder.chmod(stat.S_IRWXU)


@contextmanager
def powerless(folder: Path) -> Iterator[None]:
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_read_only_folder_is_said_once_and_can_be_read(caplog: pytest.LogCaptureFixture) -> None:
    with nobody() as folder:
        address = str(folder / "ledger.sqlite")
        with Ledger(address, write=True) as ledger:
            ledger.add([entry()])
        with powerless(folder):
            assert total(address).edits == 1
            with writing(address) as writer:
                writer.add(entry())
                until(lambda: writer._failures >= 2)
                assert len(warnings(caplog)) == 1
            assert writer.dropped == 1
            for other in (folder / "new.sqlite", folder / "new" / "ledger.sqlite"):
                with pytest.raises(LedgerAway):
                    Ledger(str(other), write=True)
        assert total(address).edits == 1
        assert sorted(path.name for path in folder.iterdir()) == ["ledger.sqlite"]


def test_a_full_disk_is_waited_for(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A limit on the size of files stands for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with writing(str(file)) as writer:
        writer.add(entry())
        until(lambda: writer.written == 1)
        wal = file.with_name(file.name + "-wal").stat().st_size
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (wal + 10_000, limits[1]))
            for _ in range(200):
                writer.add(entry(tenant="x" * 500))
            until(lambda: writer._failures >= 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        until(lambda: writer.written == 201)
    assert len(warnings(caplog)) == 2
    assert total(str(file)).edits == 201


def test_a_reader_does_not_wait_for_the_writer(file: Path) -> None:
    with Ledger(str(file), write=True) as ledger:
        ledger.add([entry()])
        with ledger.begin():
            started = time.monotonic()
            assert total(str(file)).edits == 1
            assert time.monotonic() - started < 2
