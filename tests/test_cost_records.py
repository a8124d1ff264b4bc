"""`retouch cost --take`, `--records` and `--forget-before`: benchmark rows go into the books once, are shown, leave."""

from __future__ import annotations

import csv
import io
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from books import entry
from retouch import record
from retouch.edit import InvalidOption, RetouchError
from retouch.ledger import Ledger
from retouch.measure import cost, cost_records
from retouch.record import Record
from test_cost import told, wrote


def test_old_records_are_removed(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrote(
        address,
        Record("bench", "x", 1.0, "s", date="2026-01-01T00:00:00+00:00"),
        Record("bench", "x", 1.0, "s", date=record.now()),
    )
    assert cost.main(["--ledger", address, "--forget-before", "2026-01-02", "--records", "--json"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["rows"]) == 1
    assert "and 1 benchmark records from before it, were removed from" in captured.err


def test_records_are_listed(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    day = "2026-01-01T00:00:00+00:00"
    one = Record("bench", "dollars per million edits", 5.25, "$/M", device="EPYC", commit="0123456789abcdef", date=day)
    failed = Record("load", "latency p50", None, "s", error="nothing was served", date=record.now())
    rows = [
        replace(one, extra={"subject": "+ [packing]"}),
        failed,
        Record("quality", "inside psnr", 17, "dB", extra={"path": "whole"}),
    ]
    wrote(address, *rows, entry(time=time.time()))
    found = told(capsys, "--ledger", address, "--records")
    assert found["suite"] is None
    assert [tuple(row) for row in found["rows"]] == [cost_records.COLUMNS] * 3
    assert found["rows"][0] == {
        "suite": "bench", "name": "dollars per million edits", "of": "+ [packing]", "value": 5.25, "unit": "$/M", "error": "",
        "device": "EPYC", "commit": "0123456789abcdef", "date": day,
    }  # fmt: skip
    assert [row["value"] for row in told(capsys, "--ledger", address, "--records", "load")["rows"]] == [None]
    since = told(capsys, "--ledger", address, "--records", "--since", "1d")["rows"]
    assert [row["suite"] for row in since] == ["load", "quality"]  # who has no date is of any time
    assert cost.main(["--ledger", address, "--records", "--csv"]) == 0
    read = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["suite"], row["value"]) for row in read] == [("bench", "5.25"), ("load", ""), ("quality", "17.0")]
    assert cost.main(["--ledger", address, "--records"]) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert all(
        text in table for text in ("+ [packing] 5.25 $/M EPYC 0123456789 2026", "ERROR nothing was served", "whole 17 dB")
    )
    assert cost.main(["--ledger", address, "--records", "weather"]) == 0
    assert "no benchmark records of the suite 'weather' in " in capsys.readouterr().out
    for options in (["--by", "day"], ["--model", "m"], ["--tenant", "ann"], ["--held", "3"]):
        with pytest.raises(InvalidOption, match=f"{options[0]} is of edits; leave it out"):
            cost.main(["--ledger", address, "--records", *options])


def test_records_of_a_bench_are_brought_in_once(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Record("bench", "edits per second", value, "1/s", extra={"mix": "personal"}) for value in (1.5, 12)]
    file = tmp_path / "rows.jsonl"
    record.append(file, rows)
    for new in (2, 0):
        assert cost.main(["--ledger", address, "--take", str(file), "--json"]) == 0
        assert f"retouch: {new} of 2 records" in capsys.readouterr().err
    with Ledger(address) as ledger:
        assert ledger.records() == rows
    with pytest.raises(RetouchError, match="cannot be read"):
        cost.main(["--ledger", address, "--take", str(tmp_path / "none.jsonl")])
