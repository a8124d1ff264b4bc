"""`retouch quality`: its verdict is its exit code, its rows are kept, and what it cannot do is refused."""

import numpy as np
import pytest
from PIL import Image

from judged import Painter, case
from retouch import cli, record
from retouch.edit import RetouchError
from retouch.ledger import Ledger
from retouch.measure import cases as edit_sets
from retouch.measure import floor, metrics, quality_command


@pytest.fixture
def quick(monkeypatch):
    """Without the packages' metrics."""
    monkeypatch.setattr(metrics, "METRICS", metrics.METRICS[:1])


def test_the_engine_is_held_against_the_whole_path(tmp_path, capsys):
    """On a tenth of the set: undecided, with everything shown; outside identical on real weights."""
    out, page = tmp_path / "rows.jsonl", tmp_path / "worst.png"
    asked = ["quality", "--engine", "--dtype", "float32", "--against", "whole", "--cases", "2", "--seeds", "1"]
    code = cli.main([*asked, "--out", str(out), "--sheet", str(page)])
    printed = capsys.readouterr().out
    assert code == quality_command.UNSURE, printed
    assert "undecided" in printed
    assert "2 cases are too few" in printed
    rows = record.read(out)
    by_path = {row.extra["path"]: row.value for row in rows if row.name == "inside psnr" and not row.extra["kind"]}
    assert set(by_path) == {"whole", "engine"}
    assert all(row.value == 0 for row in rows if row.name == "edits changed outside")
    assert Image.open(page).width > 1000


@pytest.mark.usefixtures("quick")
def test_a_gate_that_fails_is_exit_code_1(monkeypatch, tmp_path, capsys):
    """Two painters in place of engines: what one paints wrong is certain."""
    cases = [case((64, 60), f"{i}", seed=i) for i in range(20)]
    edit_sets.write(tmp_path, cases)
    sides = {"http://plain": None, "http://fast": lambda made: np.clip(made.astype(int) + 30, 0, 255).astype(np.uint8)}
    monkeypatch.setattr(quality_command, "Endpoint", lambda url, **_: Painter(cases, sides[url]))
    base = ["quality", "--edits", str(tmp_path), "--against", "http://plain", "--limit", "inside psnr=0.5"]
    assert cli.main([*base, "--url", "http://fast"]) == 1
    assert "changed pixels outside" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*base, "--url", "http://plain", "--floor"]) == 0
    assert "pass" in capsys.readouterr().out
    assert cli.main([*base, "--url", "http://plain", "--seeds", "1"]) == 3


@pytest.mark.usefixtures("quick")
def test_the_floor_of_a_metric_that_needs_weights_has_rows(monkeypatch, tmp_path, capsys):
    cases = [case((64, 60), f"{i}", seed=i) for i in range(20)]
    edit_sets.write(tmp_path, cases)
    monkeypatch.setattr(quality_command, "Endpoint", lambda url, **_: Painter(cases))
    monkeypatch.setattr(quality_command, "_learned", lambda args: lambda case, shown: ({"lpips": 0.25}, None))
    base = ["quality", "--edits", str(tmp_path), "--url", "http://fast", "--against", "http://plain", "--floor"]
    out = tmp_path / "rows.jsonl"
    assert cli.main([*base, "--limit", "inside lpips=0.05", "--out", str(out)]) == 0, capsys.readouterr().out
    floors = {row.extra["variant"]: row.value for row in record.read(out) if row.name == "floor: loss of inside lpips"}
    assert floors == {"answered again": 0, "packed": 0}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fails", ["http://fast", "again"])
def test_what_was_measured_is_kept_where_the_rest_fails(fails, monkeypatch, tmp_path, capsys):
    cases = [case((64, 60), f"{i}", seed=i) for i in range(3)]
    edit_sets.write(tmp_path, cases)

    def endpoint(url, **_):
        if url == fails:
            raise RetouchError("no such server")
        return Painter(cases)

    def variant(*_):
        raise RetouchError("it broke meanwhile")

    monkeypatch.setattr(quality_command, "Endpoint", endpoint)
    if fails == "again":
        monkeypatch.setattr(floor, "variant", variant)
    out, books = tmp_path / "rows.jsonl", str(tmp_path / "ledger.sqlite")
    base = ["quality", "--edits", str(tmp_path), "--url", "http://fast", "--against", "http://plain"]
    more = ["--floor"] if fails == "again" else []
    assert cli.main([*base, *more, "--out", str(out), "--ledger", books]) == 2
    capsys.readouterr()
    rows = record.read(out)
    assert {row.extra["path"] for row in rows} == {"http://plain"}
    assert [row.value for row in rows if row.name == "inside psnr" and not row.extra["kind"]] == [metrics.IDENTICAL]
    with Ledger(books) as ledger:
        assert ledger.records() == rows


def test_a_server_that_is_down_is_one_error_and_exit_code_1(capsys):
    pytest.importorskip("httpx")
    assert cli.main(["quality", "--url", "http://127.0.0.1:9", "--cases", "2", "--seeds", "1"]) == 1
    assert "nothing was answered: unreachable" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--seeds", "0"], "at least 1"),
        (["--kind", "repaint"], "no kind"),
        (["--limit", "psnr=1"], "ZONE METRIC"),
        (["--limit", "inside psnr=x"], "ZONE METRIC"),
        (["--limit", "inside psnr=-1"], "above 0"),
        (["--level", "2"], "level"),
        (["--sheet", "a.png"], "--against"),
        (["--edits", "nowhere"], "no index"),
        (["--lpips", "a", "b"], "cannot be read"),
    ],
)
def test_bad_options_are_refused(wrong, said, capsys):
    assert cli.main(["quality", "--engine", *wrong]) == 2
    assert said in capsys.readouterr().err


def test_options_of_an_engine_are_not_a_servers(capsys):
    assert cli.main(["quality", "--url", "http://127.0.0.1:9", "--keys", "int8"]) == 2
    assert "options of --engine" in capsys.readouterr().err
