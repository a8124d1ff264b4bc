"""The books hold every edit, also of a process that is killed; the same tests on SQLite and on a Postgres."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import select, update

import books
from books import NOW, by, entry, total, until, warnings, writing
from retouch.ledger import Entry, InvalidEntry, Lease, Ledger, Writer, sums, tables
from retouch.record import Record

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
        assert ledger.forget(NOW - 4 * 86_400) == (5, 0)
        assert ledger.forget(NOW - 4 * 86_400) == (0, 0)
        assert {one.lease for one in sums.held(ledger, 0, 3 * NOW)} == {"new", "old"}
        ledger.forget(NOW - 60)
        assert {one.lease for one in sums.held(ledger, 0, 3 * NOW)} == {"new"}
    assert total(address).edits == 1


def test_old_records_are_forgotten_too(address: str) -> None:
    """A date may be in another zone, without one, or none at all."""
    day = datetime.fromtimestamp(NOW, UTC)
    dates = [(day - timedelta(days=n)).isoformat(timespec="seconds") for n in range(400)]
    odd = [day.astimezone(timezone(timedelta(hours=9))).isoformat(), dates[399][:10], "", "some day"]
    rows = [Record("bench", "x", 1.0, "s", date=date) for date in (*dates, *odd)]
    with Ledger(address, write=True) as ledger:
        ledger.add([*rows, entry(time=NOW)])
        assert ledger.forget(NOW - 9.5 * 86_400) == (0, 391)
        assert [row.date for row in ledger.records()] == [*dates[:10], odd[0], "", "some day"]
    assert total(address).edits == 1


def test_what_came_of_a_record_is_known(address: str) -> None:
    """Whole numbers in a column of fractions, and text that no database takes as it is."""
    rows = [
        Record("bench", "x", 12, "1", 11, 13, 5, extra={"step": 3, "whole": 3.0, "text": "nul\0"}),
        Record("bench", "x\0", 1, ""),
    ]
    with Ledger(address, write=True) as ledger:
        assert ledger.absent(rows) == rows
        ledger.add(rows)
        assert ledger.absent([*rows, replace(rows[0], value=12.5)]) == [replace(rows[0], value=12.5)]
        with pytest.raises(InvalidEntry):
            ledger.absent([Record("bench", "x", 10**400, "")])


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
