"""The bench on tiny random weights: its rows are whole, and its ceilings count the products that really run."""

from __future__ import annotations

import io
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import ceiling
import edit_latency
import refresh
import report
import serve_load
import variants
from pipelines import Peer
from retouch import record
from retouch.edit import Edit, Usage
from retouch.engine import Engine
from retouch.measure.load import Answer
from shapes import build
from timing import Clock

SETTINGS = variants.Settings(side=128, rounds=1, steps=2, compiled=False, shares=(0.11, 1.0), batches=(1, 8))
CPU = torch.device("cpu")
WHERE = record.environment("", "float32", 1)


@pytest.fixture(scope="module")
def model():
    return build("tiny", CPU, torch.float32)


def test_every_row_has_a_ceiling_and_a_positive_number(model, tmp_path):
    console = Console(file=io.StringIO(), width=160)
    rows = edit_latency.bench(model, SETTINGS, "tiny", "random", console)
    record.append(tmp_path / "rows.jsonl", rows)
    assert record.read(tmp_path / "rows.jsonl") == rows
    assert {row.extra.get("variant") for row in rows[1:]} == {
        "KV eager", "KV crop eager", "plain eager", "Retouch cold", "Retouch warm", "Retouch warm x8",
    }  # fmt: skip
    for row in rows:
        assert not row.error
        assert row.value is not None
        assert row.value > 0
        assert row.ceiling is not None
        assert row.ceiling > 0 or (row.name == "encode" and row.extra["variant"].startswith("Retouch warm"))
    at = {(row.extra.get("variant"), row.extra.get("mask"), row.name): row for row in rows}
    warm, cold = at["Retouch warm", 0.11, "denoise"], at["Retouch cold", 0.11, "encode"]
    assert warm.extra["tokens"] < 64
    assert warm.ceiling < at["KV eager", None, "denoise"].ceiling < at["plain eager", None, "denoise"].ceiling
    assert cold.ceiling > 0
    printed = console.file.getvalue()
    assert "denoise vs plain eager" in printed
    assert "packed 8 vs 1" in printed


def test_of_ordinary_traffic_the_calm_tenants_answers_alone_count(monkeypatch):
    asked = []

    def answers(address, edits, rate, seed=0, flood=()):
        """The calm tenant's in a second, and twice that in a flood; the other's in nine. As they come: not in their order."""
        asked.append((seed, bool(flood)))
        seconds = [9.0 if edit.tenant == "flood" else 2.0 if flood else 1.0 + seed for edit in edits]
        return [Answer(at, 0.0, 0.0, seconds[at], 1, None) for at in reversed(range(len(edits)))]

    monkeypatch.setattr(serve_load, "server", lambda *options: nullcontext("nowhere"))
    monkeypatch.setattr(serve_load, "one_by_one", lambda address, edits: [])
    monkeypatch.setattr(serve_load, "closed", lambda address, edits, clients: (answers(address, edits, 1.0), 1.0))
    monkeypatch.setattr(serve_load, "open_loop", answers)
    bench = serve_load.Bench(serve_load.Sizes(4, 3, 8, 8, 4), Console(file=io.StringIO()))
    bench.edits = variants.Edits(SETTINGS)
    serve_load.flood(bench)
    found = {name: (spread.median, spread.n) for name, spread, *_ in bench.found}
    assert found["calm tenant beside ordinary traffic, p95"] == (2.0, 3)  # of 1, 2 and 3 s
    assert found["calm tenant beside a flood, p95"] == (2.0, 3)
    assert found["flood over ordinary traffic"] == (1.0, 3)  # of 2 / 1, 2 / 2 and 2 / 3
    assert asked[1:] == [(turn, last) for turn in range(3) for last in (False, False, True)]


def test_what_partial_steps_lose_is_paired(monkeypatch):
    """Answers lie so many levels off the truth: as many in the median, but not edit by edit."""
    truth = np.zeros((32, 32, 3), np.uint8)
    edits = [Edit(truth, str(turn), np.ones((32, 32), bool)) for turn in range(3)]
    off = {refresh.FULL: (10, 20, 40), "1,2": (20, 40, 10)}
    monkeypatch.setattr(refresh, "Engine", lambda model: model)
    monkeypatch.setattr(
        refresh, "run", lambda plan, edit, clock: (truth + np.uint8(off[plan][int(edit.prompt)]), 1.0, Usage(tokens_whole=1))
    )
    found = refresh.measured({plan: plan for plan in off}, [refresh.Asked("w", edit, truth) for edit in edits], 2, None)
    rows = {(row.extra["plan"], row.name): row for row in refresh.rows_of(found, 2, "m", WHERE)}
    row, full = rows["1,2", "truth_loss"], rows[refresh.FULL, "truth_loss"]
    assert rows["1,2", "psnr_truth"].value == rows[refresh.FULL, "psnr_truth"].value
    assert row.value == pytest.approx(-20 * np.log10(2))  # of -6, -6 and +12 dB
    assert row.low < row.value + 1e-9 < row.high
    assert (row.n, row.unit) == (3, "dB")
    assert (full.value, full.low, full.high) == (0, 0, 0)


def test_a_variant_that_fails_is_an_error_row():
    def fail(turn):
        raise RuntimeError("no compiler\nhere")

    made = [variants.Variant("KV compiled", None, fail)]
    with Progress(console=Console(file=io.StringIO())) as show:
        rate = edit_latency.measure(made, SETTINGS, lambda: 1e9, show)
    row = report.rows_of(made, rate, SETTINGS, record.environment(), {})[1]
    assert row.error == "RuntimeError: no compiler here"
    assert row.value is None
    assert "ERROR" in _text(report.table_of(made, rate, record.environment(), "t"))


def _text(table):
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize("kind", ["KV", "plain"])
def test_flops_of_the_pipelines_are_those_that_run(model, kind):
    peer = Peer(model, kind, compiled=False, clock=Clock(CPU), steps=3)
    edit = variants.Edits(SETTINGS).of(1, 0.11, 1)[0]
    sample = peer.run(edit)
    assert ceiling.counted(lambda: peer.run(edit)) == pytest.approx(sample.flops["edit"], rel=0.02)


@pytest.mark.parametrize(("count", "warm"), [(1, False), (1, True), (3, True)])
def test_flops_of_retouch_are_those_that_run(model, count, warm):
    edits = variants.Edits(SETTINGS).of(1, 0.11, count)
    engine = Engine(model)
    if warm:
        for edit in edits:
            engine.admit(edit)
    sample = variants.serve(engine, edits, Clock(CPU), warm)
    total = ceiling.counted(lambda: variants.serve(engine if warm else Engine(model), edits, Clock(CPU), warm))
    assert total == pytest.approx(sample.flops["edit"], rel=0.02)
    assert sample.flops["encode"] == 0 if warm else sample.flops["encode"] > 0


def test_one_transformer_step_counts_its_linears_and_its_attention(model):
    engine = Engine(model)
    jobs = [engine.admit(edit) for edit in variants.Edits(SETTINGS).of(1, 0.11, 2)]
    expected = ceiling.packed_step(model.transformer.config, jobs)
    assert ceiling.counted(lambda: engine.step(jobs)) == pytest.approx(expected, rel=0.02)
    frame = model.frame(jobs[0].edit)
    encoded = ceiling.counted(lambda: model.encode_document(frame))
    of_vae = ceiling.encoder(model.vae, 128, 128)
    assert encoded - of_vae == pytest.approx(ceiling.document(model.transformer.config, 64), rel=0.02)


@pytest.mark.parametrize("share", variants.SHARES)
def test_masks_have_their_share_and_lie_on_cells(share):
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = variants.box_mask(512, share, rng)
        assert mask.mean() == pytest.approx(share, rel=0.06)
        cells = mask.reshape(32, 16, 32, 16)
        assert (cells.any((1, 3)) == cells.all((1, 3))).all()


def test_klein_shape_without_a_gpu_is_refused(capsys, tmp_path):
    assert edit_latency.main(["--shape", "klein-4b", "--device", "cpu", "--out", str(tmp_path / "rows.jsonl")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()
