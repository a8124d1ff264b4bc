"""Single files: the same answer as the directory, whatever the form of their keys, and every misfit refused by name."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from torch import Tensor

import original_keys
import retouch
import test_flux1
import test_qwen
import test_sdxl
import tiny
from hubs import SMALL, Hub
from retouch.cli import main
from retouch.edit import CheckpointMismatch, Edit, InvalidOption, UnknownCheckpoint
from retouch.engine.build import _fingerprint
from retouch.models import checkpoint, flux1_keys, mapped, single_file

Tensors = dict[str, Tensor]
Weights = Callable[[Any], Tensors]

PARTS = {"flux2": ["transformer"], "flux1": ["transformer"], "qwen": ["transformer"]}
XL_PARTS = ["unet", "vae", "text_encoder", "text_encoder_2"]


def bare(pipeline: Any) -> Tensors:
    return dict(pipeline.transformer.state_dict())


def prefixed(prefix: str) -> Weights:
    return lambda pipeline: {prefix + key: tensor for key, tensor in bare(pipeline).items()}


def of_flux1(pipeline: Any) -> Tensors:
    return original_keys.flux1(bare(pipeline))


def of_flux1_whole(pipeline: Any) -> Tensors:
    """As user interfaces bundle it: the model with its autoencoder and text encoders, and what of CLIP it has no use for."""
    return {
        **{f"model.diffusion_model.{key}": tensor for key, tensor in of_flux1(pipeline).items()},
        **{f"vae.{key}": tensor for key, tensor in original_keys.autoencoder(pipeline.vae.state_dict(), 4).items()},
        **{f"text_encoders.clip_l.transformer.text_model.{k}": t for k, t in pipeline.text_encoder.state_dict().items()},
        **{
            f"text_encoders.t5xxl.transformer.{key}": tensor
            for key, tensor in pipeline.text_encoder_2.state_dict().items()
            if key != "encoder.embed_tokens.weight"
        },
        **dict.fromkeys(("text_encoders.clip_l.logit_scale", "text_encoders.t5xxl.logit_scale"), torch.zeros(())),
        "text_encoders.clip_l.transformer.text_projection.weight": torch.eye(4),
    }


def of_flux2(pipeline: Any) -> Tensors:
    return original_keys.flux2(bare(pipeline))


def of_xl(pipeline: Any) -> Tensors:
    """With what training leaves in such files."""
    clip = original_keys.open_clip(pipeline.text_encoder_2.state_dict())
    return {
        **{f"model.diffusion_model.{key}": t for key, t in original_keys.unet(pipeline.unet.state_dict(), 1).items()},
        **{f"first_stage_model.{key}": t for key, t in original_keys.autoencoder(pipeline.vae.state_dict(), 4).items()},
        **{f"conditioner.embedders.0.transformer.text_model.{k}": t for k, t in pipeline.text_encoder.state_dict().items()},
        **{f"conditioner.embedders.1.model.{key}": tensor for key, tensor in clip.items()},
        "conditioner.embedders.1.model.logit_scale": torch.zeros(1), "alphas_cumprod": torch.zeros(1000),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(24)[None],
    }  # fmt: skip


def of_sd(pipeline: Any) -> Tensors:
    """Of Stable Diffusion before XL."""
    return {
        **{f"model.diffusion_model.{key}": t for key, t in original_keys.unet(pipeline.unet.state_dict(), 1).items()},
        **{f"first_stage_model.{key}": t for key, t in original_keys.autoencoder(pipeline.vae.state_dict(), 4).items()},
        **{f"cond_stage_model.transformer.text_model.{k}": t for k, t in pipeline.text_encoder.state_dict().items()},
        "model_ema.decay": torch.zeros(()), "model_ema.diffusion_modelout2weight": torch.zeros(4),
    }  # fmt: skip


def of_xl_unet(pipeline: Any) -> Tensors:
    return dict(pipeline.unet.state_dict())


FILES: dict[str, tuple[str, Weights]] = {
    "flux2": ("flux2", bare), "flux2-prefixed": ("flux2", prefixed("transformer.")), "flux2-original": ("flux2", of_flux2),
    "flux1": ("flux1", bare), "flux1-original": ("flux1", of_flux1), "flux1-whole": ("flux1", of_flux1_whole),
    "qwen": ("qwen", prefixed("model.diffusion_model.")), "sdxl-whole": ("sdxl", of_xl), "sdxl-unet": ("sdxl", of_xl_unet),
    "sd-whole": ("sd", of_sd),
}  # fmt: skip
"""Name -> the family of its base, and its weights."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Family -> its pipeline, and that saved."""
    root = tmp_path_factory.mktemp("bases")
    made: dict[str, tuple[Any, dict[str, Any]]] = {
        "flux2": (tiny.pipeline("Flux2KleinKVPipeline"), {"out_layers": tiny.LAYERS, "max_sequence_length": 32}),
        "flux1": (test_flux1.pipeline(test_flux1.KONTEXT), {"max_sequence_length": 20}),
        "qwen": (test_qwen.pipeline(test_qwen.DRAW), {"max_sequence_length": 64}),
        "sdxl": (test_sdxl.pipeline(9), {}),
        "sd": (test_sdxl.pipeline(9, "epsilon", False), {}),
    }
    for name, (pipeline, settings) in made.items():
        pipeline.save_pretrained(root / name)
        settings |= {"max_side": 64, "steps": 2, "pad_prompts": False}
        (root / name / "retouch.json").write_text(json.dumps(settings))
    return {name: (pipeline, root / name) for name, (pipeline, _) in made.items()}


@pytest.fixture
def written(bases: dict[str, tuple[Any, Path]], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A file of FILES, changed by `change`, and its base without the weights that are in the file."""

    def write(name: str, change: Callable[[Tensors], Any] = lambda weights: None) -> tuple[Path, Path]:
        family, weights = FILES[name]
        pipeline, folder = bases[family]
        held = {key: tensor.clone().contiguous() for key, tensor in weights(pipeline).items()}
        change(held)
        save_file(held, tmp_path / f"{name}.safetensors")
        whole = {
            "flux1-whole": ["transformer", "vae", "text_encoder", "text_encoder_2"],
            "sdxl-whole": XL_PARTS,
            "sd-whole": XL_PARTS[:3],
        }
        base = shutil.copytree(folder, tmp_path / "base")
        for part in whole.get(name, ["unet" if family == "sdxl" else "transformer"]):
            for file in (base / part).glob("*.safetensors"):
                file.unlink()
        return tmp_path / f"{name}.safetensors", base

    return write


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may be called."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", FILES)
def test_a_file_answers_as_the_directory(
    name: str, bases: dict[str, tuple[Any, Path]], written: Callable[..., tuple[Path, Path]]
) -> None:
    file, base = written(name)
    edit = Edit(tiny.photo(64, 48), "a red apple", test_flux1.box(64, 48, 8, 8, 24, 24), seed=3, steps=2)
    whole = retouch.load(str(bases[FILES[name][0]][1]), dtype="float32", device="cpu").edit([edit])[0]
    single = retouch.load(str(file), dtype="float32", device="cpu", base=str(base)).edit([edit])[0]
    assert np.array_equal(single.image, whole.image)
    assert (single.image != edit.image).any()


def test_in_another_dtype_too(bases: dict[str, tuple[Any, Path]], written: Callable[..., tuple[Path, Path]]) -> None:
    file, base = written("sdxl-whole")
    single, _ = checkpoint.read(file, torch.bfloat16, base)
    whole, _ = checkpoint.read(bases["sdxl"][1], torch.bfloat16)
    for part in XL_PARTS:
        ours, theirs = (getattr(pipeline, part).state_dict() for pipeline in (single, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


def test_flux1_is_renamed_as_diffusers_does() -> None:
    """At the one width that diffusers knows; of one column, as it splits rows."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    original = original_keys.flux1({key: torch.rand(len(tensor), 1) for key, tensor in model.state_dict().items()})
    theirs = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    ours, extra = flux1_keys.renamed(original, model)
    assert not extra
    assert ours.keys() == theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(("name", "whole"), [("flux1-original", False), ("flux2-original", False), ("flux2", True)])
def test_its_weights_are_views_of_the_mapped_file(name: str, whole: bool, written: Callable[..., tuple[Path, Path]]) -> None:
    """All but the one matrix whose halves are swapped."""
    file, base = written(name)
    pipeline, _ = checkpoint.read(file, torch.float32, base)
    inside, outside = mapped.counted({"transformer": pipeline.transformer})["transformer"]
    swapped = pipeline.transformer.norm_out.linear
    assert outside == (0 if whole else sum(p.nbytes for p in swapped.parameters()))
    assert inside > outside


def drop(*parts: str) -> Callable[[Tensors], Any]:
    return lambda weights: [weights.pop(key) for key in list(weights) if any(part in key for part in parts)]


def add(*names: str) -> Callable[[Tensors], Any]:
    return lambda weights: weights.update({name: torch.rand(3) for name in names})


def widen(name: str) -> Callable[[Tensors], Any]:
    return lambda weights: weights.update({name: torch.cat([weights[name], weights[name]])})


def scaled(name: str) -> Callable[[Tensors], Any]:
    """As files of 8 bits have it beside a weight."""
    return lambda weights: weights.update({f"{name}.{end}": torch.tensor(0.1) for end in single_file.SCALES})


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("flux1", drop("norm_k"), r"4 of \d+ weights are missing, first single_transformer_blocks.0.attn.norm_k.weight"),
        ("flux1-original", drop("double_blocks.1.img_attn.qkv"), r"6 of \d+ weights are missing.*blocks.1.attn.to_k.bias"),
        ("flux1-original", add("double_blocks.0.more.weight", "deep"), "2 keys have no place.*first deep"),
        ("flux1-original", add("double_blocks.7.img_attn.proj.weight"), "1 keys have no place.*double_blocks.7"),
        ("flux1-original", widen("single_blocks.0.linear1.weight"), "4 weights have another shape.*attn.to_k.weight"),
        ("flux1-original", widen("img_in.weight"), r"1 weights have another shape.*x_embedder.weight \(\[64, 16\], there \[32"),
        ("flux1-whole", add("text_encoders.clip_g.transformer.weight"), "1 keys have no place.*clip_g"),
        ("flux1-whole", drop("t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.q"), r"text_encoder_2: 1 of \d+ weights"),
        ("flux1-whole", add("text_encoders.t5xxl.transformer.more"), "text_encoder_2: 1 keys have no place.*first more"),
        ("flux2", drop("proj_out"), r"1 of \d+ weights are missing, first proj_out.weight"),
        ("flux2-original", drop("img_in"), r"1 of \d+ weights are missing, first x_embedder.weight"),
        ("flux2-original", add("guidance_in.in_layer.weight"), "1 keys have no place.*guidance_embedder"),
        ("flux2-original", add("double_blocks.0.more.weight"), "cannot be read as a Flux2Transformer2DModel.*--base"),
        ("flux2-original", widen("single_blocks.0.linear2.weight"), "1 weights have another shape.*attn.to_out.weight"),
        ("flux2-original", scaled("double_blocks.0.img_attn.qkv"), "5 keys have no place.*first double_blocks.*input_scale"),
        ("qwen", add("scaled_fp8"), "1 keys have no place.*scaled_fp8"),
        ("sdxl-whole", drop("output_blocks.0.0.in_layers"), r"unet: 4 of \d+ weights are missing, first up_blocks.0.resnets.0"),
        ("sdxl-whole", add("model.diffusion_model.more.weight"), "unet: 1 keys have no place.*first more"),
        ("sdxl-whole", add("first_stage_model.loss.weight"), "vae: 1 keys have no place.*first loss"),
        ("sdxl-whole", add("conditioner.embedders.1.model.more"), "text_encoder_2: 1 keys have no place.*more"),
        ("sdxl-whole", add("conditioner.embedders.0.transformer.text_model.more"), "text_encoder: 1 keys have no place"),
        ("sdxl-whole", drop("embedders.1.model.ln_final"), "text_encoder_2: 2 of .* weights are missing.*final_layer_norm"),
        ("sdxl-whole", widen("conditioner.embedders.1.model.positional_embedding"), "text_encoder_2.*position_embedding"),
        ("sdxl-whole", add("control_model.weight"), "1 keys have no place.*control_model"),
        ("sdxl-unet", widen("conv_out.bias"), r"1 weights have another shape.*conv_out.bias \(\[8\], there \[4\]\)"),
    ],
)  # fmt: skip
def test_keys_that_do_not_fit_are_refused_by_name(
    name: str, change: Callable[[Tensors], Any], said: str, written: Callable[..., tuple[Path, Path]]
) -> None:
    file, base = written(name, change)
    with pytest.raises(CheckpointMismatch, match=said):
        checkpoint.read(file, torch.float32, base)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("blocks.0.self_attn.q.weight", "an unknown architecture .1 keys such as blocks.0"), ("head.modulation", "Wan"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "a LoRA"),
        ("joint_blocks.0.x.weight", "Diffusion 3"), ("input_blocks.0.0.weight", "a Stable Diffusion UNet"),
    ],
)  # fmt: skip
def test_another_architecture_is_named_beside_what_is_read(
    key: str, kind: str, bases: dict[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    save_file({key: torch.rand(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointMismatch, match=f"{kind}.*of the Flux2Transformer2DModel .* Read are FLUX.1, FLUX.2 and"):
        checkpoint.read(tmp_path / "other.safetensors", torch.float32, bases["flux2"][1])


def test_a_base_of_another_architecture_is_refused(
    bases: dict[str, tuple[Any, Path]], written: Callable[..., tuple[Path, Path]]
) -> None:
    file, _ = written("flux1-original")
    with pytest.raises(CheckpointMismatch, match=r"it is FLUX\.1, and cannot be read as a Flux2Transformer2DModel"):
        checkpoint.read(file, torch.float32, bases["flux2"][1])
    with pytest.raises(CheckpointMismatch, match=r"it is FLUX\.1, with 4 of 77 weights of the QwenImageTransformer2DModel"):
        checkpoint.read(file, torch.float32, bases["qwen"][1])


def test_a_damaged_file_is_refused(written: Callable[..., tuple[Path, Path]]) -> None:
    file, base = written("flux2")
    whole = file.read_bytes()
    for broken in (whole[:2000], whole[:-100], b"", b"not at all", b"\xff" * 64):
        file.write_bytes(broken)
        with pytest.raises(CheckpointMismatch, match="damaged"):
            retouch.load(str(file), dtype="float32", base=str(base))


def test_what_a_file_needs_is_asked_for(bases: dict[str, tuple[Any, Path]], written: Callable[..., tuple[Path, Path]]) -> None:
    file, base = written("flux1-original")
    with pytest.raises(InvalidOption, match=r"single file \(FLUX\.1\).*give --base"):
        retouch.load(str(file), dtype="float32")
    with pytest.raises(InvalidOption, match=r"single file \(FLUX\.1\)"):
        checkpoint.read(file, torch.float32)
    with pytest.raises(InvalidOption, match="--base goes with a single file"):
        retouch.load(str(base), dtype="float32", base=str(base))
    with pytest.raises(InvalidOption, match="is a file"):
        retouch.load(str(file), dtype="float32", base=str(file))
    with pytest.raises(UnknownCheckpoint, match="bundled are"):
        retouch.load(str(file), dtype="float32", base="nothing-here")
    shutil.rmtree(base / "vae")
    with pytest.raises(CheckpointMismatch, match="lacks the folder vae/"):
        retouch.load(str(file), dtype="float32", base=str(base))


@pytest.mark.parametrize(
    ("name", "said"), [("a.ckpt", "may run code"), ("a.gguf", "no file of safetensors"), ("a", "no file of")]
)
def test_other_kinds_of_files_are_refused(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(CheckpointMismatch, match=said):
        retouch.load(str(tmp_path / name), base="retouch-mini")


def test_of_a_hub_name_only_what_the_file_lacks_is_fetched(
    written: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, base = written("flux1-whole")
    asked: dict[str, Any] = {}
    configs: list[str] = []

    def download(name: str, **without: Any) -> str:
        asked.update(without, name=name)
        return str(base)

    monkeypatch.setattr(DiffusionPipeline, "download", staticmethod(download))
    monkeypatch.setattr(checkpoint, "hf_hub_download", lambda name, path: configs.append(path) or base / path)
    assert checkpoint.base_of(file, "somebody/flux") == base
    parts = {"transformer", "vae", "text_encoder", "text_encoder_2"}
    assert asked == {"name": "somebody/flux", **dict.fromkeys(parts)}
    assert set(configs) == {"model_index.json", "retouch.json", *(f"{part}/config.json" for part in parts)}


def test_the_file_is_part_of_what_tells_models_apart(written: Callable[..., tuple[Path, Path]]) -> None:
    file, base = written("flux2")
    before = _fingerprint(file, base)
    assert before == _fingerprint(file, base) != _fingerprint(base, base)
    weights = load_file(file)
    save_file({key: tensor + 1 for key, tensor in weights.items()}, file)
    assert _fingerprint(file, base) != before


def test_a_file_is_described(written: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]) -> None:
    file, base = written("flux1-original")
    assert main(["models", "--json", "--model", str(file), "--base", str(base)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pipeline"] == test_flux1.KONTEXT
    assert found["weights"].keys() == {file.name, "vae", "text_encoder", "text_encoder_2"}
    assert main(["models", "--model", str(file)]) == 2
    assert "--base" in capsys.readouterr().err


def test_a_file_is_described_without_the_weights_of_a_hub_base(
    written: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file, base = written("flux1-original")
    hub = Hub(base, tmp_path / "hub", monkeypatch)
    assert main(["models", "--json", "--model", str(file), "--base", "somebody/flux"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pipeline"] == test_flux1.KONTEXT
    assert found["run"]["max_side"] == 64
    assert found["weights"].keys() == {file.name}
    assert hub.asked == SMALL
