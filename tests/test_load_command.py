"""`retouch load`: its figures, the rate at which a server saturates, and every way to be refused."""

from __future__ import annotations

import asyncio
import importlib
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endpoints import WHERE, edit
from retouch import cli, record, trace
from retouch.edit import RetouchError, Usage
from retouch.ledger import Ledger
from retouch.measure import load_command, summary
from retouch.measure.endpoint import EXTENSIONS
from retouch.measure.load import Answer, Replay, saturation
from retouch.serve.settings import Settings, Tenant
from retouch.trace import hash_of
from serving import Painter, Serving

# Saturation and figures


@given(capacity=st.floats(0.5, 500), start=st.floats(0.1, 1000))
def test_the_saturating_rate_is_bracketed(capacity, start):
    async def probe(rate):
        return 1.0 if rate <= capacity else capacity / rate

    found = asyncio.run(saturation(probe, 0.999, start, probes=40))
    assert found.held <= capacity * 1.002
    assert found.failed > capacity
    assert found.failed <= found.held * 1.1 + 1e-9
    assert [p.good >= 0.999 for p in found.probes] == [p.rate <= found.held for p in found.probes]


def test_a_search_that_cannot_tell_says_so():
    async def always(rate):
        return 1.0

    async def never(rate):
        return 0.0

    found = asyncio.run(saturation(always, 0.9, 1.0, most=6.0))
    assert (found.held, found.failed) == (6.0, None)
    assert [probe.rate for probe in found.probes] == [1, 2, 4, 6]
    row = summary.saturated(found, WHERE, {}, 0.9, 1.0, "")
    assert row.value is None
    assert "undecided: it held 6 requests a second" in row.error
    found = asyncio.run(saturation(never, 0.9, 1.0, probes=3))
    row = summary.saturated(found, WHERE, {}, 0.9, 1.0, "unreachable")
    assert row.error == "even at 0.25 requests a second fewer than 90% were served in time (unreachable)"


def answer(seconds, error="", deadline=None, n=1):
    return Answer(0, 0.0, 0.0, seconds, n, deadline, error, usage=Usage({"step": 0.5}, 10, 40, 0, 4, ("document",)))


def test_the_figures_of_a_replay():
    answers = [answer(0.01 * (i + 1), n=2) for i in range(100)] + [answer(9.0, "timeout", n=2)]
    rows = {row.name: row for row in summary.records(Replay(tuple(answers), 10.0), WHERE, {"trace": "t"}, deadline=0.5)}
    assert [rows[f"latency p{at}"].value for at in (50, 90, 95, 99)] == pytest.approx([0.505, 0.901, 0.9505, 0.9901])
    assert (rows["latency p50"].low, rows["latency p50"].high) == pytest.approx((0.109, 0.901))
    assert rows["requests per second"].value == 10
    assert rows["edits per second"].value == 20
    assert rows["goodput"].value == 5
    assert rows["served in time"].value == pytest.approx(50 / 101)
    assert rows["device seconds an edit"].value == 0.25
    assert rows["edits that found their document encoded"].value == 0.5
    assert rows["image tokens computed, of the whole"].value == 0.25
    assert all(row.extra["trace"] == "t" for row in rows.values())
    own = [answer(2.0, deadline=1.0), answer(2.0, deadline=3.0)]
    rows = {row.name: row for row in summary.records(Replay(tuple(own), 4.0), WHERE, {})}
    assert rows["served in time"].value == 0.5
    assert "latency p90" not in rows  # two answers do not tell


@given(seconds=st.lists(st.floats(0.001, 100), min_size=1, max_size=200))
def test_percentiles_grow(seconds):
    rows = summary.records(Replay(tuple(map(answer, seconds)), 1.0), WHERE, {})
    values = [row.value for row in rows if row.name.startswith("latency")]
    assert all(a <= b for a, b in pairwise(values))
    assert min(seconds) <= values[0] <= max(seconds)


# The command


@pytest.fixture
def file(tmp_path, small):
    path = tmp_path / "small.jsonl"
    trace.write(path, small)
    return path


def test_the_command_loads_a_server(file, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    with Serving(worker=Painter()) as server:
        books = str(tmp_path / "ledger.sqlite")
        common = [str(file), "--url", f"{server.url}/v1", "--out", str(out), "--ledger", books]
        assert cli.main(["load", *common, "--clients", "2", "--deadline", "30", "--fresh"]) == 0
        assert cli.main(["load", *common, "--speed", "20", "--requests", "6", "--send", "seed,use_cache"]) == 0
    rows = record.read(out)
    assert {row.suite for row in rows} == {"load"}
    with Ledger(books) as ledger:
        assert ledger.records() == rows
    first, second = ([row for row in rows if row.extra["loop"] == loop] for loop in ("closed", "open"))
    assert first[0].n == 12
    assert second[0].n == 6
    assert first[0].extra | {"target": ""} == {
        "trace": "small.jsonl", "trace_hash": hash_of(file.read_bytes()), "mix": "personal", "trace_seed": 3,
        "knobs": "requests=12 rate=50 think=0.1 variations=2 commit=0.8 side=[64] tenants=2", "new_documents": True,
        "requests": 12, "target": "", "warm_up": 3, "loop": "closed", "clients": 2,
    }  # fmt: skip
    assert (first[0].dtype, first[0].threads) == ("float32", 2)
    text = capsys.readouterr().out
    assert "latency p50" in text
    assert "served in time" in text


def test_the_command_searches_where_a_server_saturates(file, tmp_path):
    out = tmp_path / "rows.jsonl"
    with Serving(worker=Painter(seconds=0.02)) as server:
        searching = ["--deadline", "0.1", "--saturate", "0.9", "--out", str(out)]
        assert cli.main(["load", str(file), "--url", server.url, *searching]) in (0, 1)
    (row,) = record.read(out)
    assert row.name == "saturating rate"
    assert row.value or "undecided" in row.error or "even at" in row.error
    assert row.extra["probes"] >= 2


def test_the_command_says_at_once_that_nobody_is_there(file, capsys):
    started = time.perf_counter()
    assert cli.main(["load", str(file), "--url", "http://127.0.0.1:9", "--speed", "0.001"]) == 1
    assert time.perf_counter() - started < 10
    assert "unreachable" in capsys.readouterr().out


def test_the_command_loads_an_engine(file, engine, monkeypatch, capsys):
    monkeypatch.setattr("retouch.engine.load", lambda model, dtype: engine, raising=False)
    assert cli.main(["load", str(file), "--engine", "--requests", "4", "--clients", "2", "--warm-up", "1"]) == 0
    assert "edits that found their document encoded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--url", "nowhere"], "is no address"),
        (["--url", "http://x", "--clients", "0"], "--clients is 0"),
        (["--url", "http://x", "--speed", "0"], "--speed is 0"),
        (["--url", "http://x", "--saturate", "2"], "--saturate is 2"),
        (["--url", "http://x", "--clients", "2", "--saturate", "0.9"], "leave out --speed and --saturate"),
        (["--url", "http://x", "--field", "model"], "give NAME=VALUE"),
        (["--url", "http://x", "--send", "colour"], "there is no extension colour"),
        (["--url", "http://x", "--keys", "{}/none.toml"], "cannot be read"),
        (["--url", "http://x", "--pictures", "{}"], "no picture in"),
        (["--url", "http://127.0.0.1:9", "--saturate", "0.9", "--warm-up", "0"], "--saturate needs --deadline"),
    ],
)
def test_the_command_refuses_in_one_line(file, tmp_path, capsys, argv, text):
    (tmp_path / "sub").mkdir()
    assert cli.main(["load", str(file), *(part.format(tmp_path / "sub") for part in argv)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("retouch: ")
    assert error.count("\n") == 1
    assert text in error


def test_only_an_engine_wants_torch():
    code = "import sys, retouch.measure.load_command, retouch.measure.trace_command; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_bench_sends_edits_with_the_same_client(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    live = importlib.import_module("live")
    asked = [edit(i, tenant="calm") for i in range(4)]
    keys = (Tenant("calm", "calm"), Tenant("flood", "flood"))
    with Serving(Settings(tenants=keys), Painter()) as server:
        answers, seconds = live.closed(server.url, asked, 2)
        assert [one.error for one in [*answers, *live.one_by_one(server.url, asked[:1], named=False)]] == [""] * 5
        assert 0 < max(answer.seconds for answer in answers) <= seconds
        monkeypatch.setattr(live, "SETTLED", 0.2)
        flood = [edit(9 + i, tenant="flood") for i in range(3)]
        assert len(live.open_loop(server.url, asked, 50.0, flood=flood, clients=2)) == 4
        server.idle()
        assert sum(one.edit.tenant == "flood" for one in server.worker.asked) > 3


def test_keys_are_read_as_the_server_reads_them(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text('[[tenant]]\nname = "a"\nkey = "ka"\n[[tenant]]\nname = "b"\nkey = "kb"\n')
    parse = load_command._parser().parse_args
    assert load_command._keys(parse(["t", "--engine", "--keys", str(path), "--key", "all"])) == {
        "": "all",
        "a": "ka",
        "b": "kb",
    }
    path.write_text('[[tenant]]\nname = "a"\nkey = "sha256:00"\n')
    with pytest.raises(RetouchError, match="only the digest of the key of a"):
        load_command._keys(parse(["t", "--engine", "--keys", str(path)]))


def test_the_page_on_measuring_names_every_option():
    text = (Path(__file__).parent.parent / "docs" / "measuring.md").read_text(encoding="utf-8")
    for action in load_command._parser()._actions:
        for option in action.option_strings:
            assert not option.startswith("--") or option == "--help" or f"`{option}" in text, option
    assert all(name in text for name in EXTENSIONS)
