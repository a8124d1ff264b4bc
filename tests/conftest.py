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

from retouch import record

_TOGETHER = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _TOGETHER > 1:  # threads that outnumber the cores wait for each other; read as torch is first imported
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(record.vcpus()) // _TOGETHER)))

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


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """At a price of 3.6 dollars an hour, which is a tenth of a cent a second."""
    from retouch.serve.settings import Settings
    from serving import Serving

    with Serving(Settings(price=3.6)) as server:
        yield server


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """By which a store's making is timed: what is added to its one number has passed."""
    now = [0.0]
    monkeypatch.setattr("retouch.cache.store.time.perf_counter", lambda: now[0])
    return now


@pytest.fixture(scope="session")
def small() -> Any:
    """A trace of a dozen requests on small pictures, most later turns on results of earlier ones."""
    from retouch.measure import traffic
    from retouch.measure.pictures import Pictures

    knobs = traffic.Knobs(requests=12, side=(64,), commit=0.8, rate=50, think=0.1, variations=2, tenants=2)
    return traffic.make("personal", 3, knobs, Pictures())


@pytest.fixture(scope="session")
def plan(small: Any) -> Any:
    """The same with its pictures."""
    from retouch.measure.pictures import Pictures
    from retouch.measure.plan import of_trace

    return of_trace(small, Pictures())


@pytest.fixture
def engine() -> Iterator[Any]:
    """A tiny one on one thread: two would wait for each other where the machine is busy."""
    import torch

    import tiny
    from retouch.engine import Engine

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Engine(tiny.model("Flux2KleinKVPipeline"))
    torch.set_num_threads(threads)


@pytest.fixture
def held() -> Iterator[Any]:
    """A server whose edits begin, and end when they are released."""
    from serving import Painter, Serving

    with Serving(worker=Painter(hold=True)) as server:
        yield server
