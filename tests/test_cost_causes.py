"""`retouch cost --by cause`: the parts add up, and come to what the very same edits take where nothing is spared."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from books import entry
from retouch.edit import InvalidOption
from retouch.ledger import Entry, Ledger, spared
from retouch.measure import cost

SPAN = ("--since", "2026-01-01", "--until", "2027-01-01")
DOCUMENT, PROMPT, STEP, CELL, FINISH, PIXELS = 1e-3, 0.02, 5e-3, 1e-4, 0.01, 4e-5
"""Seconds of a made-up device: a document's cell; a prompt; a step, and a cell of it; finishing, and a cell of it."""


def seconds(cells: int, steps: int, whole: int, found: tuple[str, ...] = ()) -> dict[str, float]:
    took = {"step": steps * (STEP + CELL * cells), "finish": FINISH + PIXELS * cells}
    took |= {} if "document" in found else {"document": DOCUMENT * whole}
    return took | ({} if "prompt" in found else {"prompt": PROMPT})


def served(cells: int, whole: int, found: tuple[str, ...] = (), steps: int = 4, **more: Any) -> Entry:
    took = seconds(cells, steps, whole, found)
    return entry(
        seconds=took, steps=steps, tokens_computed=steps * cells, tokens_whole=steps * whole, cache_hits=found,
        dollars=sum(took.values()) / 1000, **more,
    )  # fmt: skip


def traffic(count: int, **more: Any) -> list[Entry]:
    """Edits of pictures of two sizes, half of which find their document and a third their prompt."""
    draw = np.random.default_rng(0)
    made = []
    for number in range(count):
        whole = int(draw.choice([256, 1024]))
        found = ("document",) * (number % 2) + ("prompt",) * (number % 3 == 0)
        made.append(served(int(draw.integers(10, whole // 2)), whole, found, int(draw.choice([2, 4, 8])), **more))
    return made


def plain(rows: list[Entry]) -> float:
    """Seconds of the same edits, where nothing is spared."""
    took = 0.0
    for one in rows:
        whole = one.tokens_whole // one.steps
        took += sum(seconds(whole, one.steps, whole).values())
    return took


def wrote(address: str, rows: list[Entry]) -> str:
    with Ledger(address, write=True) as ledger:
        ledger.add(rows)
    return address


def told(capsys: pytest.CaptureFixture[str], address: str, *options: str) -> dict[str, Any]:
    assert cost.main(["--ledger", address, *SPAN, "--by", "cause", *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_parts_come_to_what_plain_edits_take(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = traffic(40)
    answer = told(capsys, wrote(address, rows))
    parts = {row["cause"]: row for row in answer["rows"]}
    spent = sum(sum(one.seconds.values()) for one in rows)
    assert parts["spent"]["device_seconds"] == pytest.approx(spent, rel=1e-4)
    assert answer["total"]["device_seconds"] == pytest.approx(sum(row["device_seconds"] for row in answer["rows"]))
    assert answer["total"]["device_seconds"] == pytest.approx(plain(rows), rel=1e-3)
    found = sum(one.tokens_whole / one.steps for one in rows if "document" in one.cache_hits)
    assert parts["documents"]["device_seconds"] == pytest.approx(found * DOCUMENT, rel=1e-3)
    assert parts["prompts"]["device_seconds"] == pytest.approx(14 * PROMPT, rel=1e-3)
    assert parts["results"]["device_seconds"] == 0
    assert answer["total"]["dollars"] == pytest.approx(plain(rows) / 1000, rel=1e-3)
    assert parts["mask"]["dollars_per_million"] == pytest.approx(parts["mask"]["dollars"] * 1e6 / 40)
    assert (answer["edits"], answer["unpriced"], answer["unknown"]) == (40, 0, [])


def test_a_finished_result_is_worth_what_the_others_took(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    again = entry(seconds={}, steps=0, tokens_computed=0, tokens_whole=0, cache_hits=("result",), dollars=0.0)
    rows = [served(100, 256), served(40, 256), again]
    parts = {row["cause"]: row["device_seconds"] for row in told(capsys, wrote(address, rows))["rows"]}
    assert parts["results"] == pytest.approx(parts["spent"] / 2, rel=1e-4)


def test_what_shows_nowhere_is_named_and_not_made_up(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrote(address, [served(100, 256, ("document", "prompt")) for _ in range(3)])
    answer = told(capsys, address)
    assert answer["unknown"] == ["documents", "prompts"]
    assert [row["device_seconds"] for row in answer["rows"] if row["cause"] in answer["unknown"]] == [0, 0]
    assert cost.main(["--ledger", address, *SPAN, "--by", "cause"]) == 0
    assert "shows what some of it is worth (documents found, prompts found)" in capsys.readouterr().out


def test_models_are_reckoned_apart_and_tenants_by_what_all_show(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    ann = traffic(20)
    ben = [served(60, 1024, ("document", "prompt"), tenant="ben")]
    slow = [entry(model="slow", seconds={"step": 80.0}, tokens_computed=4, tokens_whole=4, cache_hits=())]
    wrote(address, [*ann, *ben, *slow])
    assert told(capsys, address, "--model", "mini")["total"]["device_seconds"] == pytest.approx(plain([*ann, *ben]), rel=1e-3)
    answer = told(capsys, address, "--tenant", "ben")
    assert answer["unknown"] == []
    assert answer["total"]["device_seconds"] == pytest.approx(plain(ben), rel=1e-3)
    assert told(capsys, address, "--tenant", "cleo")["edits"] == 0


def test_edits_without_a_price_or_an_answer(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    lost = entry(status="failed", seconds={}, dollars=None, tokens_computed=0, tokens_whole=0, cache_hits=(), steps=0)
    free = [served(50, 256, price=None), served(30, 1024, price=None)]
    wrote(address, [lost, *free])
    answer = told(capsys, address)
    assert (answer["edits"], answer["unpriced"], answer["total"]["dollars"]) == (2, 2, None)
    assert cost.main(["--ledger", address, *SPAN, "--by", "cause"]) == 0
    assert "2 of 2 edits have no price" in capsys.readouterr().out


def test_the_table_and_the_csv(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrote(address, traffic(12))
    assert cost.main(["--ledger", address, *SPAN, "--by", "cause", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["cause"] for row in rows] == ["spent", *spared.CAUSES]
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1)
    assert cost.main(["--ledger", address, *SPAN, "--by", "cause"]) == 0
    printed = capsys.readouterr().out
    assert "cells outside the mask" in printed
    assert "without any of it" in printed
    assert "100%" in printed


def test_an_empty_time_and_options_that_do_not_go_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = wrote(str(tmp_path / "books.db"), [entry()])
    assert cost.main(["--ledger", address, "--since", "2020-01-01", "--until", "2020-02-01", "--by", "cause"]) == 0
    assert capsys.readouterr().out.startswith("no edits from 2020-01-01")
    with pytest.raises(InvalidOption, match="--held is of what held devices cost"):
        cost.main(["--ledger", address, "--by", "cause", "--held", "2"])


@pytest.mark.parametrize("masked", [True, False])
def test_where_all_edits_are_alike_the_cells_cost_in_proportion(
    masked: bool, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One size of mask shows no line: a step's fixed time is not told from that of its cells, and nothing is below 0."""
    wrote(address, [served(64 if masked else 256, 256) for _ in range(5)])
    parts = {row["cause"]: row["device_seconds"] for row in told(capsys, address)["rows"]}
    each = seconds(64, 4, 256)
    expected = 5 * 3 * (each["step"] + each["finish"]) if masked else 0
    assert parts["mask"] == pytest.approx(expected, rel=1e-3)
