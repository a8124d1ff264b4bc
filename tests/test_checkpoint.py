"""Every way a checkpoint can be wrong is a typed error that says how to mend it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import retouch
import tiny
from hubs import Hub
from retouch.edit import CheckpointMismatch, Edit, InvalidOption, UnknownCheckpoint
from retouch.models import checkpoint, dtype, weights

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


def changed(folder: Path, part: str, **weights: torch.Tensor) -> None:
    file = next((folder / part).glob("*.safetensors"))
    save_file(load_file(file) | weights, file, {"format": "pt"})


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_weight_that_has_no_place_is_refused(broken: Path, part: str) -> None:
    changed(broken, part, **{"extra_block.weight": torch.zeros(2), "extra_block.weight_scale": torch.zeros(1)})
    with pytest.raises(CheckpointMismatch, match=rf"{part} has 2 weights .* no place for: extra_block\.weight, extra_block"):
        retouch.load(str(broken), dtype="float32")


def test_what_a_text_encoder_leaves_out_is_named_in_the_log(broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    changed(broken, "text_encoder", **{"vision.head.weight": torch.zeros(2), "model.rotary_emb.inv_freq": torch.zeros(4)})
    retouch.load(str(broken), dtype="float32")
    assert "text_encoder: 1 weights that a Qwen3ForCausalLM has not are left out: vision.head.weight" in caplog.text


def test_a_stray_file_is_no_part_of_the_checkpoint(broken: Path) -> None:
    """Neither for a weight that the file which is read lacks, nor for one too many."""
    file = next((broken / "transformer").glob("*.safetensors"))
    weights = load_file(file)
    save_file(
        {**weights, "extra": torch.zeros(1)}, file.with_name("diffusion_pytorch_model.fp16.safetensors"), {"format": "pt"}
    )
    retouch.load(str(broken), dtype="float32")
    name = next(k for k, v in weights.items() if v.ndim >= 2)
    save_file({k: v for k, v in weights.items() if k != name}, file, {"format": "pt"})
    with pytest.raises(CheckpointMismatch, match=f"lacks 1 of .* first {name}"):
        retouch.load(str(broken), dtype="float32")


def test_a_pickle_beside_another_file_is_not_read(broken: Path) -> None:
    """Where its own file is missing, diffusers would take the pickle."""
    folder = broken / "transformer"
    next(folder.glob("*.safetensors")).rename(folder / "other.safetensors")
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointMismatch, match=r"no diffusion_pytorch_model\.safetensors .* only other\.safetensors"):
        retouch.load(str(broken), dtype="float32")


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_shards_are_those_of_their_index(broken: Path, part: str) -> None:
    file = next((broken / part).glob("*.safetensors"))
    weights = load_file(file)
    names, stem = sorted(weights), file.name.removesuffix(".safetensors")
    placed = {name: f"{stem}-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(placed.values()):
        save_file({k: weights[k] for k in names if placed[k] == shard}, broken / part / shard, {"format": "pt"})
    index = broken / part / f"{file.name}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    file.unlink()
    retouch.load(str(broken), dtype="float32")
    (broken / part / placed[names[0]]).unlink()
    with pytest.raises(CheckpointMismatch, match=r"lacks .*-00001-of-00002\.safetensors, which .*index\.json names"):
        retouch.load(str(broken), dtype="float32")
    index.write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointMismatch, match="no index of shards"):
        retouch.load(str(broken), dtype="float32")


def test_older_names_of_an_autoencoders_attention_are_its_own(tmp_path: Path) -> None:
    """As Stable Diffusion's autoencoders have them; diffusers renames them."""
    torch.manual_seed(0)
    made = AutoencoderKL(block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
                         up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2)  # fmt: skip
    made.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, weight in load_file(file).items():
        for new, old in older.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = weight
    assert any("query" in name for name in renamed)
    save_file(renamed, file, {"format": "pt"})
    weights.check(tmp_path, AutoencoderKL.from_pretrained(tmp_path), "diffusers")


def said(folder: Path, file: str, change: dict[str, Any]) -> str:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointMismatch) as error:
        checkpoint.family_of(folder)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"out_layers": 3}, "out_layers is 3; give a list"),
        ({"out_layers": []}, "out_layers is []; give a list"),
        ({"out_layers": [1, "2"]}, "give a list of the text encoder's layers"),
        ({"adapter": "nope"}, "adapter is 'nope'; give 'flux2'"),
        ({"adapter": ["flux2"]}, "give 'flux2'"),
        ({"steps": "4"}, "steps is '4'; give a whole number from 1 to 100"),
        ({"steps": True}, "steps is True; give a whole number"),
        ({"steps": 0}, "give a whole number from 1"),
        ({"max_side": 1.5}, "max_side is 1.5"),
        ({"max_sequence_length": None}, "max_sequence_length is None"),
        ({"references": -1}, "references is -1"),
        ({"guidance": "high"}, "guidance is 'high'; give a number"),
        ({"guidance": float("nan")}, "guidance is nan; give a number"),
        ({"masked": "yes"}, "masked is 'yes'; give true or false"),
        ({"cached": 1}, "cached is 1; give true or false"),
        ({"sees": {}}, "sees is {}; give one of sequence"),
    ],
)
def test_a_setting_of_another_kind_is_refused(broken: Path, change: dict[str, Any], wanted: str) -> None:
    text = said(broken, "retouch.json", change)
    assert wanted in text
    assert "retouch.json" in text


@pytest.mark.parametrize("value", [["diffusers"], [], ["diffusers", 3], ["a", "b", "c"]])
def test_a_part_of_another_form_is_refused(broken: Path, value: Any) -> None:
    text = said(broken, "model_index.json", {"vae": value})
    assert "model_index.json: vae is" in text
    assert "library and class" in text


@pytest.mark.parametrize("layers", [[1, 2, 9], [1, 2]])
def test_layers_that_the_parts_have_not_are_refused(broken: Path, layers: list[int]) -> None:
    (broken / "retouch.json").write_text(json.dumps(SETTINGS | {"out_layers": layers}))
    with pytest.raises(CheckpointMismatch, match=r"out_layers is .* 3 layers of width 16.* reads 48 .* give 3 of them"):
        retouch.load(str(broken), dtype="float32")


def test_a_folder_that_may_not_be_read_is_refused(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = Path.stat

    def denied(path: Path, **how: Any) -> Any:
        if path.parent.name == "broken":
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", denied)
    with pytest.raises(CheckpointMismatch, match="may not be looked for"):
        checkpoint.find(str(broken))
