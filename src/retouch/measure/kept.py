"""Where measured rows are kept: in a file, and in the books beside the served edits."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from retouch import config, record
from retouch.edit import InvalidOption, RetouchError
from retouch.record import Record


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ledger", metavar="ADDRESS", help="of the books, which keep the rows too: file, URL, or none (in the data folder)"
    )


class Kept:
    """`out` is the file, None: none; `ledger` the books' address as `retouch serve --ledger` takes it, None: the usual one.

    One that is damaged, too new, or no address is refused before anything is measured; one that is away, or cannot be written
    later, is said once, and the rows are on file. Raises InvalidOption, InvalidLedger.
    """

    def __init__(self, out: Path | None, ledger: str | None) -> None:
        self.out, self._said = out, False
        self.address = None if ledger == "none" else str(config.ledger_file()) if ledger is None else ledger
        if self.address is None:
            return
        try:
            from retouch.ledger import Ledger, LedgerAway
        except ModuleNotFoundError as error:
            missing = InvalidOption(f"the books need {error.name}; pip install 'retouch[ledger]', or give --ledger none.")
            if ledger is not None:
                raise missing from error
            self.address = None
            self._say(missing)
            return
        try:
            Ledger(self.address, write=True).close()
        except LedgerAway as error:
            self._say(error)

    def add(self, rows: Sequence[Record]) -> None:
        """Raises OutputFailed for the file, when the books have them already."""
        try:
            self._book(rows)
        finally:
            if self.out is not None:
                record.append(self.out, rows)

    def _book(self, rows: Sequence[Record]) -> None:
        if self.address is None or not rows:
            return
        from retouch.ledger import Ledger

        try:
            with Ledger(self.address, write=True) as ledger:
                ledger.add(rows)
        except RetouchError as error:
            self._say(error)

    def _say(self, error: RetouchError) -> None:
        if not self._said:
            take = f"`retouch cost --take {self.out}` brings them in later"
            later = "give --out FILE to keep them" if self.out is None else take
            print(f"retouch: {error} Rows are not in the books; {later}.", file=sys.stderr)
        self._said = True
