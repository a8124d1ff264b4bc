"""`retouch cost`: its figures add up, say what they leave out, and agree with what a server told its clients."""

from __future__ import annotations

import csv
import io
import json
import re
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from books import entry, total
from retouch import cli, config, prices
from retouch.edit import InvalidOption, QueueFull, RetouchError
from retouch.ledger import InvalidLedger, Lease, Ledger, tables
from retouch.ledger.sums import Sum
from retouch.measure import cost, cost_said
from retouch.serve.settings import Settings, Tenant
from serving import Painter, Serving, alpha_mask, area, encoded, photo

TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
DOCS = Path(__file__).parent.parent / "docs" / "costs.md"
TOKENS = ("tokens_computed", "tokens_whole")
IMAGE, HOLE = encoded(photo()), alpha_mask(area())


def wrote(address: str, *rows: Any, held: tuple[Lease, ...] = (), hours: float = 2.0) -> str:
    """A ledger of these rows, with leases that were held for so long until now."""
    with Ledger(address, write=True) as ledger:
        ledger.add(rows)
        for lease in held:
            ledger.add([], lease)
        with ledger.begin() as connection:
            now = int(time.time() * 1000)
            connection.execute(update(tables.leases).values(started=now - int(hours * 3_600_000), seen=now))
    return address


def told(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert cost.main([*options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def traffic(moment: float) -> list[Any]:
    """Ann's three edits of half a second, one of them another model's; Ben's one of a second, and one that failed."""
    return [
        *(entry(time=moment, model=model, lease="l1") for model in ("mini", "mini", "klein")),
        entry(time=moment, tenant="ben", lease="l2", seconds={"document": 0.4, "step": 0.6}, dollars=0.001, cache_hits=()),
        entry(
            time=moment,
            tenant="ben",
            lease="l2",
            status="failed",
            seconds={},
            dollars=None,
            tokens_computed=0,
            tokens_whole=0,
            cache_hits=(),
        ),
    ]


def test_the_table_by_tenant(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    now = time.time()
    answer = told(capsys, "--ledger", wrote(address, *traffic(now), *traffic(now - 10 * 86_400)))
    ann, ben = answer["rows"]
    assert (ann["tenant"], ann["edits"], ann["failed"], ann["device_seconds"]) == ("ann", 3, 0, 1.5)
    assert (ben["tenant"], ben["edits"], ben["failed"], ben["device_seconds"]) == ("ben", 1, 1, 1.0)
    assert (ann["dollars"], ben["dollars"]) == (0.0015, 0.001)
    assert (ann["dollars_per_million"], ben["dollars_per_million"]) == (pytest.approx(500), pytest.approx(1000))
    assert ann["tokens_saved"] == pytest.approx(1 - 400 / 4096)
    assert (ann["prompt_hits"], ben["prompt_hits"], ann["document_hits"], ann["result_hits"]) == (1, 0, 0, 0)
    whole = answer["total"]
    assert (whole["edits"], whole["failed"], whole["device_seconds"], whole["dollars"]) == (4, 1, 2.5, pytest.approx(0.0025))
    assert (whole["held_dollars"], answer["held_hours"]) == (None, None)
    assert told(capsys, "--ledger", address, "--since", "20d")["total"]["edits"] == 8


def test_models_days_and_stages(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrote(address, *traffic(TODAY - 1), *traffic(TODAY - 86_400), entry(time=TODAY - 86_401))
    options = ("--ledger", address, "--since", "30d", "--by")
    assert {row["model"]: row["edits"] for row in told(capsys, *options, "model")["rows"]} == {"mini": 7, "klein": 2}
    days = told(capsys, *options, "day")["rows"]
    dates = [datetime.fromtimestamp(TODAY - ago * 86_400, UTC).date().isoformat() for ago in (2, 1)]
    assert [(row["day"], row["edits"]) for row in days] == [(dates[0], 1), (dates[1], 8)]
    answer = told(capsys, *options, "stage")
    rows, whole = {row["stage"]: row for row in answer["rows"]}, answer["total"]
    assert list(rows) == ["document", "step", "finish"]
    assert rows["step"]["device_seconds"] == pytest.approx(7 * 0.25 + 2 * 0.6)
    for name in ("device_seconds", "dollars", "dollars_per_million"):
        assert sum(row[name] for row in rows.values()) == pytest.approx(whole[name])
    assert all(row["edits"] == 9 for row in rows.values())


def test_held_devices_are_charged_to_whom_they_served(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Two hours each: the first at $3 is Ann's, the second at $6 Ben's, the idle one at $1 all edits' by their device time."""
    leases = (
        Lease("A", price=3.0, id="l1"),
        Lease("B", price=6.0, id="l2"),
        Lease("C", price=1.0, id="l3"),
        Lease("D", id="l4"),
    )
    answer = told(capsys, "--ledger", wrote(address, *traffic(time.time()), held=leases))
    ann, ben = answer["rows"]
    assert ann["held_dollars"] == pytest.approx(6 + 2 * 1.5 / 2.5, rel=1e-3)
    assert ben["held_dollars"] == pytest.approx(12 + 2 * 1.0 / 2.5, rel=1e-3)
    assert answer["total"]["held_dollars"] == pytest.approx(20, rel=1e-3)
    assert ann["held_dollars_per_million"] == pytest.approx(ann["held_dollars"] / 3 * 1e6)
    assert answer["held_hours"] == pytest.approx(8, rel=1e-3)
    assert answer["busy_hours"] == pytest.approx(2.5 / 3600)
    assert {price["device"]: price["per_hour"] for price in answer["prices"]} == {"A": 3.0, "B": 6.0, "C": 1.0, "D": None}
    stages = told(capsys, "--ledger", address, "--by", "stage")
    assert sum(row["held_dollars"] for row in stages["rows"]) == pytest.approx(20, rel=1e-3)


def test_only_one_model_or_tenant(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They have their part of what the devices cost: of Ann's, half a second of a second and a half, of the idle one's, of two
    and a half.
    """
    leases = (Lease("A", price=3.0, id="l1"), Lease("B", price=6.0, id="l2"), Lease("C", price=1.0, id="l3"))
    options = ("--ledger", wrote(address, *traffic(time.time()), held=leases))
    answer = told(capsys, *options, "--model", "klein")
    assert [(row["tenant"], row["edits"], row["device_seconds"]) for row in answer["rows"]] == [("ann", 1, 0.5)]
    assert answer["only"] == {"model": "klein"}
    assert answer["total"]["held_dollars"] == pytest.approx(6 * 0.5 / 1.5 + 2 * 0.5 / 2.5, rel=1e-3)
    assert answer["busy_hours"] == pytest.approx(0.5 / 3600)
    both = told(capsys, *options, "--model", "mini", "--tenant", "ben", "--by", "stage")
    assert sum(row["device_seconds"] for row in both["rows"]) == pytest.approx(1.0)
    assert sum(row["held_dollars"] for row in both["rows"]) == pytest.approx(12 + 2 * 1.0 / 2.5, rel=1e-3)
    parts = [told(capsys, *options, "--model", name)["total"]["held_dollars"] for name in ("mini", "klein")]
    assert sum(parts) == pytest.approx(told(capsys, *options)["total"]["held_dollars"])
    assert told(capsys, *options, "--held", "10", "--model", "klein")["total"]["held_dollars"] == pytest.approx(36 * 0.5 / 2.5)


def test_of_a_model_that_did_nothing(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--ledger", wrote(address, *traffic(time.time()), held=(Lease("A", price=3.0, id="l1"),)), "--model", "none")
    answer = told(capsys, *options)
    assert (answer["rows"], answer["total"]["edits"], answer["total"]["held_dollars"]) == ([], 0, None)
    assert cost.main([*options]) == 0
    assert "no edits of model 'none' from " in capsys.readouterr().out


def test_hours_may_be_given(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """At the mean price of what was computed: busy cost over utilisation."""
    wrote(address, *traffic(time.time()), held=(Lease(price=100.0),))
    answer = told(capsys, "--ledger", address, "--held", "10")
    assert answer["held_hours"] == 10
    assert answer["total"]["held_dollars"] == pytest.approx(10 * 3.6)
    assert [row["held_dollars"] for row in answer["rows"]] == pytest.approx([36 * 1.5 / 2.5, 36 * 1.0 / 2.5])


def test_edits_without_a_price_are_said(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    now = time.time()
    wrote(
        address,
        entry(time=now),
        entry(time=now, price=None, dollars=None),
        entry(time=now, tenant="b", price=None, dollars=None),
    )
    answer = told(capsys, "--ledger", address, "--held", "1")
    ann, other = answer["rows"]
    assert (ann["dollars"], ann["dollars_per_million"], ann["unpriced"]) == (0.0005, pytest.approx(500), 1)
    assert (other["dollars"], other["dollars_per_million"], other["unpriced"]) == (None, None, 1)
    cost.main(["--ledger", address])
    out = capsys.readouterr().out
    assert "2 of 3 edits have no price" in out
    with Ledger(address, write=True) as ledger, ledger.begin() as connection:
        connection.execute(update(tables.edits).values(price=None, nanodollars=None))
    assert told(capsys, "--ledger", address, "--held", "1")["total"]["held_dollars"] is None
    cost.main(["--ledger", address, "--held", "1"])
    assert "What held devices cost is not known" in capsys.readouterr().out


def test_the_printed_table_says_how_to_read_it(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    now = time.time()
    strange = [entry(time=now, tenant=name) for name in ("", "[red]東京[/red] :smile:", "line\nbreak")]
    wrote(address, *traffic(now), *strange, held=(Lease("NVIDIA H100", price=3.0, source="our contract", id="l1"),))
    assert cost.main(["--ledger", address]) == 0
    out = capsys.readouterr().out
    for text in ("(no key)", "[red]東京[/red] :smile:", r"'line\nbreak'", "$/M", "held 2.00 h, busy 0.1 min (0%)", "total"):
        assert text in out
    assert "NVIDIA H100: $3 an hour, our contract" in out
    assert "1 failed and 0 cancelled edits is not known" in out


def test_csv(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrote(address, *traffic(time.time()), entry(time=time.time(), tenant='a,"b'))
    for by in cost.BY:
        assert cost.main(["--ledger", address, "--csv", "--by", by]) == 0
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        assert rows
        assert next(iter(rows[0])) == by
        spent = rows[:1] if by == "cause" else rows
        assert sum(float(row["dollars"]) for row in spent) == pytest.approx(0.003)
    assert cost.main(["--ledger", address, "--csv"]) == 0
    assert {row["tenant"] for row in csv.DictReader(io.StringIO(capsys.readouterr().out))} == {"ann", "ben", 'a,"b'}


def test_a_time_without_edits(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrote(address, held=(Lease(price=3.0),))
    assert cost.main(["--ledger", address, "--since", "2h"]) == 0
    out = capsys.readouterr().out
    assert "no edits from" in out
    assert "not known" not in out
    answer = told(capsys, "--ledger", address)
    assert (answer["rows"], answer["total"]["edits"], answer["held_hours"]) == ([], 0, pytest.approx(2, rel=1e-3))
    assert answer["total"]["held_dollars"] == pytest.approx(6, rel=1e-3)
    assert told(capsys, "--ledger", address, "--by", "stage")["rows"] == []
    assert cost.main(["--ledger", address, "--csv"]) == 0
    assert capsys.readouterr().out.startswith("tenant,edits")


def test_what_is_old_is_removed(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    now = time.time()
    wrote(address, entry(time=now), entry(time=now - 100 * 86_400), entry(time=now - 80 * 86_400))
    assert cost.main(["--ledger", address, "--forget-before", "90d", "--since", "200d", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["total"]["edits"] == 2
    assert captured.err.startswith("retouch: 1 edits that ended before ")
    assert total(address, until=now + 10).edits == 2


def test_moments() -> None:
    now = 1_790_000_000.0
    for text, ago in (("7d", 7 * 86_400), ("12h", 43_200), ("30m", 1800), ("90s", 90), ("2w", 14 * 86_400), (" 1.5h ", 5400)):
        assert cost_said.moment("--since", text, now) == now - ago
    midnight = datetime(2026, 9, 1, tzinfo=UTC).timestamp()
    for text in ("2026-09-01", "2026-09-01T00:00", "2026-09-01T00:00Z", "2026-09-01T02:00+02:00", "20260901"):
        assert cost_said.moment("--since", text, now) == midnight


@pytest.mark.parametrize(
    "text",
    ["", "7", "7x", "-7d", "d", "0d", "7 d", "1e3d", "99999999999d", "999999999w", "yesterday", "2026-13-01", "nan", "7dd"],
)
def test_what_is_no_moment_is_refused(text: str) -> None:
    with pytest.raises(InvalidOption, match=r"--until is .*; give a time ago such as 7d"):
        cost_said.moment("--until", text, 1_790_000_000.0)


def test_what_cannot_be_told_is_refused(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrote(address, entry())
    for options, reason in (
        (("--since", "1d", "--until", "2d"), "--since 1d is not before --until 2d"),
        (("--since", "2999-01-01"), "--since 2999-01-01 is not before now"),
        (("--held", "0"), "--held is 0.0; give the hours"),
        (("--held", "nan"), "--held is nan"),
        (("--held", "-1"), "--held is -1"),
        (("--ledger", ""), "no address of a database|names no file"),
    ):
        with pytest.raises(RetouchError, match=reason):
            cost.main(["--ledger", address, *options])
    for options in (["--by", "weather"], ["--csv", "--json"], ["--held", "x"], ["--nosuch"], ["--since"]):
        with pytest.raises(SystemExit):
            cost.main(options)
    missing = tmp_path / "none" / "ledger.sqlite"
    for options in ([], ["--forget-before", "1d"]):
        with pytest.raises(InvalidLedger, match="there is no ledger at"):
            cost.main(["--ledger", str(missing), *options])
    assert not missing.parent.exists()
    capsys.readouterr()


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RETOUCH_DATA", str(tmp_path))
    assert cli.main(["cost"]) == 2
    assert "there is no ledger at" in capsys.readouterr().err
    wrote(str(config.ledger_file()), entry(time=time.time()))
    assert cli.main(["cost", "--since", "1h", "--by", "model"]) == 0
    assert "mini" in capsys.readouterr().out
    assert cli.main(["cost", "--since", "soon"]) == 2
    assert capsys.readouterr().err.startswith("retouch: --since is 'soon'")


# What a server writes


def test_the_books_say_what_the_answers_said(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    keys = (Tenant("Łódź", "a"), Tenant("ben", "b", operator=True))
    with Serving(Settings(price=3.6, tenants=keys, ledger=address)) as server:
        server.client.headers["Authorization"] = "Bearer a"
        answers = [server.edit(IMAGE, HOLE, n=n, seed=n).json() for n in (1, 3)]
        server.client.headers["Authorization"] = "Bearer b"
        answers.append(server.edit(IMAGE, HOLE).json())
        server.worker.fault = QueueFull("full")
        assert server.edit(IMAGE, HOLE, n=2).status_code == 429
        end = time.monotonic() + 10
        while 'retouch_ledger_rows_total{kind="written"} 7.0' not in server.get("/metrics").text:
            assert time.monotonic() < end
        assert server.get("/v1/stats").json()["price_source"] == "--price"
    costs = [answer["usage"]["retouch"] for answer in answers]
    capsys.readouterr()
    books = told(capsys, "--ledger", address)
    assert {row["tenant"]: (row["edits"], row["failed"]) for row in books["rows"]} == {"Łódź": (4, 0), "ben": (1, 2)}
    whole = books["total"]
    assert whole["device_seconds"] == sum(sum(one["seconds"].values()) for one in costs)
    assert whole["dollars"] == pytest.approx(sum(one["dollars"] for one in costs))
    assert whole["tokens_computed"] == sum(one["tokens_computed"] for one in costs)
    assert (whole["prompt_hits"], whole["document_hits"]) == (1, 0)
    assert whole["held_dollars"] == pytest.approx(books["held_hours"] * 3.6)
    with Ledger(address) as ledger, ledger.begin() as connection:
        rows = connection.execute(tables.edits.select()).mappings().all()
    assert {row["error"] for row in rows} == {"", "queue_full"}
    assert len({row["run"] for row in rows}) == 4
    assert sorted(row["part"] for row in rows) == [0, 0, 0, 0, 1, 1, 2]
    one = rows[0]
    assert (one["model"], one["price"], one["version"]) == ("retouch-mini", 3.6, "0.1.0")
    assert one["latency_us"] > 0
    assert len(one["lease"]) == 24


def test_cancelled_edits_stand_in_the_books(tmp_path: Path) -> None:
    address = str(tmp_path / "ledger.sqlite")
    with Serving(Settings(ledger=address, drain_seconds=0.2), Painter(hold=True)) as server:
        job = server.edit(IMAGE, HOLE, path="/v1/jobs", n=2).json()["id"]
        server.worker.wait(lambda: len(server.worker.asked) == 2)
        assert server.client.delete(f"/v1/jobs/{job}").json()["status"] == "cancelled"
        server.edit(IMAGE, HOLE, path="/v1/jobs")  # which still runs when the server is stopped
        server.worker.wait(lambda: len(server.worker.asked) == 3)
        server.stop()
        server.thread.join(10)
    found = total(address)
    assert (found.edits, found.cancelled, found.failed) == (0, 2, 1)


def test_a_ledger_that_is_away_stops_no_edit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with Serving(Settings(ledger=str(blocked / "ledger.sqlite"))) as server:
        assert [server.edit(IMAGE, HOLE).status_code for _ in range(3)] == [200] * 3
        assert "retouch_ledger_waiting 3.0" in server.get("/metrics").text
    said = [one.getMessage() for one in caplog.records if one.name == "retouch.ledger.writer"]
    assert len(said) == 2
    assert "Edits go on" in said[0]
    assert "3 rows of the ledger" in said[1]


def test_without_a_ledger_there_is_no_writer() -> None:
    with Serving() as server:
        assert server.edit(IMAGE, HOLE).status_code == 200
        assert server.service.books.writer is None
        assert "retouch-ledger" not in {thread.name for thread in threading.enumerate()}
        assert server.get("/v1/stats").json()["price_source"] is None


# What the page on costs says


def test_the_page_names_every_option_and_column() -> None:
    page = DOCS.read_text(encoding="utf-8")
    options = {option for action in cost._parser()._actions for option in action.option_strings if option.startswith("--")}
    named = set(re.findall(r"--[a-z][a-z-]+", page))
    assert options - {"--help"} <= named
    assert named - options <= {"--prices", "--price", "--beside"}
    for by in ("tenant", "stage"):
        assert {name for name in cost.row("", Sum(), by) if name != by} <= {*re.findall(r"`(\w+)`", page), *TOKENS}
    for name, heading in cost.COLUMNS.items():
        assert f"`{name}`" in page
        assert heading in page


def test_the_pages_examples_work(tmp_path: Path) -> None:
    page = DOCS.read_text(encoding="utf-8")
    toml, sql = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("toml", "sql"))
    assert toml
    assert sql
    (tmp_path / "prices.toml").write_text(toml[1], encoding="utf-8")
    assert [one.per_hour for one in prices.read(tmp_path / "prices.toml")] == [2.10, 0.03]
    with Ledger(wrote(str(tmp_path / "ledger.sqlite"), *traffic(time.time()))) as ledger, ledger.begin() as connection:
        rows = connection.exec_driver_sql(sql[1]).all()
    assert [tuple(row) for row in rows] == [("ann", 3, 1.5, 0.0015), ("ben", 1, 1.0, 0.001)]
