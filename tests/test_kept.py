"""Measured rows are kept in a file and in the books; books that cannot be written take nothing away from the file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from retouch import config, record
from retouch.edit import InvalidOption, OutputFailed
from retouch.ledger import InvalidLedger, Ledger
from retouch.measure.kept import Kept
from retouch.record import Record

ROWS = [Record("load", "latency p50", value, "s") for value in (1.5, 12)]


def test_rows_are_in_both(address: str, tmp_path: Path) -> None:
    kept = Kept(tmp_path / "rows.jsonl", address)
    kept.add(ROWS[:1])
    kept.add([])
    kept.add(ROWS[1:])
    with Ledger(address) as ledger:
        assert ledger.records() == record.read(tmp_path / "rows.jsonl") == ROWS


def test_the_usual_books_are_those_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETOUCH_DATA", str(tmp_path / "data"))
    Kept(None, "none").add(ROWS)
    assert not config.ledger_file().exists()
    Kept(None, None).add(ROWS)
    with Ledger(str(config.ledger_file())) as ledger:
        assert ledger.records() == ROWS


def test_the_tests_own_books_are_not_the_users() -> None:
    assert "retouch-tests-" in str(config.ledger_file())


@pytest.mark.parametrize("out", [True, False])
def test_books_that_are_away_are_said_once_and_the_file_has_all(
    out: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "rows.jsonl" if out else None
    kept = Kept(path, str(tmp_path / "file" / "ledger.sqlite"))
    kept.add(ROWS)
    kept.add(ROWS)
    said = capsys.readouterr().err
    assert said.count("Rows are not in the books") == 1
    assert (f"--take {path}` brings them in later" if out else "give --out FILE") in said
    assert path is None or record.read(path) == ROWS * 2


def test_books_that_break_later_are_said_once_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    books = tmp_path / "ledger.sqlite"
    kept = Kept(tmp_path / "rows.jsonl", str(books))
    books.write_bytes(b"no database at all, but a text of more than a few bytes" * 20)
    kept.add(ROWS)
    kept.add(ROWS)
    assert capsys.readouterr().err.count("Rows are not in the books") == 1
    assert record.read(tmp_path / "rows.jsonl") == ROWS * 2


def test_a_file_that_cannot_be_written_leaves_the_rows_in_the_books(tmp_path: Path) -> None:
    books = str(tmp_path / "ledger.sqlite")
    kept = Kept(tmp_path, books)
    with pytest.raises(OutputFailed):
        kept.add(ROWS)
    with Ledger(books) as ledger:
        assert ledger.records() == ROWS


def test_what_are_no_books_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "damaged").write_bytes(b"no database at all, but a text of more than a few bytes" * 20)
    with pytest.raises(InvalidLedger):
        Kept(None, str(tmp_path / "damaged"))
    with pytest.raises(InvalidOption):
        Kept(None, "nosuch://x")


def test_without_a_database_the_usual_books_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "retouch.ledger", None)
    with pytest.raises(InvalidOption, match="pip install"):
        Kept(None, "ledger.sqlite")
    Kept(tmp_path / "rows.jsonl", None).add(ROWS)
    assert capsys.readouterr().err.count("pip install 'retouch[ledger]'") == 1
    assert record.read(tmp_path / "rows.jsonl") == ROWS
