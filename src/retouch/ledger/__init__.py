"""The books: a row for every served edit, every measured number, and every device that was held, in a database.

SQLite in the data folder by default, any SQLAlchemy address for a fleet. `Writer` is the server's end, `sums` the reader's.
"""

from retouch.ledger.store import InvalidEntry, InvalidLedger, Ledger, LedgerAway, address_of
from retouch.ledger.tables import Entry, Lease
from retouch.ledger.writer import Writer

__all__ = ["Entry", "InvalidEntry", "InvalidLedger", "Lease", "Ledger", "LedgerAway", "Writer", "address_of"]
