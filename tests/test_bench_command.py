"""`retouch bench` with stand-ins for the subjects: what they do wrong is a row, what they do right adds up."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from retouch import cli, record, trace
from retouch.ledger import Ledger
from retouch.measure import bench_command, cases, standing, tally
from retouch.measure.machine import Machine
from retouch.measure.subjects import LADDER, Common, rungs
from retouch.trace import View

STANDIN = Path(__file__).with_name("standin.py")
WHERE = record.environment("", "float32", 1)
LAST = LADDER[-1].name
MS = (90.0, 75.0, 60.0, 45.0, 30.0, 15.0, 1.0)


def ladder(common):
    """As `rungs`, but of stand-ins that take MS each."""
    real = rungs(common)
    made = []
    for one in real:
        ms = MS[one.step]
        command = (sys.executable, str(STANDIN), "--ms", str(ms), "--usage")
        made.append(replace(one, command=command))
    return made


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs the command on small pictures and stand-ins; returns its exit code."""
    monkeypatch.setattr(bench_command, "rungs", ladder)
    monkeypatch.setattr(Machine, "rate", lambda self: 1e11)
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, dtype, threads: cls("cpu", "float32", 1)))
    trace = tmp_path / "trace.jsonl"
    made = ["trace", "make", "--mix", "personal", "--requests", "4", "--side", "64", "--out", str(trace)]
    assert cli.main(made) == 0

    def run(*options, quality=False):
        places = ["--out", str(tmp_path / "rows.jsonl"), "--report", str(tmp_path / "bench.html")]
        common = ["--trace", str(trace), "--model", str(tmp_path), "--price", "3.6", "--warm-up", "2"]
        return cli.main(["bench", *common, *places, *([] if quality else ["--no-quality"]), *options])

    return run


def peers_file(folder, **wrongs):
    """[[peer]] tables of stand-ins; each value is a list of options."""
    text = ""
    for name, options in wrongs.items():
        command = ", ".join(f'"{part}"' for part in (str(STANDIN), *options))
        text += f'[[peer]]\nname = "{name}"\ncommand = [{command}]\nkind = "full"\nconcurrency = 2\n'
    path = folder / "peers.toml"
    path.write_text(text)
    return str(path)


def rows_of(folder):
    return record.read(folder / "rows.jsonl")


def cost(rows, subject):
    return next(row for row in rows if row.name == tally.COST and row.extra["subject"] == subject)


def test_a_run_from_the_command_to_the_report(bench, tmp_path, capsys):
    assert bench("--peers", peers_file(tmp_path, whole=["--ms", "60"])) == 0
    rows, printed = rows_of(tmp_path), capsys.readouterr().out
    names = [str(row.extra["subject"]) for row in rows if row.name == tally.COST]
    assert names[0] == "plain"
    assert names[-1] == f"{LAST}, again"
    assert sorted(names) == sorted([*(rung.name for rung in LADDER), f"{LAST}, again", "whole"])
    (found,) = standing.standings(tally.latest(rows))
    ours = found.ours.name  # the last rung, unless the machine stopped for a while as it was measured
    plain, last, peer = (cost(rows, name) for name in ("plain", ours, "whole"))
    # $3.6 an hour is a tenth of a cent a second: a million edits of 90 ms are $90, and what HTTP takes
    assert plain.value >= 90
    assert last.n == sum(row.n for row in rows if row.name == "edits per second") or last.n > 4
    assert peer.extra["clients"] == 2
    assert plain.extra["rate_before"] == 1e11
    identical = [row for row in rows if row.name == "identical outside the mask"]
    assert len(identical) == len(MS) + 2
    assert all(row.value == 1 for row in identical)
    claim = found.claims()[0]
    assert claim.times == pytest.approx(peer.value / found.ours.settled)
    assert f"{claim.times:.1f} x fewer dollars than the full picture in the best peer, whole (target 10x: " in printed
    assert f"Retouch {ours}" in printed
    assert (tmp_path / "bench.html").exists()
    assert f"| **Retouch {ours}** |" in (tmp_path / "bench.md").read_text()
    stages = found.line("plain").stages
    assert sum(stages.values()) == pytest.approx(plain.value)
    assert stages["document"] == pytest.approx(18)
    assert stages["step"] == pytest.approx(63)
    assert stages[tally.IDLE] > 0


def test_who_had_a_slower_machine_is_measured_again(bench, tmp_path, capsys, monkeypatch):
    rates = iter([1e11] * 3 + [7e10] + [1e11] * 4 + [9e10, 9e10])
    monkeypatch.setattr(Machine, "rate", lambda self: next(rates))
    options = ("--peers", peers_file(tmp_path, a=[], b=[], c=["--wrong", "size"], d=[]), "--only", "full")
    assert bench(*options) == 0
    rows = [row for row in rows_of(tmp_path) if row.name == tally.COST]
    assert [row.extra["subject"] for row in rows] == ["a", "b", "c", "d", "b"]
    (found,) = standing.standings(tally.latest(rows_of(tmp_path)))
    assert (found.line("b").cost, found.slowed) == (rows[-1].value, {})
    rates = iter([1e11] * 3 + [7e10] + [1e11] * 4 + [6e10, 5e10])
    assert bench(*options) == 0
    *_, first, _, _, _ = (row for row in rows_of(tmp_path) if row.name == tally.COST)
    (found,) = standing.standings(tally.latest(rows_of(tmp_path)))
    assert (found.line("b").cost, found.slowed) == (first.value, {"b": pytest.approx(0.7)})  # once more, and no oftener
    assert "measured while the machine was slower than it usually was in this run: b (70%)" in capsys.readouterr().out
    rates = iter([1e11, 2e10, 1e11, 1e11, 1e11, 1e11, 1e11, 1e11])
    assert bench(*options, "--no-again") == 0
    assert next(rates, None) is None


WRONGS = {
    "start": (["--wrong", "does not start"], "it ended with exit code 1 before it was ready: there is no such device"),
    "dies": (["--wrong", "dies", "--after", "3"], "it died (exit code 7): "),
    "size": (["--wrong", "size"], "wrong size"),
    "never": (["--wrong", "never ready"], "it was not ready within 1.5 s (GET /healthz gives 503)"),
    "refuses": (["--wrong", "refuses", "--after", "3"], "requests were not served: "),
    "cut": (["--wrong", "cut off"], "is damaged or cut off"),
    "nofile": (["nothing.py"], "it ended with exit code "),
}


def test_what_goes_wrong_is_a_row_that_says_why(bench, tmp_path, capsys):
    file = peers_file(tmp_path, good=[], **{name: options for name, (options, _) in WRONGS.items()})
    assert bench("--peers", file, "--only", "full", "--patience", "1.5") == 0
    rows, printed = rows_of(tmp_path), capsys.readouterr().out
    for name, (_, reason) in WRONGS.items():
        row = cost(rows, name)
        assert row.value is None
        assert reason in row.error
        assert f"ERROR {name}: {row.error}" in printed
        assert not [other for other in rows if other.extra["subject"] == name and other is not row]
    assert "out of luck" in cost(rows, "dies").extra["log"]
    assert cost(rows, "good").value > 0
    page = (tmp_path / "bench.html").read_text()
    assert page.count('<span class="bad">ERROR</span>') == len(WRONGS)


def test_where_nobody_serves_the_command_fails_and_still_reports(bench, tmp_path):
    file = peers_file(tmp_path, bad=["--wrong", "does not start"])
    assert bench("--peers", file, "--only", "bad") == 1
    assert "does not start" not in (tmp_path / "bench.md").read_text().splitlines()[0]
    assert "ERROR bad" in (tmp_path / "bench.md").read_text()


def test_an_environment_that_is_not_installed_is_a_row(bench, tmp_path):
    path = tmp_path / "peers.toml"
    path.write_text('[[peer]]\nname = "a"\nenvironment = "ray"\ncommand = ["x.py"]\nkind = "other"\n')
    assert bench("--peers", str(path), "--only", "a") == 1
    (row,) = rows_of(tmp_path)
    assert row.error == "python of its environment ray is not there; install it: make bench-peers."


def test_pixels_changed_outside_the_mask_are_seen(bench, tmp_path):
    assert bench("--peers", peers_file(tmp_path, a=["--wrong", "outside"]), "--only", "a") == 0
    (row,) = (row for row in rows_of(tmp_path) if row.name == "identical outside the mask")
    assert row.value == 0


def test_curves_are_measured_at_shares_of_the_own_saturation(bench, tmp_path):
    file = peers_file(tmp_path, a=["--ms", "5"])
    assert bench("--peers", file, "--only", "a", "--curves", "0.5,0.9", "--curve-seconds", "0.5") == 0
    rows = rows_of(tmp_path)
    saturation = next(row.value for row in rows if row.name == "requests per second")
    points = [row for row in rows if row.name == "latency at load"]
    assert [row.extra["load"] for row in points] == [0.5, 0.9]
    assert [row.extra["rate"] for row in points] == [pytest.approx(saturation * load) for load in (0.5, 0.9)]
    assert 'class="curve' in (tmp_path / "bench.html").read_text()


@pytest.mark.parametrize("ats", [[1.0], [2.0] * 9 + [3.0]])
def test_a_trace_that_comes_all_at_once_has_no_curve(ats, bench, tmp_path, capsys):
    some = trace.read(tmp_path / "trace.jsonl")
    (first,) = [one for one in some.requests if isinstance(one.document, View)][:1]
    requests = tuple(replace(first, at=at) for at in ats)
    path = tmp_path / "once.jsonl"
    path.write_text("".join(trace.lines(replace(some, requests=requests))))
    assert bench("--trace", str(path), "--peers", peers_file(tmp_path, a=[]), "--only", "a", "--curves", "0.5") == 2
    assert "--curves needs a trace whose requests come one after the other" in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()


def test_the_rows_are_in_the_books_too(bench, tmp_path, capsys):
    books, file = str(tmp_path / "ledger.sqlite"), peers_file(tmp_path, a=[], b=["--wrong", "does not start"])
    assert bench("--peers", file, "--only", "a,b", "--ledger", books) == 0
    with Ledger(books) as ledger:
        assert ledger.records() == rows_of(tmp_path)
    capsys.readouterr()
    assert cli.main(["cost", "--ledger", books, "--take", str(tmp_path / "rows.jsonl")]) == 0
    assert "retouch: 0 of " in capsys.readouterr().err


def test_a_run_goes_on_where_it_ended(bench, tmp_path):
    file = peers_file(tmp_path, a=[], b=["--wrong", "does not start"])
    assert bench("--peers", file, "--only", "a,b,plain") == 0
    before = rows_of(tmp_path)
    peers_file(tmp_path, a=[], b=[])
    assert bench("--peers", file, "--only", f"a,b,plain,{LAST}", "--resume") == 0
    rows = rows_of(tmp_path)
    assert rows[: len(before)] == before
    assert {row.extra["run"] for row in rows} == {before[0].extra["run"]}
    added = [row.extra["subject"] for row in rows[len(before) :] if row.name == tally.COST]
    assert sorted(added) == [LAST, f"{LAST}, again", "b"]
    (found,) = standing.standings(tally.latest(rows))
    assert found.line("b").cost
    assert not found.line("b").error
    assert found.fall is not None


def test_what_was_answered_is_judged_too(bench, tmp_path):
    file = peers_file(tmp_path, a=[])
    assert bench("--peers", file, "--only", "a,plain", "--cases", "2", "--seeds", "1", quality=True) == 0
    assert bench("--peers", file, "--only", f"a,plain,{LAST}", "--cases", "2", "--seeds", "1", "--resume", quality=True) == 0
    rows = rows_of(tmp_path)
    assert sum(row.name == tally.COST and row.extra["subject"] == "plain" for row in rows) == 1
    gates = {row.extra["subject"]: row.extra["verdict"] for row in rows if row.name == "the gate"}
    assert gates == {"a": "undecided", LAST: "undecided"}  # two cases tell nothing
    assert "data:image/webp" in (tmp_path / "bench.html").read_text()


def test_a_run_goes_on_with_the_same_settings_only(bench, tmp_path, capsys):
    file = peers_file(tmp_path, a=[])
    assert bench("--peers", file, "--only", "a", "--resume") == 2
    assert bench("--peers", file, "--only", "a") == 0
    assert bench("--peers", file, "--only", "a", "--resume", "--clients", "3", "--price", "1") == 2
    assert "was with another retouch_clients, price_per_hour" in capsys.readouterr().err


def test_a_run_goes_on_with_the_same_cases_only(bench, tmp_path, capsys):
    file = peers_file(tmp_path, a=[])
    assert bench("--peers", file, "--only", "a", "--cases", "2", "--seeds", "1", quality=True) == 0
    assert bench("--peers", file, "--only", "a", "--cases", "3", "--seeds", "2", "--resume", quality=True) == 2
    assert "was with another cases, seeds; leave" in capsys.readouterr().err
    assert bench("--peers", file, "--only", "a", "--cases", "2", "--seeds", "1", "--resume", quality=True) == 0
    cases.write(tmp_path / "own", cases.load(count=2))
    own = ["--peers", file, "--only", "a", "--cases", "2", "--seeds", "1", "--edits", str(tmp_path / "own")]
    assert bench(*own, "--resume", quality=True) == 2
    assert "was with another edit_set; leave" in capsys.readouterr().err
    assert bench(*own, quality=True) == 0
    assert rows_of(tmp_path)[-1].extra["edit_set"].startswith("own ")
    assert bench(*own[:-1], str(tmp_path / "none"), quality=True) == 2
    assert "bench/edit_set.py makes" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["commit", "processor"])
def test_a_run_goes_on_on_the_same_code_and_machine_only(what, bench, tmp_path, capsys, monkeypatch):
    file = peers_file(tmp_path, a=[])
    assert bench("--peers", file, "--only", "a") == 0
    real = record.environment
    monkeypatch.setattr(record, "environment", lambda *some: {**real(*some), what: "another"})
    assert bench("--peers", file, "--only", "a", "--resume") == 2
    assert f"was with another {what}; leave" in capsys.readouterr().err


def test_where_the_plain_rung_does_not_answer_again_that_is_said(bench, tmp_path, capsys, monkeypatch):
    common = ["--peers", peers_file(tmp_path, a=[]), "--cases", "2", "--seeds", "1"]
    assert bench(*common, "--only", "plain", quality=True) == 0
    whole = ladder(Common("m", "float32", 1, 8))
    dead = [replace(one, command=(sys.executable, "-c", "raise SystemExit('no device left')")) for one in whole[:1]]
    monkeypatch.setattr(bench_command, "rungs", lambda common: [*dead, *whole[1:]])
    capsys.readouterr()
    assert bench(*common, "--only", f"plain,a,{LAST}", "--resume", quality=True) == 0
    rows, printed = rows_of(tmp_path), capsys.readouterr().out
    (row,) = (row for row in rows if row.name == tally.ASKED_AGAIN)
    assert row.extra["subject"] == "plain"
    assert "no device left" in row.error
    assert "ERROR Retouch plain, asked again, so that who came later was not judged: it ended with exit code 1" in printed
    assert "asked again" in (tmp_path / "bench.html").read_text()
    (found,) = standing.standings(tally.latest(rows))
    assert found.line("plain").cost > found.line(LAST).cost  # its figures stay
    assert found.ours.name == "plain"


def test_another_run_stands_for_itself(bench, tmp_path):
    file = peers_file(tmp_path, a=[], b=[])
    assert bench("--peers", file, "--only", "a") == 0
    time.sleep(1.1)  # runs are told apart by the second
    assert bench("--peers", file, "--only", "b") == 0
    (found,) = standing.standings(tally.latest(rows_of(tmp_path)))
    assert [line.name for line in found.lines] == ["b"]


def test_ctrl_c_ends_the_subjects_and_keeps_the_rows(tmp_path):
    trace = tmp_path / "trace.jsonl"
    assert cli.main(["trace", "make", "--requests", "4", "--side", "64", "--out", str(trace)]) == 0
    file = peers_file(tmp_path, a=[], slow=["--ms", "60000"])
    command = [
        sys.executable, "-m", "retouch.cli", "bench", "--trace", str(trace), "--model", str(tmp_path), "--price", "1",
        "--dtype", "float32", "--peers", file, "--only", "full", "--no-quality", "--out", str(tmp_path / "rows.jsonl"),
        "--report", str(tmp_path / "r.html"),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        children = wait_for(lambda: started(process.pid, "60000"))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "stopped; the rows so far are in" in err
    assert cost(rows_of(tmp_path), "a").value > 0
    assert "report in" in out
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def started(pid, argument):
    """Children of a process that were given the argument."""
    found = []
    with suppress(OSError):  # a child, or the process, may end while it is looked at
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if argument in Path(f"/proc/{child}/cmdline").read_text().split("\0"):
                found.append(child)
    return found


def wait_for(found, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := found():
            return result
        time.sleep(0.05)
    raise AssertionError("it did not come")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--requests", "1"], "--requests is 1; give at least 2"),
        (["--clients", "0"], "--clients is 0"),
        (["--curves", "0.5,1.5"], "--curves are shares"),
        (["--timeout", "0"], "--timeout is 0"),
        (["--report", "x.pdf"], "ends with .html"),
        (["--only", "nobody"], "fits nobody"),
        (["--price", "0"], "--price is 0"),
        (["--trace", "missing.jsonl"], "missing.jsonl cannot be read"),
        (["--peers", "missing.toml"], "missing.toml cannot be read"),
    ],
)
def test_options_are_refused_before_anything_runs(options, says, bench, capsys, tmp_path):
    assert bench(*options) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.default_int_handler])
def test_it_can_be_ended_from_the_background(before):
    """A shell has what it starts in the background ignore Ctrl-C, which SIGTERM is handled as."""
    usual = signal.signal(signal.SIGINT, before)
    try:
        with pytest.raises(KeyboardInterrupt), bench_command._terminable():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, usual)
