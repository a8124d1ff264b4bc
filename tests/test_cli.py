"""`retouch edit` in this process with an engine that paints, and the real command for what never reaches a model."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import retouch
from retouch import cli, picture
from retouch.edit import Edited, OutputFailed, UnknownCheckpoint, Usage


class PaintingEngine:
    """Paints the mask with the seed's colour, and remembers what it was asked."""

    def __init__(self):
        self.edits = []

    def close(self):
        pass

    def edit(self, edits, progress=None):
        self.edits += edits
        answers = []
        for i, one in enumerate(edits):
            image = one.image.copy()
            image[..., :3][... if one.mask is None else one.mask] = one.seed % 256
            usage = Usage({"document": 0.5, "step": 0.25}, tokens_computed=10, tokens_whole=100, steps=4)
            answers.append(Edited(image, one.seed, usage))
            if progress is not None:
                progress(i + 1, len(edits))
        return answers


@pytest.fixture
def engine(monkeypatch):
    """In place of retouch.load, without touching the lazy attribute (which would import torch)."""
    engine = PaintingEngine()
    engine.loaded = []
    monkeypatch.setitem(
        retouch.__dict__, "load", lambda model, dtype, cache: engine.loaded.append((model, dtype, cache)) or engine
    )
    return engine


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    picture.write(path, np.full((40, 60, 3), 9, np.uint8))
    return path


def run(*argv):
    return cli.main(["edit", *map(str, argv)])


def refused(capsys, *argv):
    """Runs, expects a refusal, returns its one line."""
    assert run(*argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("retouch: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_one_edit_writes_one_file(engine, photo, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert run(photo, "--box", "10,20,5,6", "-p", "a red apple", "--seed", 7, "--steps", 4, "-o", out) == 0
    pixels = picture.read(out).pixels
    assert (pixels[20:26, 10:15] == 7).all()
    assert (pixels == 7).sum() == 5 * 6 * 3
    assert engine.loaded == [("retouch-mini", "auto", None)]
    assert engine.edits[0].steps == 4
    text = capsys.readouterr().out
    assert "10 of 100 (10%)" in text
    assert "0.250 s" in text
    assert "out.png" in text


def test_variations_count_the_seed_up(engine, photo, tmp_path):
    assert run(photo, "-p", "x", "-n", 3, "--seed", 7, "-o", tmp_path / "out.webp") == 0
    for i, seed in enumerate((7, 8, 9), 1):
        assert (picture.read(tmp_path / f"out-{i}.webp").pixels == seed).all()
    assert not (tmp_path / "out.webp").exists()


def test_masks_and_boxes_are_united_and_references_passed(engine, photo, tmp_path):
    mask = np.zeros((40, 60), np.uint8)
    mask[0, 0] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.new("RGB", (8, 9)).save(tmp_path / "other.png")
    argv = [photo, "-p", "x", "--mask", tmp_path / "mask.png", "--box", "1,0,1,1", "--box", "59,39,1,1"]
    assert run(*argv, "--reference", tmp_path / "other.png", "--guidance", 2, "-o", tmp_path / "out.png") == 0
    assert np.argwhere(engine.edits[0].mask).tolist() == [[0, 0], [0, 1], [39, 59]]
    assert engine.edits[0].references[0].shape == (9, 8, 3)
    assert engine.edits[0].guidance == 2


def test_exif_is_turned_once(engine, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "photo.png", exif=exif.tobytes())
    assert run(tmp_path / "photo.png", "-p", "x", "--box", "0,0,40,60", "-o", tmp_path / "out.png") == 0
    assert picture.read(tmp_path / "out.png").size == (40, 60)


def test_bad_input_never_loads_a_model(engine, photo, tmp_path, capsys):
    out = tmp_path / "out.png"
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:60])
    Image.new("L", (60, 40)).save(tmp_path / "empty.png")
    Image.new("L", (61, 40)).save(tmp_path / "wide.png")
    Image.new("RGBA", (4, 4)).save(tmp_path / "clear.png")
    before = sorted(tmp_path.iterdir())
    ask = ("-p", "x", "-o", out)
    assert "no file" in refused(capsys, tmp_path / "none.png", *ask)
    assert "folder" in refused(capsys, tmp_path, *ask)
    assert "not a picture" in refused(capsys, tmp_path / "text.png", *ask)
    assert "cut off" in refused(capsys, tmp_path / "cut.png", *ask)
    assert "61 x 40" in refused(capsys, photo, "--mask", tmp_path / "wide.png", *ask)
    assert "empty" in refused(capsys, photo, "--mask", tmp_path / "empty.png", *ask)
    assert "none.png" in refused(capsys, photo, "--mask", tmp_path / "none.png", *ask)
    assert "no alpha" in refused(capsys, photo, "--mask", tmp_path / "empty.png", "--mask-mode", "alpha", *ask)
    assert "no area" in refused(capsys, photo, "--box", "0,0,0,0", *ask)
    assert "60 x 40" in refused(capsys, photo, "--box", "50,0,20,10", *ask)
    assert "x,y,width,height" in refused(capsys, photo, "--box", "1,2,3", *ask)
    assert "x,y,width,height" in refused(capsys, photo, "--box", "1,2,3,four", *ask)
    assert "steps is 0" in refused(capsys, photo, "--steps", 0, *ask)
    assert "steps is 1000" in refused(capsys, photo, "--steps", 1000, *ask)
    assert "guidance" in refused(capsys, photo, "--guidance", "nan", *ask)
    assert "seed" in refused(capsys, photo, "--seed", -1, *ask)
    assert "-n is 0" in refused(capsys, photo, "-n", 0, *ask)
    assert "prompt is empty" in refused(capsys, photo, "-p", "", "-o", out)
    assert "prompt is empty" in refused(capsys, photo, "-p", " \n", "-o", out)
    assert "100,000 characters" in refused(capsys, photo, "-p", "x" * 100_000, "-o", out)
    assert "none.png" in refused(capsys, photo, "--reference", tmp_path / "none.png", *ask)
    assert "no known picture suffix" in refused(capsys, photo, "-p", "x", "-o", tmp_path / "out.gif")
    assert "no folder" in refused(capsys, photo, "-p", "x", "-o", tmp_path / "none" / "out.png")
    assert "transparency" in refused(capsys, tmp_path / "clear.png", "-p", "x", "-o", tmp_path / "out.jpg")
    assert "--stpes" in refused(capsys, photo, "--stpes", 4, *ask)
    assert engine.loaded == []
    assert sorted(tmp_path.iterdir()) == before


def test_unknown_checkpoint_is_one_line(photo, tmp_path, monkeypatch, capsys):
    def load(model, dtype, cache):
        raise UnknownCheckpoint(f"there is no checkpoint\nnamed {model}.")

    monkeypatch.setitem(retouch.__dict__, "load", load)
    assert "named nonesuch" in refused(capsys, photo, "-p", "x", "--model", "nonesuch", "-o", tmp_path / "out.png")


LONG = "x" * 300


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-o", f"{LONG}.png"), "too long"),
        (("-o", f"{LONG}/out.png"), "too long"),
        (("-o", ".", "-n", 3), "no file name"),
        (("--model", LONG), "no checkpoint can be looked for"),
        (("--model", f"/{LONG}/{LONG}"), "no checkpoint can be looked for"),
        (("--model", "~nosuchuser/x"), "home directory"),
        (("--model", "retouch-mini", "--base", LONG), "--base goes with a single file"),
        (("--adapters", LONG), "is no folder"),
        (("--cache", LONG), "too long"),
        (("--cache", "photo.png"), "is a file"),
        (("--cache", "photo.png/cache"), "Not a directory"),
        (("--mask", LONG), "too long"),
    ],
)
def test_a_path_that_cannot_be_is_one_line(photo, tmp_path, monkeypatch, capsys, options, said):
    """With the real `retouch.load`, which gets as far as the path."""
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, photo, "-p", "x", *(() if "-o" in options else ("-o", "out.png")), *options)
    assert list(tmp_path.iterdir()) == [photo]


@pytest.mark.parametrize("command", [["filter", LONG], ["filter", f"{LONG}.toml"], ["filter", "~nosuchuser/x.toml"]])
def test_a_filter_that_cannot_be_is_one_line(photo, tmp_path, capsys, command):
    assert cli.main([*command, str(photo), "-o", str(tmp_path / "out.png")]) == 2
    assert capsys.readouterr().err.startswith("retouch: there is no filter")


def test_a_named_path_that_nothing_checked_is_one_line_too(engine, photo, tmp_path, monkeypatch, capsys):
    def fails(error):
        def edit(edits, progress):
            raise error

        return edit

    argv = (photo, "-p", "x", "-o", tmp_path / "out.png")
    monkeypatch.setattr(engine, "edit", fails(PermissionError(13, "Permission denied", "/a/b.safetensors")))
    assert "/a/b.safetensors cannot be used (Permission denied)" in refused(capsys, *argv)
    monkeypatch.setattr(engine, "edit", fails(OSError(12, "Cannot allocate memory")))
    with pytest.raises(OSError, match="Cannot allocate"):  # of no path: a fault, not a refusal
        run(*argv)


def test_the_device_is_passed_on_where_it_is_given(photo, tmp_path, monkeypatch):
    seen, engine = [], PaintingEngine()
    monkeypatch.setitem(retouch.__dict__, "load", lambda model, **options: seen.append(options) or engine)
    assert run(photo, "-p", "x", "-o", tmp_path / "out.png", "--device", "cuda:1") == 0
    assert run(photo, "-p", "x", "-o", tmp_path / "out.png") == 0
    assert [options.get("device") for options in seen] == ["cuda:1", None]


def test_a_failed_second_write_removes_the_first(engine, photo, tmp_path, monkeypatch, capsys):
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    assert "No space left" in refused(capsys, photo, "-p", "x", "-n", 3, "-o", tmp_path / "out.png")
    assert sorted(tmp_path.iterdir()) == [photo]


def test_interrupt_is_130(engine, photo, tmp_path, monkeypatch, capsys):
    def stop(edits, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "edit", stop)
    assert run(photo, "-p", "x", "-o", tmp_path / "out.png") == 130
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [photo]


def test_demo_and_train_read_their_own_options(monkeypatch):
    seen = []

    def command(argv):
        seen.append(argv)
        if "--fail" in argv:
            raise OutputFailed("no space")

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: argparse.Namespace(main=command))
    assert cli.main(["demo", "-v", "--out", "x"]) == 0
    assert cli.main(["train", "mini", "--help"]) == 0
    assert cli.main(["demo", "--fail"]) == 2
    assert cli.main(["train", "giant"]) == 2
    assert cli.main(["train"]) == 2
    assert seen == [["-v", "--out", "x"], ["--help"], ["--fail"]]


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["--help"], 0, "edit"),
        (["edit", "--help"], 0, "--mask-mode"),
        ([], 2, "command"),
        (["paint"], 2, "invalid choice"),
        (["edit", "none.png", "-p", "x", "-o", "out.png"], 2, "retouch: there is no file none.png"),
    ],
)
def test_the_command(argv, code, text, tmp_path):
    command = Path(sys.executable).with_name("retouch")
    assert command.exists(), "install the package first: make install-dev"
    done = subprocess.run([command, *argv], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert text in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
