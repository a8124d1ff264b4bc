"""The server's end of the ledger: rows are taken at once and written by a thread. Whatever happens to it, no edit waits."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

from retouch.edit import RetouchError
from retouch.ledger.store import WAIT, InvalidEntry, Ledger, address_of, said
from retouch.ledger.tables import Entry, Lease
from retouch.record import Record

log = logging.getLogger(__name__)

EVERY = 0.5
"""Seconds from one commit to the next, so that a process that is killed loses less than the rows of its last second."""

AT_ONCE = 1000
"""Rows of a transaction."""

MOST = 100_000
"""Rows that are kept while the ledger cannot be written; about 100 MB. What comes on top is dropped, and counted."""

SEEN, SEEN_BESIDE = 10.0, 1.0
"""Seconds between two times that a lease is said to be still held: alone, and beside rows."""

SLOWEST = 10.0
"""Seconds between two tries, at most."""


class Writer:
    """Writes what `add` is given, at least once a second. Where it cannot, that is said once in the log, and tried again.

    `lease` is the device that is held as long as this is open. Raises InvalidOption for an address that is none.
    """

    def __init__(
        self, address: str, lease: Lease | None = None, every: float = EVERY, most: int = MOST, wait: float = WAIT
    ) -> None:
        self.url, self.lease, self.every, self.most, self.wait = address_of(address), lease, every, most, wait
        self.written = self.dropped = 0
        self._rows: deque[Entry | Record] = deque()
        self._batch: list[Entry | Record] = []
        self._ledger: Ledger | None = None
        self._failures = 0
        self._lost = 0
        self._seen = float("-inf")
        self._lock = threading.Lock()
        self._closing, self._given_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="retouch-ledger", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows that are not written yet."""
        return len(self._rows) + len(self._batch)

    def add(self, row: Entry | Record) -> None:
        """From any thread; it neither waits nor fails."""
        with self._lock:
            if self.waiting < self.most and not self._closing.is_set():
                self._rows.append(row)
            else:
                self._drop()

    def close(self, patience: float = 5.0) -> None:
        """Write what is left, for so many seconds; what cannot be is counted as dropped."""
        self._closing.set()
        self._thread.join(patience)
        self._given_up.set()
        if self.waiting:
            log.warning("%d rows of the ledger %s could not be written and are lost", self.waiting, said(self.url))
            with self._lock:
                self._drop(self.waiting)
                self._rows.clear()
                self._batch = []

    def _drop(self, rows: int = 1) -> None:
        self.dropped += rows
        self._lost += rows

    def _run(self) -> None:
        pause = self.every
        while not self._closing.wait(pause):
            self._turn()
            pause = min(SLOWEST, self.every * 2 ** min(self._failures, 10))
        self._turn()
        while self.waiting and not self._given_up.wait(min(self.every, 0.1)):  # somebody else may write at this moment
            self._turn()
        if self._ledger is not None:
            self._ledger.close()

    @property
    def _due(self) -> bool:
        """Whether the ledger is to be touched though there may be no row: to be told of the lease, or to be opened at all."""
        return time.monotonic() - self._seen > SEEN or self._closing.is_set()

    def _turn(self) -> None:
        """Write all that there is. Errors of any kind end here."""
        try:
            if self._rows or self._batch or self._due:
                self._write()
            while len(self._rows) >= AT_ONCE or (self._rows and self._closing.is_set()):  # the rest is for the next turn
                self._write()
        except Exception as error:
            self._failed(error)
        else:
            self._worked()

    def _write(self) -> None:
        """One transaction."""
        if self._ledger is None:
            self._ledger = Ledger(self.url, write=True, wait=self.wait)
        with self._lock:
            while self._rows and len(self._batch) < AT_ONCE:
                self._batch.append(self._rows.popleft())
        seen = time.monotonic() - self._seen
        lease = self.lease if seen > SEEN_BESIDE or self._closing.is_set() else None
        try:
            self._ledger.add(self._batch, lease)
        except InvalidEntry:
            self._sift(self._ledger, lease)
        if seen > SEEN_BESIDE:
            self._seen = time.monotonic()
        self.written += len(self._batch)
        self._batch = []

    def _sift(self, ledger: Ledger, lease: Lease | None) -> None:
        """Leave out of the batch what no database takes, so that it does not keep the others from being written."""
        for row in list(self._batch):
            try:
                ledger.add([row], lease)
            except InvalidEntry as error:
                log.warning("a row of the ledger is dropped: %s", error)
                with self._lock:
                    self._batch.remove(row)
                    self._drop()

    def _failed(self, error: Exception) -> None:
        """Said once, and not after `close` has said that the rows are lost. The connection may be what is broken: a new one."""
        if not self._failures and not self._given_up.is_set():
            reason = error if isinstance(error, RetouchError) else f"the ledger {said(self.url)} cannot be written ({error!r})."
            log.warning("%s Edits go on; up to %d rows are kept and tried again.", reason, self.most)
        self._failures += 1
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def _worked(self) -> None:
        if self._failures and not self._given_up.is_set():
            log.warning("the ledger %s is written again; %d rows were lost meanwhile", said(self.url), self._lost)
        self._failures = self._lost = 0
