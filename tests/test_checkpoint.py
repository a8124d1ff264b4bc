"""Every way a checkpoint can be wrong is a typed error that says how to mend it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import retouch
import tiny
from hubs import Hub
from retouch.edit import CheckpointMismatch, Edit, InvalidOption, UnknownCheckpoint
from retouch.models import checkpoint, dtype

SETTINGS = {"steps": 2, "out_layers": list(tiny.LAYERS), "max_sequence_length": 32, "pad_prompts": False, "max_side": 64}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny.pipeline("Flux2KleinKVPipeline").save_pretrained(folder)
    (folder / "retouch.json").write_text(json.dumps(SETTINGS))
    return folder


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "broken"))


def test_a_saved_checkpoint_loads_and_edits_as_the_live_one(saved: Path) -> None:
    engine = retouch.load(str(saved), dtype="float32", device="cpu")
    live = tiny.model("Flux2KleinKVPipeline", SETTINGS | {"out_layers": tiny.LAYERS}, engine.model.options)
    edit = Edit(tiny.photo(64, 64), "a cat", seed=3)
    assert np.array_equal(engine.edit([edit])[0].image, type(engine)(live).edit([edit])[0].image)


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/folder", "./nothing"])
def test_an_unknown_name_is_refused_with_what_is_there(name: str) -> None:
    with pytest.raises(UnknownCheckpoint, match="bundled are"):
        retouch.load(name)


def test_a_hub_name_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UnknownCheckpoint, match="hub"):
        retouch.load("nobody/nothing-at-all")


def test_a_hub_name_comes_with_its_own_settings(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(saved, tmp_path / "hub", monkeypatch)
    found = checkpoint.find("somebody/tiny")
    assert checkpoint.family_of(found)[1] == checkpoint.family_of(saved)[1]
    assert hub.asked == ["pipeline", "retouch.json"]


@pytest.mark.parametrize("lacking", [EntryNotFoundError, LocalEntryNotFoundError])
def test_a_hub_name_without_settings_is_taken(
    lacking: type[Exception], broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local: there is no network, and there was none of it when there was."""
    (broken / "retouch.json").unlink()
    Hub(broken, tmp_path / "hub", monkeypatch, lacking)
    assert checkpoint.family_of(checkpoint.find("somebody/tiny"))[1] == checkpoint.FAMILIES["Flux2KleinKVPipeline"]


def test_a_folder_without_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match=r"model_index\.json"):
        retouch.load(str(tmp_path))


def test_another_architecture_is_refused(broken: Path) -> None:
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(CheckpointMismatch, match="served are"):
        retouch.load(str(broken))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_refused(broken: Path, part: str) -> None:
    shutil.rmtree(broken / part)
    with pytest.raises(CheckpointMismatch, match=part):
        retouch.load(str(broken), dtype="float32")


def test_missing_weight_files_are_refused(broken: Path) -> None:
    for file in (broken / "transformer").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointMismatch, match="safetensors"):
        retouch.load(str(broken), dtype="float32")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_missing_weight_is_refused(broken: Path, part: str) -> None:
    file = next((broken / part).glob("*.safetensors"))
    weights = load_file(file)
    name = next(k for k, v in weights.items() if v.ndim >= 2)
    save_file({k: v for k, v in weights.items() if k != name}, file, {"format": "pt"})
    with pytest.raises(CheckpointMismatch):
        retouch.load(str(broken), dtype="float32")


def test_a_truncated_weight_file_is_refused(broken: Path) -> None:
    file = next((broken / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointMismatch):
        retouch.load(str(broken), dtype="float32")


def test_weights_of_another_shape_are_refused(broken: Path) -> None:
    config = broken / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 4}))
    with pytest.raises(CheckpointMismatch):
        retouch.load(str(broken), dtype="float32")


def test_an_unknown_setting_is_refused(broken: Path) -> None:
    (broken / "retouch.json").write_text(json.dumps(SETTINGS | {"speed": "fast"}))
    with pytest.raises(CheckpointMismatch, match="speed"):
        retouch.load(str(broken), dtype="float32")


def test_an_absent_device_and_an_unknown_dtype_are_refused(saved: Path) -> None:
    with pytest.raises(InvalidOption, match="device"):
        retouch.load(str(saved), device="cuda:99")
    with pytest.raises(InvalidOption, match="dtype"):
        retouch.load(str(saved), dtype="int3")


def test_the_faster_dtype_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETOUCH_CACHE", str(tmp_path))
    rates = {torch.float32: 1e9, torch.bfloat16: 5e9}
    monkeypatch.setattr(dtype, "matmul_rate", lambda kind, device: rates[kind])
    assert dtype.choose("auto", torch.device("cpu")) is torch.bfloat16
    rates[torch.bfloat16] = 1.0
    assert dtype.choose("auto", torch.device("cpu")) is torch.bfloat16
    (tmp_path / "dtype.json").write_text("not json")
    assert dtype.choose("auto", torch.device("cpu")) is torch.float32
