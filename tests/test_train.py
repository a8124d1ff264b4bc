"""Training goes on after a kill as if nothing had happened, sees what serving sees, and makes a checkpoint that loads."""

from __future__ import annotations

import io
import platform
import re
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2
from PIL import Image
from safetensors.torch import load_file

import retouch
import tiny
from retouch.edit import Edit, InvalidOption, RetouchError
from retouch.models.base import Document, Frame, Job, Prompt
from retouch.models.flux2 import Flux2
from retouch.models.latents import pixels_of
from retouch.train import autoencoder, card, data, mini
from retouch.train.concepts import CODEPOINTS, HELD_OUT, HUES, SEEN, Sticker, caption, hue_name, recolour
from retouch.train.distill import schedule
from retouch.train.flow import MODES, Velocity, noised
from retouch.train.linear import as_convolution
from retouch.train.loop import Stage, train
from retouch.train.muon import Muon
from retouch.train.scenes import Batch, Scenes


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks as if the packages had been fetched, with one coloured disc for each concept."""
    folder = tmp_path_factory.mktemp("packages")
    with tarfile.open(folder / "lobehub-fluent-emoji-3d-0.tgz", "w:gz") as archive:
        for index, point in enumerate(CODEPOINTS.values()):
            y, x = np.mgrid[-1:1:64j, -1:1:64j]
            disc = np.zeros((64, 64, 4), np.uint8)
            disc[..., :3] = np.random.default_rng(index).integers(0, 256, 3)
            disc[..., 3] = 255 * (x**2 + y**2 < 0.9)
            file = io.BytesIO()
            Image.fromarray(disc).save(file, "WEBP", lossless=True)
            member = tarfile.TarInfo(f"package/assets/{point}.webp")
            member.size = len(file.getvalue())
            archive.addfile(member, io.BytesIO(file.getvalue()))
    for package in data.WALLPAPERS:
        (folder / f"{package}_1_all.deb").touch()
        (folder / package).mkdir()
    np.savez(folder / f"photos-{data.PHOTO_SIDE}.npz", tiny.photo(300, 400, 1), tiny.photo(280, 300, 2))
    return folder


def run(folder: Path, steps: int, stop_at: int | None = None, seed: int = 0, **stage: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    modules = torch.nn.ModuleDict({"linear": torch.nn.Linear(4, 4)})
    count = 0

    def loss_of(batch: torch.Tensor, noise: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        nonlocal count
        if count == stop_at:
            raise KeyboardInterrupt
        count += 1
        return (modules["linear"](batch) - torch.randn(batch.shape, generator=noise)).square().mean(), {}

    def batch_at(rng: np.random.Generator, done: float) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=(8, 4))).float()

    settings = Stage("stage", steps, lr=0.1, samples=8, warmup=3, save_every=0.0, **stage)
    train(settings, modules, batch_at, loss_of, folder, seed=seed)
    return modules.state_dict()


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    straight = run(tmp_path / "straight", 12)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", 12, stop_at=7)
    resumed = run(tmp_path / "killed", 12)
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"seed": 1}, "seed 0, now 1"),
        ({"steps": 9}, "steps 6, now 9"),
        ({"clip": 2.0}, r"clip 1\.0, now 2\.0"),
        ({"after": {"start": "mini (ab)"}}, r"start not set, now mini \(ab\)"),
        ({"seed": 1, "after": {"scenes": 5}}, "seed 0, now 1; scenes not set, now 5"),
    ],
)
def test_a_state_of_other_settings_is_not_gone_on_from(tmp_path: Path, other: dict[str, Any], said: str) -> None:
    first = run(tmp_path, 6)
    with pytest.raises(InvalidOption, match=rf"stage\.pt was made with {said}; give another --work, or delete it"):
        run(tmp_path, **{"steps": 6, **other})
    again = run(tmp_path, 6, sheet_every=7)  # which changes no weight
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_a_state_that_says_nothing_or_is_damaged_is_refused(tmp_path: Path) -> None:
    torch.save({"step": 6}, tmp_path / "stage.pt")
    with pytest.raises(InvalidOption, match="does not say what it was made with"):
        run(tmp_path, 6)
    (tmp_path / "stage.pt").write_bytes(b"torn")
    with pytest.raises(InvalidOption, match="cannot be read"):
        run(tmp_path, 6)


def test_a_kill_while_a_file_is_written_leaves_none(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(what: Any, file: Any) -> None:
        if isinstance(file, Path):
            file.write_bytes(b"half")
        else:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    monkeypatch.setattr(np, "savez", lambda file, *pictures: torn(pictures, file))
    source, vae = data.Source(packages), autoencoder.build()
    with pytest.raises(KeyboardInterrupt):
        autoencoder.prepare_encoder(vae, source, tmp_path / "encoder.pt", 0, 8)
    assert not (tmp_path / "encoder.pt").exists()
    with pytest.raises(KeyboardInterrupt):
        data.load_photos(tmp_path)
    assert not list(tmp_path.glob("photos-*.npz"))


def test_packages_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{data.WALLPAPERS[0]}.part").mkdir()
    (tmp_path / f"{data.WALLPAPERS[0]}.part" / "of a killed run").touch()
    killed, ran = True, []

    def command(words: list[str], folder: Path) -> None:
        ran.append(words[0])
        made = {"npm": "lobehub-fluent-emoji-3d-1.tgz", "apt-get": f"{words[-1]}_1_all.deb"}.get(words[0], "")
        (folder / words[-1] / "picture.png" if words[0] == "dpkg-deb" else folder / made).touch()
        if killed and ran.count(words[0]) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(data, "_run", command)
    for _ in range(3):  # each command is killed once
        with pytest.raises(KeyboardInterrupt):
            data.fetch(tmp_path)
    killed = False
    data.fetch(tmp_path)
    assert [ran.count(name) for name in ("npm", "apt-get", "dpkg-deb")] == [2, 3, 3]
    assert all([file.name for file in (tmp_path / name).iterdir()] == ["picture.png"] for name in data.WALLPAPERS)
    assert not list(tmp_path.glob("*.part"))


def test_the_card_names_the_device_that_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device}")
    told = [card.model_card(4, {"vae": 1}, {"flow": 1}, torch.device(name)) for name in ("cpu", "cuda:1", "mps")]
    assert [re.findall(r"Trained on\*\* (CPU|[^,]+)", text) for text in told] == [["CPU"], ["GPU cuda:1"], ["mps"]]


def test_a_device_that_is_not_here_is_refused(tmp_path: Path) -> None:
    for name in ("nonsense", "cuda:77"):
        with pytest.raises(InvalidOption, match="is not here"):
            mini.main(["--work", str(tmp_path), "--device", name])


def test_held_out_concepts_are_a_tenth_or_so_and_never_seen() -> None:
    assert 0.05 < len(HELD_OUT) / len(CODEPOINTS) < 0.25
    assert not HELD_OUT & set(SEEN)


def test_captions_ask_for_what_changes() -> None:
    rng = np.random.default_rng(0)
    car, blue, apple = Sticker("car"), Sticker("car", "blue"), Sticker("red apple")
    for _ in range(20):
        assert "red apple" in caption(None, apple, rng)
        assert "blue" in caption(car, blue, rng)
        assert caption(car, None, rng).split()[0] in ("remove", "erase")
        assert "red apple" in caption(car, apple, rng)
    assert "an owl" in {caption(None, Sticker("owl"), rng) for _ in range(50)}


@pytest.mark.parametrize("colour", list(HUES))
def test_recolour_turns_the_dominant_hue(colour: str) -> None:
    sprite = np.zeros((8, 8, 4), np.uint8)
    sprite[...] = (220, 40, 30, 255)
    turned = recolour(sprite, colour)[0, 0, :3] / 255
    assert hue_name(tuple(turned)) == colour


def test_states_of_a_scene_differ_only_inside_its_mask(packages: Path) -> None:
    source = data.Source(packages)
    for seed in range(20):
        scene = source.scene(64, 96, np.random.default_rng(seed))
        for picture in scene.pictures[1:]:
            changed = (picture != scene.pictures[0]).any(2)
            assert changed.any()
            assert not (changed & ~scene.mask).any()
    again = source.scene(64, 96, np.random.default_rng(19))
    assert np.array_equal(again.pictures, scene.pictures)


def test_a_missing_packager_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RetouchError, match="npm"):
        data.fetch(tmp_path / "data")


def test_the_distilled_schedule_is_the_schedulers_own() -> None:
    pipeline = mini.pipeline_of({name: part for name, part in tiny.parts().items() if name != "scheduler"})
    model = Flux2(pipeline, tiny.model("Flux2KleinKVPipeline").family)
    assert model.sigmas(4, 64) == pytest.approx(schedule(4), abs=1e-6)
    assert schedule(28)[::7] == pytest.approx(schedule(4))


@pytest.fixture(scope="module")
def solved(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[AutoencoderKLFlux2, torch.Tensor]:
    """An autoencoder whose encoder is solved, and pictures that it has not seen (8, 3, 64, 64)."""
    source, vae = data.Source(packages), autoencoder.build()
    autoencoder.prepare_encoder(vae, source, tmp_path_factory.mktemp("solved") / "encoder.pt", 0, 64)
    rng = np.random.default_rng(9)
    pictures = np.stack([source.picture(64, 64, rng) for _ in range(8)])
    return vae.eval(), pixels_of(pictures, torch.device("cpu"), torch.float32)


def test_an_encoder_and_scenes_of_another_seed_are_not_taken(
    packages: Path, solved: tuple[AutoencoderKLFlux2, torch.Tensor], tmp_path: Path
) -> None:
    source, vae, device = data.Source(packages), autoencoder.build(), torch.device("cpu")
    autoencoder.prepare_encoder(vae, source, tmp_path / "encoder.pt", 0, 8)
    autoencoder.prepare_encoder(vae, source, tmp_path / "encoder.pt", 0, 8)
    with pytest.raises(InvalidOption, match=r"encoder\.pt was made with seed 0, now 1"):
        autoencoder.prepare_encoder(vae, source, tmp_path / "encoder.pt", 1, 8)
    sizes = {(64, 64): 2}
    made = Scenes(solved[0], source, sizes, tmp_path, device, 0, after={"start": None})
    again = Scenes(solved[0], source, sizes, tmp_path, device, 0, after={"start": None})
    assert torch.equal(made.by_size[64, 64][0].latents, again.by_size[64, 64][0].latents)
    with pytest.raises(InvalidOption, match=r"scenes-64x64-000000-2\.pt was made with start not set, now mini"):
        Scenes(solved[0], source, sizes, tmp_path, device, 0, after={"start": "mini"})
    with pytest.raises(InvalidOption, match="seed 0, now 3"):
        Scenes(solved[0], source, sizes, tmp_path, device, 3, after={"start": None})


@torch.no_grad()
def test_the_solved_encoder_keeps_what_principal_components_keep(solved: tuple[AutoencoderKLFlux2, torch.Tensor]) -> None:
    vae, pixels = solved
    latents = vae.encode(pixels).latent_dist.mode()
    blocks = torch.nn.functional.unfold(pixels, 8, stride=8).transpose(1, 2).flatten(0, 1)
    tokens = torch.nn.functional.pad(latents.permute(0, 2, 3, 1).flatten(0, 2), (0, 1), value=1.0)
    left_over = (blocks - tokens @ torch.linalg.lstsq(tokens, blocks).solution).square().sum()
    basis = torch.linalg.svd(blocks - blocks.mean(0), full_matrices=False).Vh[: latents.shape[1]]
    best = (blocks - blocks.mean(0) - (blocks - blocks.mean(0)) @ basis.T @ basis).square().sum()
    assert float(left_over) < 1.25 * float(best)


@torch.no_grad()
def test_the_solved_encoder_is_one_convolution(solved: tuple[AutoencoderKLFlux2, torch.Tensor]) -> None:
    vae, pixels = solved
    latents = vae.encode(pixels).latent_dist.mode()
    again = as_convolution(vae)(pixels)
    assert float((again - latents).norm() / latents.norm()) < 0.01


@torch.no_grad()
def test_the_solved_encoder_reads_each_block_alone(solved: tuple[AutoencoderKLFlux2, torch.Tensor]) -> None:
    vae, pixels = solved
    changed = pixels.clone()
    changed[..., 24:32, 40:48] *= -1
    difference = (vae.encode(changed).latent_dist.mode() - vae.encode(pixels).latent_dist.mode()).abs().amax((0, 1))
    inside = difference[3, 5].clone()
    difference[3, 5] = 0
    assert float(difference.max()) < 0.01 * float(inside)


def test_muon_trains_kernels_as_matrices() -> None:
    kernel = torch.nn.Parameter(torch.zeros(4, 2, 3, 3))
    kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(0))
    Muon([kernel], lr=1.0, weight_decay=0.0).step()
    spread = torch.linalg.svdvals(kernel.detach().flatten(1))
    assert float(spread.min()) > 0.4 * float(spread.max()) > 0


@torch.no_grad()
def test_where_a_document_lies_does_not_change_what_attention_sees(packages: Path) -> None:
    model = tiny.model("Flux2KleinKVPipeline")
    generator = torch.Generator().manual_seed(0)
    cells, inside = torch.tensor([[1, 2, 5]]), torch.ones(1, 3, dtype=torch.bool)
    document = torch.randn(1, 12, 16, generator=generator)
    batch = Batch(document, torch.randn(1, 1, 12, 16, generator=generator), ["a cat"], cells, inside, (3, 4))
    velocity = Velocity(model.transformer, model.text_encoder, model.tokenizer)

    def keys(shift: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return velocity.reference(replace(batch, shift=torch.tensor([0, shift, shift, 0])), torch.device("cpu"))

    here, there = keys(0), keys(7)
    assert not torch.allclose(here[0][0], there[0][0], atol=1e-3), "the shift reaches the rotary embedding"
    torch.testing.assert_close(here[-1][1], there[-1][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", list(MODES))
def test_training_and_serving_compute_the_same_velocity(mode: str) -> None:
    model = tiny.model("Flux2KleinPipeline" if mode == "joint" else "Flux2KleinKVPipeline")
    generator = torch.Generator().manual_seed(0)
    prompts = ["a red apple", "remove it", "make the car blue", "an owl"]
    cells = torch.tensor([[1, 2, 5, 6, 9], [0, 1, 4, 0, 0]])
    inside = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    document = torch.randn(2, 12, 16, generator=generator)
    batch = Batch(document, torch.randn(2, 2, 12, 16, generator=generator), prompts, cells, inside, (3, 4))
    sigma = torch.tensor([0.9, 0.4, 1.0, 0.1])
    step = noised(batch, mode, sigma, generator, torch.device("cpu"))
    velocity = Velocity(model.transformer, model.text_encoder, model.tokenizer)
    with torch.no_grad():
        trained = velocity(batch, step, mode, velocity.prompts(prompts))
    for row, text in enumerate(prompts):
        document = _document(model, batch.document[row // 2].view(3, 4, 16))
        of = inside[row // 2] if mode == "mask" else torch.ones(12, dtype=torch.bool)
        index = cells[row // 2][of] if mode == "mask" else torch.arange(12)
        job = _job(document, model.encode_prompt("", text, document), index, step.x[row][of], float(sigma[row]))
        model.step([job])
        served = (step.x[row][of] - job.latents) / sigma[row]
        assert float((served - trained[row][of]).norm() / served.norm()) < 1e-4


def _document(model: Flux2, tokens: torch.Tensor) -> Document:
    image = np.zeros((48, 64, 3), np.uint8)
    model._encode = lambda pixels: tokens  # type: ignore[method-assign]
    return model.encode_document(Frame((0, 0, 64, 48), 1.0, image, (), str(tokens.sum())))


def _job(document: Document, prompt: Prompt, cells: torch.Tensor, x: torch.Tensor, sigma: float) -> Job:
    edit = Edit(np.zeros((48, 64, 3), np.uint8), "a")
    frame = Frame((0, 0, 64, 48), 1.0, edit.image, (), "")
    return Job(edit, frame, document, prompt, None, None, cells, None, x, x, (sigma, 0.0))


def test_train_mini_makes_a_checkpoint_that_edits(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mini.flow, "SIZES", {(128, 128): 1.0})
    monkeypatch.setattr(mini, "STATISTICS", 8)
    counts = "--decoder 1 --flow 1 --distill 1 --scenes 1 --device cpu".split()
    assert mini.main(["--work", str(tmp_path), "--data", str(packages), *counts]) == 0
    out = tmp_path / "retouch-mini"
    assert sum(f.stat().st_size for f in out.rglob("*.safetensors")) < 60e6
    image = tiny.photo(128, 128)
    mask = np.zeros((128, 128), bool)
    mask[40:80, 40:80] = True
    answer = retouch.load(str(out), dtype="float32").edit([Edit(image, "a red apple", mask)])[0]
    assert answer.usage.steps == 4
    assert np.array_equal(answer.image[~mask], image[~mask])
    assert {f.name.split("-")[0] for f in tmp_path.glob("*.png")} >= {"decoder", "flow", "distill"}
    assert f"CPU ({platform.machine()})" in (out / "README.md").read_text()
    for other in (["--seed", "1"], ["--start", str(out)], ["--start", "retouch-mini"]):
        with pytest.raises(InvalidOption, match="was made with"):
            mini.main(["--work", str(tmp_path), "--data", str(packages), *counts, *other])
    _going_on_from_it_keeps_its_autoencoder(out, packages, tmp_path / "more")


def _going_on_from_it_keeps_its_autoencoder(out: Path, packages: Path, work: Path) -> None:
    counts = "--decoder 0 --flow 1 --distill 0 --scenes 1 --device cpu".split()
    assert mini.main(["--work", str(work), "--data", str(packages), "--start", str(out), *counts]) == 0
    before, after = (load_file(next((folder / "vae").glob("*.safetensors"))) for folder in (out, work / "retouch-mini"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list(work.glob("decoder-*.png"))
