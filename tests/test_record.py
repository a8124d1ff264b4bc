"""Records go out as one JSON object a line and come back as they were."""

from __future__ import annotations

import json

import pytest

from retouch import record
from retouch.edit import OutputFailed, RetouchError
from retouch.record import Record


def test_rows_are_appended_and_read_back(tmp_path):
    path = tmp_path / "results" / "some.jsonl"
    first = Record("edit_latency", "denoise", 0.25, "s", 0.2, 0.3, 5, 0.1, extra={"mask": 0.11, "variant": "KV eager"})
    failed = Record(
        "edit_latency", "denoise", None, "s", error="RuntimeError: no compiler", **record.environment("cpu", "x", 2)
    )
    record.append(path, [first])
    record.append(path, [failed])
    assert record.read(path) == [first, failed]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0]["mask"] == 0.11
    assert not any(isinstance(value, dict | list) for row in rows for value in row.values())


def test_what_is_no_flat_number_is_refused():
    with pytest.raises(ValueError, match="finite"):
        Record("s", "n", float("nan"), "s")
    with pytest.raises(ValueError, match="finite"):
        Record("s", "n", 1.0, "s", extra={"shape": [1, 2]})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="fields of a Record"):
        Record("s", "n", 1.0, "s", extra={"ceiling": 2.0})
    with pytest.raises(ValueError, match="neither"):
        Record("s", "n", None, "s")


def test_files_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(RetouchError, match="cannot be read"):
        record.read(tmp_path / "none.jsonl")
    torn = tmp_path / "torn.jsonl"
    record.append(torn, [Record("s", "n", 1.0, "s")])
    torn.write_text(torn.read_text() + '{"suite": "s", "na')
    with pytest.raises(RetouchError, match="line 2"):
        record.read(torn)
    (tmp_path / "file").touch()
    with pytest.raises(OutputFailed):
        record.append(tmp_path / "file" / "rows.jsonl", [Record("s", "n", 1.0, "s")])


def test_environment_names_machine_and_code():
    where = record.environment(dtype="bfloat16", threads=2)
    assert where["device"] == where["processor"] != ""
    assert where["torch"][0].isdigit()
    assert where["diffusers"][0].isdigit()
    assert Record("s", "n", 1.0, "s", **where).threads == 2
