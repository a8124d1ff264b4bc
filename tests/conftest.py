"""Settings for every test: Hypothesis without deadlines (the machine may be busy), the same examples every time; no books of
the user's are written, nor his prices read, by servers in processes of their own either.
"""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

_DATA = tempfile.TemporaryDirectory(prefix="retouch-tests-", ignore_cleanup_errors=True)
os.environ["RETOUCH_DATA"] = _DATA.name
os.environ["RETOUCH_PRICES"] = str(Path(__file__).parent.parent / "src" / "retouch" / "prices.toml")

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it, and so would ours

settings.register_profile("retouch", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("retouch")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A cluster that runs meanwhile; None where none is installed."""
    import books

    yield from books.postgres()


@pytest.fixture(params=["sqlite", "postgres"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a ledger may be begun."""
    if request.param == "sqlite":
        return str(tmp_path / "books" / "ledger.sqlite")
    cluster = request.getfixturevalue("postgres")
    if cluster is None:
        pytest.skip("no Postgres is installed here")
    return str(cluster.fresh())
