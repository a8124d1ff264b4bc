"""The bench on tiny random weights: its rows are whole, and its ceilings count the products that really run."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import ceiling
import edit_latency
import report
import variants
from pipelines import Peer
from retouch import record
from retouch.engine import Engine
from shapes import build
from timing import Clock

SETTINGS = variants.Settings(side=128, rounds=1, steps=2, compiled=False, shares=(0.11, 1.0), batches=(1, 8))
CPU = torch.device("cpu")


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
