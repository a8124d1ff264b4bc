"""Adapters: one edit's is the merged weights' answer, several in a step stay apart, and what does not fit is refused."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
from retouch import picture
from retouch.cli import main
from retouch.edit import AdapterMismatch, Edit, InvalidOption, UnknownAdapter
from retouch.engine.build import load
from retouch.engine.engine import Engine
from retouch.models import lora
from retouch.models.adapter import Adapter
from retouch.models.checkpoint import Family
from retouch.models.flux2 import Flux2
from retouch.models.options import Options
from retouch.serve.errors import BadRequest
from retouch.serve.forms import Fields

KV, KLEIN, DEV = "Flux2KleinKVPipeline", "Flux2KleinPipeline", "Flux2Pipeline"
TOLERANCE = 1e-3
PACK_TOLERANCE = 1e-4


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}


def weights(layers: dict[str, nn.Linear], rank: int, seed: int, prefix: str = "transformer") -> dict[str, Tensor]:
    """A LoRA in peft's form that changes each of these layers by about a third."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for name, layer in layers.items():
        down = torch.randn(rank, layer.in_features, generator=draw) / layer.in_features**0.5
        up = torch.randn(layer.out_features, rank, generator=draw)
        size = 0.3 * float(layer.weight.detach().norm() / (up @ down).norm())
        made |= {f"{prefix}.{name}.lora_A.weight": down, f"{prefix}.{name}.lora_B.weight": up * size}
    return made


def merged(pipe: Any, part: str, adapters: list[tuple[dict[str, Tensor], float]]) -> Any:
    """The same pipeline with W + scale up down for W."""
    denoiser = deepcopy(getattr(pipe, part))
    for made, scale in adapters:
        for name, layer in linears(denoiser).items():
            if (down := made.get(f"{part}.{name}.lora_A.weight")) is not None:
                layer.weight.data += scale * made[f"{part}.{name}.lora_B.weight"] @ down
    return tiny.assembled(type(pipe).__name__, {**pipe.components, part: denoiser})


def served(name: str, folder: Path | None, pipe: Any = None, **family: Any) -> Adapter:
    pipe = tiny.assembled(name, deepcopy(tiny.parts(guidance_embeds=name == DEV))) if pipe is None else pipe
    settings = {"cached": name == KV, "out_layers": tiny.LAYERS, "pad_prompts": False, "max_side": 512, **family}
    if name == DEV:
        settings |= {"embeds_guidance": True, "guidance": 4.0, "max_sequence_length": 400}
    made = Flux2(pipe, Family(masked=True, **settings), name, Options(halo=None, feather=0))
    return made if folder is None else lora.adapted(made, type(pipe), folder)


def edit(*adapters: tuple[str, float], seed: int = 1, height: int = 64, width: int = 80) -> Edit:
    mask = np.zeros((height, width), bool)
    mask[10:50, 20:60] = True
    return Edit(tiny.photo(height, width, seed), "a red apple", mask, seed=seed, steps=2, adapters=adapters)


def tokens(engine: Engine, asked: Edit) -> Tensor:
    job = engine.admit(asked)
    while not job.done:
        engine.step([job])
    return job.latents


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters for the tiny FLUX.2: of all layers, of the attention alone, and of the single blocks."""
    path = tmp_path_factory.mktemp("adapters")
    layers = linears(tiny.parts()["transformer"])
    save_file(weights(layers, 4, 1), path / "everything.safetensors")
    save_file(weights({n: m for n, m in layers.items() if ".attn." in n}, 2, 2), path / "attention.safetensors")
    (path / "singles").mkdir()
    some = {n: m for n, m in layers.items() if n.startswith("single_")}
    save_file(weights(some, 3, 3), path / "singles" / "pytorch_lora_weights.safetensors")
    return path


@pytest.mark.parametrize("name", [KV, KLEIN])
def test_an_adapter_is_the_merged_weights(name: str, folder: Path) -> None:
    model = served(name, folder)
    pipe = merged(tiny.pipeline(name), "transformer", [(load_file(folder / "everything.safetensors"), 0.7)])
    ours, theirs = tokens(Engine(model), edit(("everything", 0.7))), tokens(Engine(served(name, None, pipe)), edit())
    assert relative(ours, theirs) < TOLERANCE
    assert relative(ours, tokens(Engine(model), edit())) > 0.05


OTHERS = [
    ("FluxFillPipeline", {}), ("FluxKontextInpaintPipeline", {}), ("QwenImageEditPipeline", {"guidance": 4.0}),
    ("QwenImageEditPlusPipeline", {"zero_cond_t": True}), ("StableDiffusionXLInpaintPipeline", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), OTHERS)
def test_every_family_takes_adapters_of_all_its_layers(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    options = Options(halo=None, feather=0)
    plain, model = tiny.of_family(name, options, **settings), tiny.of_family(name, options, **settings)
    part = "unet" if "StableDiffusion" in name else "transformer"
    pipeline = getattr(diffusers, name)
    for index in range(2):
        save_file(weights(linears(plain.denoiser), 2 + index, index, part), tmp_path / f"{index}.safetensors")
    lora.adapted(model, pipeline, tmp_path)
    asked = [edit(("0", 1.0), height=64, width=64), edit(height=64, width=64, seed=2), edit(("1", 0.6), height=64, width=64)]
    jobs = [Engine(model).admit(one) for one in asked]
    while not jobs[0].done:
        model.step(jobs)
    assert relative(jobs[1].latents, tokens(Engine(plain), asked[1])) < PACK_TOLERANCE
    for index, scale in ((0, 1.0), (1, 0.6)):
        other = tiny.of_family(name, options, **settings)
        made = load_file(tmp_path / f"{index}.safetensors")
        for layer, module in linears(other.denoiser).items():
            module.weight.data += scale * made[f"{part}.{layer}.lora_B.weight"] @ made[f"{part}.{layer}.lora_A.weight"]
        theirs = tokens(Engine(other), replace(asked[2 * index], adapters=()))
        assert relative(jobs[2 * index].latents, theirs) < TOLERANCE
        assert relative(theirs, tokens(Engine(plain), replace(asked[2 * index], adapters=()))) > 10 * TOLERANCE


def test_embedded_guidance_is_adapted_too(tmp_path: Path) -> None:
    made = weights(linears(tiny.parts(guidance_embeds=True)["transformer"]), 2, 5)
    save_file(made, tmp_path / "dev.safetensors")
    pipe = merged(tiny.pipeline(DEV), "transformer", [(made, 1.0)])
    ours = tokens(Engine(served(DEV, tmp_path)), edit(("dev", 1.0)))
    assert relative(ours, tokens(Engine(served(DEV, None, pipe)), edit())) < TOLERANCE


def test_several_adapters_of_one_edit_add_up(folder: Path) -> None:
    files = [folder / "attention.safetensors", folder / "singles" / "pytorch_lora_weights.safetensors"]
    pipe = merged(tiny.pipeline(KV), "transformer", [(load_file(files[0]), 1.0), (load_file(files[1]), -0.5)])
    ours = tokens(Engine(served(KV, folder)), edit(("attention", 1.0), ("singles", -0.5)))
    assert relative(ours, tokens(Engine(served(KV, None, pipe)), edit())) < TOLERANCE


@pytest.mark.parametrize(("name", "family"), [(KV, {}), (KLEIN, {}), (KLEIN, {"guidance": 4.0})])
def test_a_mixed_step_equals_one_by_one(name: str, family: dict[str, Any], folder: Path) -> None:
    model = served(name, folder, **family)
    asked = [
        edit(("everything", 1.0)), edit(), edit(("attention", 0.5), seed=2, height=96),
        edit(("everything", 1.0), seed=3, width=64), edit(("everything", 0.2)), edit(seed=2),
    ]  # fmt: skip
    alone, engine = [tokens(Engine(model), one) for one in asked], Engine(model)
    jobs = [engine.admit(one) for one in asked]
    while not jobs[0].done:
        engine.step(jobs)
    for job, other in zip(jobs, alone, strict=True):
        assert relative(job.latents, other) < PACK_TOLERANCE
    assert relative(jobs[1].latents, tokens(Engine(served(name, None, **family)), edit())) < PACK_TOLERANCE


def test_documents_encode_beside_the_loop_without_wearing_its_adapters(folder: Path) -> None:
    model = served(KV, folder)
    worn: list[tuple[tuple[str, float], ...]] = [(("everything", 1.0),), (), (("attention", 0.5),), ()]
    asked = [edit(*worn[i % 4], seed=i, height=64 + 16 * (i % 3)) for i in range(8)]
    beside = Engine(model, tokens=40, beside=2)
    for one, other in zip(beside.edit(asked), asked, strict=True):
        assert np.abs(one.image.astype(int) - Engine(model).edit([other])[0].image).max() <= 1
    beside.close()


def test_without_adapters_no_layer_is_touched(folder: Path) -> None:
    model = served(KV, folder)
    tokens(Engine(model), edit())
    assert all("forward" not in vars(layer) for layer in linears(model.denoiser).values())
    tokens(Engine(model), edit(("attention", 1.0)))
    touched = {name for name, layer in linears(model.denoiser).items() if "forward" in vars(layer)}
    assert touched
    assert all(".attn." in name for name in touched)


def test_keys_name_the_adapters(folder: Path) -> None:
    model, joint = served(KV, folder), served(KLEIN, folder)
    asked = [edit(), edit(("attention", 1.0)), edit(("attention", 0.5)), edit(("singles", 1.0))]
    assert len({model.frame(one).key for one in asked}) == 4, "its keys and values go through the adapted layers"
    assert len({joint.frame(one).key for one in asked}) == 1, "its latents do not"
    assert model.frame(edit(("attention", 0.0))).key == model.frame(edit()).key
    engine = Engine(joint)
    answers = [engine.edit([replace(one, reuse=True)])[0] for one in [*asked, asked[1]]]
    assert [answer.usage.cache_hits == ("result",) for answer in answers] == [False] * 4 + [True]


def test_a_file_that_is_replaced_is_read_again(tmp_path: Path) -> None:
    some = {n: m for n, m in linears(tiny.parts()["transformer"]).items() if ".attn." in n}
    save_file(weights(some, 2, 1), tmp_path / "a.safetensors")
    engine = Engine(served(KV, tmp_path))
    first = tokens(engine, edit(("a", 1.0)))
    save_file(weights(some, 3, 2), tmp_path / "a.safetensors")
    assert relative(tokens(engine, edit(("a", 1.0))), first) > TOLERANCE


def test_alpha_is_taken_from_keys_and_from_the_header(tmp_path: Path) -> None:
    some = {n: m for n, m in linears(tiny.parts()["transformer"]).items() if n.endswith(("to_q", "to_out"))}
    made = weights(some, 4, 1)
    save_file(made, tmp_path / "plain.safetensors")
    save_file({**made, **{f"transformer.{n}.alpha": torch.tensor(2.0) for n in some}}, tmp_path / "keys.safetensors")
    said = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"attn.to_q": 2}}
    save_file(made, tmp_path / "header.safetensors", {"format": "pt", "lora_adapter_metadata": json.dumps(said)})
    save_file(made, tmp_path / "rs.safetensors", {"lora_adapter_metadata": json.dumps({"transformer.use_rslora": True})})
    loras = served(KV, tmp_path).loras
    assert loras is not None
    read = {name: loras.get(name, loras.stamp(name)).weights for name in loras.names()}
    for module in some:
        plain = read["plain"][module][1]
        assert torch.equal(read["keys"][module][1], plain * 0.5)
        assert torch.equal(read["header"][module][1], plain * (0.5 if module.endswith("attn.to_q") else 2))
        assert torch.allclose(read["rs"][module][1], plain * 2)


FORMS = [
    (KV, "single_transformer_blocks.1.attn.to_out", "lora_unet_single_blocks_1_linear2"),
    ("FluxKontextPipeline", "transformer_blocks.0.attn.to_out.0", "lora_unet_double_blocks_0_img_attn_proj"),
    ("QwenImageEditPipeline", "transformer_blocks.0.attn.to_q", "lora_unet_transformer_blocks_0_attn_to_q"),
    (
        "StableDiffusionXLInpaintPipeline", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "module", "key"), FORMS)
def test_kohyas_form_is_read_by_diffusers_own_converter(name: str, module: str, key: str, tmp_path: Path) -> None:
    model = lora.adapted(tiny.of_family(name, Options()), getattr(diffusers, name), tmp_path)
    layer = linears(model.denoiser)[module]
    down, up = torch.randn(4, layer.in_features), torch.randn(layer.out_features, 4)
    kohya = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
    save_file(kohya, tmp_path / "kohya.safetensors")
    assert model.loras is not None
    found = model.loras.get("kohya", model.loras.stamp("kohya")).weights
    assert list(found) == [module]
    assert relative(found[module][1] @ found[module][0], 0.5 * up @ down) < 1e-6


def test_the_command_line_and_a_loaded_engine_take_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = load(adapters=tmp_path, dtype="float32")
    model: Any = engine.model
    save_file(weights(linears(model.denoiser), 4, 1), tmp_path / "ink.safetensors")
    picture.write(tmp_path / "in.png", tiny.photo(64, 80))
    command = ["edit", str(tmp_path / "in.png"), "-p", "a red apple", "--box", "16,16,32,32", "--dtype", "float32"]
    command += ["--adapters", str(tmp_path), "-o", str(tmp_path / "out.png")]
    assert main([*command, "--adapter", "ink=0.5"]) == 0
    mask = np.zeros((64, 80), bool)
    mask[16:48, 16:48] = True
    asked = Edit(tiny.photo(64, 80), "a red apple", mask, adapters=(("ink", 0.5),))
    assert np.array_equal(picture.read(tmp_path / "out.png").pixels, engine.edit([asked])[0].image)
    for wrong, said in (("none", "there are ink"), ("ink=much", "NAME=SCALE"), ("ink=1000", "-100 to 100")):
        assert main([*command, "--adapter", wrong]) == 2
        assert said in capsys.readouterr().err
    assert main([*command[:-4], "-o", str(tmp_path / "out.png"), "--adapter", "ink"]) == 2
    assert "--adapters DIR" in capsys.readouterr().err


def refused(tmp_path: Path, made: dict[str, Tensor], match: str, **metadata: str) -> None:
    save_file({key: tensor.clone() for key, tensor in made.items()}, tmp_path / "wrong.safetensors", metadata or None)
    with pytest.raises(AdapterMismatch, match=match):
        Engine(served(KV, tmp_path)).edit([edit(("wrong", 1.0))])


def test_what_does_not_fit_is_refused_by_its_first_key(tmp_path: Path) -> None:
    q = {"transformer_blocks.0.attn.to_q": linears(tiny.parts()["transformer"])["transformer_blocks.0.attn.to_q"]}
    good = weights(q, 2, 1)
    a, b = (f"transformer.transformer_blocks.0.attn.to_q.lora_{half}.weight" for half in "AB")
    refused(tmp_path, {a: good[a]}, "lacks transformer_blocks.0.attn.to_q.lora_B.weight")
    refused(tmp_path, {**good, b: torch.zeros(32, 3)}, "no common rank")
    refused(tmp_path, {a: torch.zeros(2, 48), b: good[b]}, r"\[2, 48\] .* from 32 to 32; it is of another model")
    refused(tmp_path, {**good, a.replace(".0.", ".9."): good[a]}, "adapts transformer_blocks.9.attn.to_q, no linear")
    refused(tmp_path, {**good, "transformer.x_embedder.weight": torch.zeros(1)}, "x_embedder.weight, which is no part")
    other = {key.replace("transformer.", "unet.", 1): v for key, v in good.items()}
    refused(tmp_path, other, "unet.* no weight of a transformer")
    refused(tmp_path, {**good, "text_encoder.layers.0.q.lora_A.weight": good[a]}, "text encoder")
    refused(tmp_path, {**good, b.replace("B.weight", "magnitude_vector"): torch.zeros(32)}, "DoRA")
    refused(tmp_path, {a.replace("lora_A.weight", "lokr_w1"): torch.zeros(2, 2)}, "LoKr")
    refused(tmp_path, {**good, a: good[a] * float("nan")}, "no finite numbers")
    refused(tmp_path, good, "cannot be read", lora_adapter_metadata="{")
    (tmp_path / "wrong.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(AdapterMismatch, match="download it again"):
        Engine(served(KV, tmp_path)).edit([edit(("wrong", 1.0))])


def test_a_request_names_them_with_their_scales() -> None:
    assert Fields(prompt="a cat", adapters="ink:0.8, pale").worn() == (("ink", 0.8), ("pale", 1.0))
    assert Fields(prompt="a cat").worn() == ()
    with pytest.raises(BadRequest, match="NAME:SCALE"):
        Fields(prompt="a cat", adapters="ink:much").worn()


@pytest.mark.parametrize("name", ["nothing", "../everything", "", "a/b", "singles/pytorch_lora_weights"])
def test_unknown_names_are_refused_before_anything_is_encoded(name: str, folder: Path) -> None:
    with pytest.raises(UnknownAdapter, match="attention, everything, singles"):
        Engine(served(KV, folder)).submit(edit((name, 1.0)))


def test_an_adapter_wants_a_folder() -> None:
    with pytest.raises(InvalidOption, match="--adapters"):
        Engine(served(KV, None)).submit(edit(("everything", 1.0)))
    with pytest.raises(UnknownAdapter, match="no folder"):
        served(KV, Path("nowhere"))


@pytest.mark.parametrize("adapters", [(("a", 1.0), ("a", 0.5)), (("a", float("nan")),), (("a", "1"),), ((3, 1.0),)])
def test_edits_with_adapters_that_make_no_sense_are_refused(adapters: Any) -> None:
    with pytest.raises(InvalidOption, match="adapter"):
        edit(*adapters)
