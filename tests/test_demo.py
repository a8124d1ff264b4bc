"""The demo on tiny random weights: the session, the sheet, the rows, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import retouch
import tiny
from retouch import cli, config, demo
from retouch.demo import session, sheet
from retouch.edit import CheckpointMismatch, Edit, InvalidMask
from retouch.models import peer
from retouch.train.concepts import COLOURABLE, HUES, SEEN


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.pipeline("Flux2KleinKVPipeline").save_pretrained(folder)
    settings = {"out_layers": tiny.LAYERS, "pad_prompts": False, "max_side": 512, "max_sequence_length": 64, "masked": True}
    (folder / "retouch.json").write_text(json.dumps(settings))
    return folder


def test_the_peers_threads_wait_as_the_servers_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch is loaded with: beside a busy process the peers would take many times as long for nothing of theirs."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    seen = []

    def loads(*_: object, **__: object) -> None:
        seen.append(os.environ.get("GOMP_SPINCOUNT"))
        raise CheckpointMismatch("enough")

    monkeypatch.setattr(retouch, "load", loads)
    assert cli.main(["demo", "--exit", "--out", str(tmp_path / "demo.png")]) == 2
    assert seen == [config.SPINS]
    assert "GOMP_SPINCOUNT" not in os.environ


def test_two_edits_of_the_session(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "demo.png"
    argv = [
        "demo",
        "--model",
        checkpoint,
        "--edits",
        2,
        "--side",
        128,
        "--dtype",
        "float32",
        "--steps",
        2,
        "--port",
        0,
        "--exit",
        "--out",
        out,
    ]
    assert cli.main([str(a) for a in argv]) == 0

    rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["edit"] for row in rows] == [1, 2]
    assert [row["seed"] for row in rows] == [1, 2]
    assert [row["document_cached"] for row in rows] == [False, True]
    for row in rows:
        fastest = min(row["seconds_inpaint"], row["seconds_kv"])
        assert row["speedup"] == pytest.approx(fastest / row["seconds"])
        assert sum(row[f"seconds_{stage}"] for stage in demo.STAGES) <= row["seconds"]
        assert 0 < row["tokens_computed"] < row["tokens_whole"] == 2 * 8 * 5
        assert row["steps"] == 2
        assert row["outside_identical"]

    with Image.open(out) as image:
        image.verify()
    with Image.open(out) as image:
        assert image.format == "PNG"
        tile = sheet.TILE * 80 // 128
        between = sheet.CAPTION + sheet.ROW_GAP
        assert image.size == (sheet.WIDTH, sheet.HEADER + 2 * (tile + between) - sheet.ROW_GAP + sheet.MARGIN)
    text = capsys.readouterr().out
    assert "a car" in text
    assert "times as fast" in text
    assert sorted(path.name for path in out.parent.iterdir()) == ["demo.jsonl", "demo.png"]


def test_a_commit_is_the_next_document_and_nothing_outside_changes(checkpoint: Path) -> None:
    turns = [session.Turn("insert", "china", "a red balloon", session.SKY, ellipse=True, commit=True)]
    turns += [session.Turn("remove", "china", text, session.SKY, ellipse=True) for text in ("remove it", "a cloud")]
    engine = retouch.load(str(checkpoint), dtype="float32")
    plain = peer.load(str(checkpoint), engine.model)
    edits = [(turn, session.edit_of(turn, demo.PHOTOS, 128, 1)) for turn in turns]
    heard: list[str] = []
    first, second, third = session.run(engine, plain, edits, heard.append)
    assert len(heard) == 3 * 4
    assert [r.source for r in (first, second, third)] == [0, 1, 1]
    assert [r.cached for r in (first, second, third)] == [False, False, True]
    assert (second.edit.image == first.edited.image).all()
    assert (third.edit.image == second.edit.image).all()
    for result in (first, second, third):
        for image in result.images.values():
            assert (image[~result.mask] == result.edit.image[~result.mask]).all()
            assert (image[result.mask] != result.edit.image[result.mask]).any()
    assert first.agreement("KV", "KV") == 99


def test_the_peer_is_the_stock_pipelines_whatever_ran_before(checkpoint: Path) -> None:
    engine = retouch.load(str(checkpoint), dtype="float32")
    plain = peer.load(str(checkpoint), engine.model)
    mask = np.zeros((64, 96), bool)
    mask[16:48, 32:64] = True
    edit = Edit(tiny.photo(64, 96), "a red apple", mask, seed=4, steps=2)
    common = {
        "prompt": edit.prompt, "num_inference_steps": 2, "text_encoder_out_layers": tiny.LAYERS,
        "max_sequence_length": plain.model.count_tokens(edit.prompt), "image": Image.fromarray(edit.image),
    }  # fmt: skip
    for _ in range(2):
        pipe = tiny.pipeline("Flux2KleinKVPipeline")
        stock = pipe(**common, generator=torch.Generator().manual_seed(4)).images[0]
        assert np.abs(plain.kv(edit).astype(int) - np.asarray(stock)).max() <= 1
        pipe = tiny.pipeline("Flux2KleinInpaintPipeline")
        white = {"mask_image": Image.fromarray(mask.astype(np.uint8) * 255), "strength": 1.0, "guidance_scale": 1.0}
        stock = pipe(**common, **white, generator=torch.Generator().manual_seed(4)).images[0]
        assert np.abs(plain.inpaint(edit).astype(int) - np.asarray(stock)).max() <= 1
    with pytest.raises(InvalidMask, match="needs a mask"):
        plain.inpaint(Edit(edit.image, "a red apple"))


def test_the_session_asks_for_what_the_model_was_trained_on() -> None:
    kinds = [turn.kind for turn in session.SESSION]
    assert len(kinds) == 12
    assert set(kinds) == {"insert", "remove", "replace", "recolour"}
    words = {"a", "make", "the", "replace", "with", "remove", "it", "it."}
    for turn in session.SESSION:
        rest = " ".join(word for word in turn.prompt.split() if word not in words and word not in HUES)
        assert all(word in SEEN for word in rest.split()), turn.prompt
        if any(hue in turn.prompt.split() for hue in HUES):
            assert any(concept in turn.prompt for concept in COLOURABLE)
        edit = session.edit_of(turn, demo.PHOTOS, 384, None)
        assert edit.mask is not None
        assert 0.03 <= edit.mask.mean() <= 0.15
        assert max(edit.image.shape) == 384
        assert all(side % session.CELL == 0 for side in edit.image.shape[:2])


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--edits", "0"], "--edits is 0"),
        (["--edits", "99"], "1 to 12"),
        (["--side", "8"], "--side is 8"),
        (["--steps", "0"], "steps is 0"),
        (["--photos", "nowhere"], "--photos DIR"),
        (["--out", "demo.gif"], "no known picture suffix"),
        (["--model", "nonesuch"], "nonesuch"),
        (["--model", "TINY", "--dtype", "float8"], "float8"),
    ],
)
def test_refusals_are_one_line(
    argv: list[str],
    text: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", *(str(checkpoint) if a == "TINY" else a for a in argv)]) == 2
    error = capsys.readouterr().err
    assert text in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*.*"))


def test_only_klein_kv_checkpoints_are_compared() -> None:
    with pytest.raises(CheckpointMismatch, match="no distilled FLUX"):
        peer.load("klein", tiny.model("Flux2KleinPipeline"))
