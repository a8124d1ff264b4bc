"""The bench that holds `retouch load` against another's client: a stand-in of that client, a server that paints."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import foreign_client
from foreign_client import QUICK, Failed, figures_of
from serving import Painter, Serving

STAND_IN = """#!{python}
import httpx, json, sys, pathlib
if sys.argv[1] == "--version":
    sys.exit(print("0.0 stand-in"))
said = dict(zip(sys.argv[2:-2:2], sys.argv[3:-2:2]))
rows = [json.loads(line) for line in open(said["--input-file"])]
assert all(pathlib.Path(row["image"]).read_bytes().startswith(b"\\x89PNG") and row["text"] for row in rows)
assert json.loads(said["--extra-inputs"]) == {{"seed": 7, "use_cache": False}}
out = pathlib.Path(said["--artifact-dir"])
files = {{"image": pathlib.Path(rows[0]["image"]).read_bytes()}}
form = {{"prompt": "x", "use_cache": "false"}}
assert httpx.post(said["--url"] + "/v1/images/edits", data=form, files=files).status_code == 200
out.mkdir()
count = int(said["--request-count"]) - {missing}
told = {{"request_count": {{"avg": count}}, "request_latency": {{"p50": 2.0, "avg": 3.0}}, "error_summary": []}}
told["request_throughput"] = {{"avg": 50.0}}
(out / "profile_export_aiperf.json").write_text(json.dumps(told))
"""


def told(**more: Any) -> dict[str, Any]:
    usual = {"request_count": {"avg": 8.0}, "request_latency": {"p50": 250.0, "avg": 300.0}, "request_throughput": {"avg": 3.5}}
    return {**usual, "error_summary": [], **more}


def test_its_figures_are_read_in_our_units() -> None:
    assert figures_of(told(), 8) == {"latency p50": 0.25, "latency mean": 0.3, "requests per second": 3.5}
    for wrong in ({"request_count": {"avg": 7.0}}, {"error_summary": [{"code": 500}]}):
        with pytest.raises(Failed):
            figures_of(told(**wrong), 8)


@pytest.mark.parametrize("missing", [0, 1])
def test_both_clients_are_measured_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: int) -> None:
    command, out = tmp_path / "aiperf", tmp_path / "rows.jsonl"
    command.write_text(STAND_IN.format(python=sys.executable, missing=missing))
    command.chmod(0o755)
    worker = Painter(seconds=0.01)

    @contextmanager
    def served(*_: str) -> Any:
        with Serving(worker=worker) as server:
            yield server.url

    monkeypatch.setattr(foreign_client, "server", served)
    assert foreign_client.main(["--aiperf", str(command), "--quick", "--out", str(out)]) == missing
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["suite"] == "foreign_client" and row["client"] == "aiperf 0.0 stand-in" for row in rows)
    if missing:
        assert "7 of 8 requests" in rows[0]["error"]
        return
    found = {row["name"]: row["value"] for row in rows}
    assert len(found) == 15
    assert 0.5 < found["retouch load, latency mean over the server's"] < 50
    assert found["aiperf, latency p50"] == 0.002
    for name, theirs in (("latency p50", 0.002), ("requests per second", 50.0)):
        assert found[f"retouch load over aiperf, {name}"] == pytest.approx(found[f"retouch load, {name}"] / theirs)
    assert len(worker.asked) == QUICK.requests + QUICK.pictures + 1
    assert {one.edit.reuse for one in worker.asked} == {False}
    assert {one.edit.mask is None for one in worker.asked} == {True}


def test_without_the_other_client_it_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        foreign_client.main(["--aiperf", "no-such-command"])
    assert "install aiperf" in capsys.readouterr().err
