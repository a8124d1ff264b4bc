"""A ledger that is open: made and checked, written in whole transactions, read, shortened. What goes wrong is typed."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, Table, create_engine, delete, event, insert, inspect, select, text, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import QueuePool

from retouch.edit import InvalidOption, RetouchError
from retouch.ledger import tables
from retouch.ledger.tables import EDIT_COLUMNS, LEASE_COLUMNS, RECORD_COLUMNS, VERSION, Entry, Lease, row_of
from retouch.record import Record

WAIT = 5.0
"""Seconds to wait for whoever else writes, or for a database elsewhere to answer."""

TOGETHER = 300 if sqlite3.sqlite_version_info >= (3, 32) else 32
"""Rows of one statement; SQLite takes 32,766 values in one, and took 999."""

MAKING = 7_237_088
"""Of Postgres' advisory lock under which the tables are made, since two servers may begin at once."""

DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
FOLLOWED = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 10_000}
"""How soon a Postgres that no longer answers is given up; libpq's names."""


class InvalidLedger(RetouchError):
    """It is damaged, from a newer version, or something else's. Nothing of it was changed."""


class LedgerAway(RetouchError):
    """It cannot be reached, read or written at this time: locked, full, read-only, or its server is down."""

    status = 503


class InvalidEntry(RetouchError):
    """A row that no database takes."""


class Ledger:
    """`write` makes the tables where there are none. To be used by one thread at a time.

    Raises InvalidOption for an address that is none, InvalidLedger, LedgerAway.
    """

    def __init__(self, address: str | URL, write: bool = False, wait: float = WAIT) -> None:
        self.url = address_of(address) if isinstance(address, str) else address
        self.write = write
        self.engine = _engine(self.url, write, wait)
        self._statements: dict[str, tuple[bool, str]] = {}
        try:
            with self.begin() as connection:
                self._check(connection)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __str__(self) -> str:
        return said(self.url)

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """A transaction, whose errors are ours."""
        try:
            with self.engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise _typed(error, self.url) from error

    def add(self, rows: Sequence[Entry | Record], lease: Lease | None = None) -> None:
        """All in one transaction; an edit that is there already is left as it is. The lease is seen now.

        Raises InvalidEntry, LedgerAway, InvalidLedger; then none is written.
        """
        try:
            entries = [row.row() for row in rows if isinstance(row, Entry)]
            numbers = [row_of(row) for row in rows if isinstance(row, Record)]
        except Exception as error:  # whatever is wrong with a value
            raise InvalidEntry(f"a row cannot be written ({error!r}).") from error
        with self.begin() as connection:
            self._insert(connection, tables.edits, EDIT_COLUMNS, entries)
            self._insert(connection, tables.records, RECORD_COLUMNS, numbers)
            if lease is not None:
                self._see(connection, lease)

    def forget(self, before: float) -> tuple[int, int]:
        """Remove the edits that ended, the leases that were last seen, and the Records that were made before that time. Returns
        how many edits, and how many Records. A Record without a date stays.
        """
        limit, numbers = int(before * 1000), tables.records.c.record
        with self.begin() as connection:
            connection.execute(delete(tables.leases).where(tables.leases.c.seen < limit))
            edits = int(connection.execute(delete(tables.edits).where(tables.edits.c.time < limit)).rowcount)
            dated = connection.execute(select(numbers, tables.records.c.date)).all()
            old = [number for number, date in dated if (made := tables.moment_of(date)) is not None and made < before]
            for start in range(0, len(old), TOGETHER):
                connection.execute(delete(tables.records).where(numbers.in_(old[start : start + TOGETHER])))
        return edits, len(old)

    def absent(self, rows: Sequence[Record]) -> list[Record]:
        """Those that are not in the books. Raises InvalidEntry for one that no database takes."""
        known = {tables.known_as(row) for row in self.records()}
        try:
            return [row for row in rows if tables.known_as(row) not in known]
        except (OverflowError, ValueError) as error:
            raise InvalidEntry(f"a row cannot be written ({error!r}).") from error

    def records(self) -> list[Record]:
        """All, in the order in which they were written."""
        columns = [tables.records.c[name] for name in RECORD_COLUMNS]
        with self.begin() as connection:
            found = connection.execute(select(*columns).order_by(tables.records.c.record)).all()
        return [tables.record_of(tuple(row)) for row in found]

    def close(self) -> None:
        self.engine.dispose()

    def _insert(self, connection: Connection, table: Table, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
        """As text for the driver: the rows need nothing of what SQLAlchemy would do to each. To SQLite many go in one
        statement, as at the end of each it asks for the interpreter's lock again, which the server may have taken meanwhile.
        """
        positional, statement = self._statement(table, columns)
        places = f"({', '.join('?' * len(columns))})"
        try:
            if positional and places in statement:
                for some in (rows[start : start + TOGETHER] for start in range(0, len(rows), TOGETHER)):
                    together = statement.replace(places, ", ".join([places] * len(some)))
                    connection.exec_driver_sql(together, tuple(chain.from_iterable(some)))
            elif rows:
                connection.exec_driver_sql(
                    statement, rows if positional else [dict(zip(columns, row, strict=True)) for row in rows]
                )
        except (OverflowError, ValueError, TypeError) as error:  # of the driver, as it makes parameters of them
            raise InvalidEntry(f"a row cannot be written ({error}).") from error

    def _statement(self, table: Table, columns: tuple[str, ...]) -> tuple[bool, str]:
        """To insert a row, and whether it takes the values by their places, else by their names."""
        if table.name not in self._statements:
            kind = {"sqlite": sqlite, "postgresql": postgresql}.get(self.engine.dialect.name)
            statement = insert(table) if kind is None else kind.insert(table).on_conflict_do_nothing()
            compiled = statement.compile(dialect=self.engine.dialect, column_keys=columns)
            assert not compiled.positional or compiled.positiontup == list(columns)
            self._statements[table.name] = compiled.positional, str(compiled)
        return self._statements[table.name]

    def _see(self, connection: Connection, lease: Lease) -> None:
        row = lease.row(time.time())
        table, seen = tables.leases, row[LEASE_COLUMNS.index("seen")]
        if not connection.execute(update(table).where(table.c.lease == lease.id).values(seen=seen)).rowcount:
            self._insert(connection, table, LEASE_COLUMNS, [row])

    def _check(self, connection: Connection) -> None:
        if self.write and self.engine.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({MAKING})"))
        names = inspect(connection).get_table_names()
        if tables.about.name not in names:
            if names and self.engine.dialect.name == "sqlite":
                raise InvalidLedger(f"{self} is a database of something else; give another file.")
            if not self.write:
                raise InvalidLedger(f"{self} holds no ledger; `retouch serve --ledger` begins one.")
            tables.metadata.create_all(connection)
            connection.execute(insert(tables.about).values(version=VERSION))
        version = connection.execute(select(tables.about.c.version)).scalars().first()
        if version is None or version < 1:
            raise InvalidLedger(f"{self} does not say of which version it is; {MENDED}")
        if version > VERSION:
            raise InvalidLedger(
                f"{self} was written by a newer Retouch (version {version} of the ledger, this one knows {VERSION}); "
                "update Retouch, or give another address. Nothing was changed."
            )


MENDED = "move it away, and a new one is begun; `sqlite3 FILE .recover` saves what can be read of a file. Nothing was changed."


def address_of(address: str) -> URL:
    """Of an SQLAlchemy address, or the path of an SQLite file. Raises InvalidOption."""
    try:
        url = make_url(address) if "://" in address else URL.create("sqlite", database=address)
    except (ArgumentError, ValueError) as error:
        raise InvalidOption(f"{address!r} is no address of a database ({error}); give a file or an SQLAlchemy URL.") from error
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() == "sqlite":
        if not url.database or url.database == ":memory:" or url.query:
            raise InvalidOption(f"{address!r} names no file; give a path, such as ledger.sqlite.")
        url = url.set(drivername="sqlite", database=os.path.abspath(Path(url.database).expanduser()))
    return url


def said(url: URL) -> str:
    """The address as it may be shown: a path, or a URL without its password."""
    return str(url.database) if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)


def _engine(url: URL, write: bool, wait: float) -> Engine:
    try:
        if url.get_backend_name() == "sqlite":
            return _sqlite(Path(str(url.database)), write, wait)
        postgres = url.get_driver_name() == "psycopg"
        more = {"connect_timeout": max(2, round(wait)), **FOLLOWED} if postgres else {}
        engine = create_engine(url, connect_args=more, pool_size=1, max_overflow=0, pool_pre_ping=True)
    except (NoSuchModuleError, ImportError, ArgumentError, ValueError, TypeError) as error:
        raise InvalidOption(f"{said(url)} cannot be used ({error}); install its driver, or give another address.") from error
    if engine.dialect.is_async:
        raise InvalidOption(f"{said(url)} has an asynchronous driver; give another one, such as postgresql+psycopg.")
    if postgres:
        logging.getLogger("psycopg").setLevel(logging.ERROR)  # it warns of every batch that fails, which is ours to say, once
    if write and engine.dialect.name == "postgresql":
        limit = f"SET LOCAL lock_timeout = {round(wait * 1000)}"  # else a table that somebody locks is waited for in silence
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(limit))
    return engine


def _sqlite(path: Path, write: bool, wait: float) -> Engine:
    """In WAL mode, so that readers and the writer do not wait for each other; a transaction takes its lock as it begins."""
    if write:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerAway(f"{path.parent} cannot be made ({error.strerror or error}); give another address.") from error
    elif not path.is_file():
        raise InvalidLedger(f"there is no ledger at {path}; `retouch serve` begins one, or give --ledger ADDRESS.")
    # Without write access there is nowhere to put what WAL needs; then the file is read as it lies, if nobody else has it open.
    may = os.access(path.parent, os.W_OK, effective_ids=os.access in os.supports_effective_ids)
    still = not write and not may and not path.with_name(path.name + "-wal").exists()
    address = f"{path.as_uri()}?immutable=1" if still else path.as_uri() + ("?mode=rwc" if write else "?mode=rw")

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(address, timeout=wait, isolation_level=None, uri=True, check_same_thread=False)
        if write:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")  # a busy disk holds no commit up; a power cut may lose the last
        return connection

    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool, pool_size=1, max_overflow=0)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _typed(error: SQLAlchemyError, url: URL) -> RetouchError:
    """In our words: the row's own fault, what waiting does not mend, and all the rest, which may be over soon."""
    if not isinstance(error, DBAPIError):
        return LedgerAway(f"the ledger {said(url)} cannot be used now ({error}).")
    reason = str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else type(error.orig).__name__
    if getattr(error.orig, "sqlite_errorcode", 0) & 0xFF in DAMAGED:
        return InvalidLedger(f"{said(url)} is damaged, or no ledger ({reason}); {MENDED}")
    if isinstance(error, DataError | IntegrityError) or isinstance(error.orig, sqlite3.InterfaceError):
        return InvalidEntry(f"a row cannot be written ({reason}).")
    return LedgerAway(f"the ledger {said(url)} cannot be used now ({reason}).")
