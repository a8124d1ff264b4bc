"""The books where something happens to the database: locked, away, newer, damaged, full, or of something else."""

from __future__ import annotations

import os
import resource
import sqlite3
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text, update

import books
from books import Postgres, entry, total, until, warnings, writing
from retouch import serve
from retouch.edit import InvalidOption
from retouch.ledger import InvalidLedger, Ledger, LedgerAway, Writer, address_of, tables


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


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


def test_a_postgres_that_does_not_start_is_no_reason_to_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # which the user that it is run as may enter
        os.chmod(folder, 0o755)
        initdb = Path(folder) / "initdb"
        initdb.write_text("#!/bin/sh\necho 'no locale of that name' >&2\nexit 3\n")
        initdb.chmod(0o755)
        monkeypatch.setattr("books.shutil.which", lambda name: str(initdb))
        with pytest.raises(RuntimeError, match=r"(?s)initdb of .* failed with 3:.no locale of that name"):
            next(books.postgres())
        monkeypatch.setattr("books.shutil.which", lambda name: None)
        monkeypatch.setattr("books.Path.glob", lambda self, pattern: iter(()))
        assert next(books.postgres()) is None


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
