"""A server under a storm of requests while its worker is killed: each has its one answer, and it is the right one.

The long run is `python bench/chaos.py`.
"""

from __future__ import annotations

import io
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import chaos
import retouch
from asks import asks
from live import server
from retouch import record
from storm import TOLERANCE, Outcome, workers

EDITS, KILLS, CLIENTS = 60, 2, 12


def test_every_request_has_its_one_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are compared with the serial ones: they may differ by `storm.TOLERANCE`, 2 levels (8 in a JPEG)."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the server and this process have a core each
    show = Progress(console=Console(file=io.StringIO()))
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(retouch.load, dtype="float32", beside=0)
        with server("--dtype", "float32", "--cache", str(tmp_path), "--beside", "1") as address:
            report = chaos.storm(address, EDITS, KILLS, 7, CLIENTS, show)
            assert httpx.get(f"{address}/healthz").text == "ok"
            assert httpx.get(f"{address}/readyz").text == "ready"
            chaos.compare(report, loading.result(), show)
    assert not report.faults
    assert report.kills == KILLS
    assert 1 <= report.stats["restarts"] <= KILLS
    assert report.count("succeeded") > len(report.outcomes) / 2
    assert report.count("left") > 0
    assert set(report.errors) <= {"deadline_passed", "deadline_too_soon", "invalid_mask", "worker_lost"}
    assert max(report.apart.values()) <= max(TOLERANCE.values())
    assert not workers(), "they end with their server"


def test_requests_are_those_of_their_seed() -> None:
    first, again, other = asks(120, 3), asks(120, 3), asks(120, 4)
    assert sum(len(ask.edits) for ask in first) == 120
    assert [ask.fields for ask in first] == [ask.fields for ask in again]
    assert [ask.fields for ask in first] != [ask.fields for ask in other]
    assert all((a.edits[0].image == b.edits[0].image).all() for a, b in zip(first, again, strict=True))
    assert {ask.way for ask in first} == {"form", "json", "document", "stream", "job", "generation", "wrong"}
    assert all(64 <= side <= 192 for ask in first for side in ask.edits[0].image.shape[:2])


def test_what_may_not_be_is_a_fault_and_a_row(tmp_path: Path) -> None:
    ask = next(ask for ask in asks(20, 0) if ask.way != "wrong")
    ends = [Outcome(ask, "lost"), Outcome(ask, "succeeded", 200, extra=1), Outcome(ask, "worker_lost", 503)]
    stats = {"restarts": 1, "edits": {"succeeded": 1, "failed": 1, "cancelled": 0, "rejected": 5}}
    report = chaos.Report(ends, 1, stats, 2.0, {"png": 200})
    assert len(report.faults) == 3
    rows = {name: value for name, value, _ in report.rows()}
    assert rows["lost"] == rows["answered twice"] == rows["error worker_lost"] == 1
    assert rows["answered"] == 2
    assert rows["largest difference, png"] == 200
    record.append(tmp_path / "rows.jsonl", [record.Record("chaos", name, value, unit) for name, value, unit in report.rows()])
    assert len(record.read(tmp_path / "rows.jsonl")) == len(rows)


def test_it_says_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert chaos.main(["--edits", "0"]) == 2
    assert "at least one edit" in capsys.readouterr().err
