"""`retouch models`: a row for every family there is, and what a checkpoint is without loading it."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from hubs import SMALL, Hub
from retouch.cli import main
from retouch.models import checkpoint, table
from retouch.models.base import Traits
from retouch.models.checkpoint import BUNDLED, FAMILIES
from retouch.models.families import ADAPTERS, adapter_of


def told(capsys: pytest.CaptureFixture[str], *options: str) -> Any:
    assert main(["models", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_family_has_a_row_of_what_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["pipeline"]: row for row in told(capsys)}
    assert set(rows) == {*FAMILIES, "retouch-mini"}
    for row in rows.values():
        assert set(row) == set(table.COLUMNS)
        assert all(value != "" for value in row.values())
    assert rows["retouch-mini"]["masked"] == "exact"
    assert not rows["retouch-mini"]["refresh"], "nothing is left to refresh"
    assert {family.adapter for family in FAMILIES.values()} == set(ADAPTERS)
    for row in rows.values():
        assert (row["decode"], row["outside"]) == ("approximate", "exact")
    looks = {name for name, row in rows.items() if row["prompt"] == "for its text and pictures"}
    assert looks == {name for name in FAMILIES if name.startswith("QwenImageEdit")}
    assert {row["prompt"] for name, row in rows.items() if name not in looks} == {"for its text"}


def test_the_table_shows_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*FAMILIES, *table.COLUMNS.values(), "exact", "approximate"))
    for name in ("packing", "masked cells", "kept of a document", "kept prompt", "crop decode", "outside"):
        assert name in table.COLUMNS.values()


def test_a_checkpoint_is_described_without_its_weights(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "--model", "retouch-mini")
    assert found["pipeline"] == "Flux2KleinKVPipeline"
    assert found["masked"] == "exact"
    assert found["run"]["steps"] == 4
    assert found["weights"]["transformer"]["parameters"] > 4e6
    assert main(["models", "--model", "retouch-mini"]) == 0
    assert "flux2.py" in capsys.readouterr().out


def test_a_hub_name_is_described_by_its_small_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(BUNDLED / "retouch-mini", tmp_path / "hub", monkeypatch)
    found, local = told(capsys, "--model", "somebody/mini"), told(capsys, "--model", "retouch-mini")
    assert hub.asked == SMALL
    assert found == {**local, "model": "somebody/mini", "weights": {}}


def test_schnell_is_told_from_dev_on_the_hub(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its transformer's config; it has no settings of its own."""
    (tmp_path / "flux" / "transformer").mkdir(parents=True)
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "flux" / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "flux" / "transformer" / "config.json").write_text(json.dumps({"guidance_embeds": False}))
    Hub(tmp_path / "flux", tmp_path / "hub", monkeypatch)
    assert told(capsys, "--model", "somebody/schnell")["run"]["steps"] == 4


def test_a_base_without_a_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for model in ("retouch-mini", str(BUNDLED / "retouch-mini")):
        assert main(["models", "--model", model, "--base", "retouch-mini"]) == 2
        assert "--base goes with a single file" in capsys.readouterr().err


def test_an_unknown_architecture_is_named_beside_what_is_served(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "AmusedPipeline"}))
    assert main(["models", "--model", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "AmusedPipeline" in said
    assert all(name in said for name in FAMILIES)


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--model", "nothing-of-that-name"]) == 2
    assert "retouch-mini" in capsys.readouterr().err


def test_a_checkpoint_without_weights_is_described_as_far_as_it_goes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(BUNDLED / "retouch-mini", copy, ignore=shutil.ignore_patterns("*.safetensors"))
    (copy / "vae" / "damaged.safetensors").write_bytes(b"x")
    assert told(capsys, "--model", str(copy))["weights"] == {}
    (copy / "vae" / "damaged.safetensors").rename(copy / "vae" / "diffusion_pytorch_model.safetensors")
    assert told(capsys, "--model", str(copy))["weights"] == {}


def test_weights_are_counted_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Beside those that are read there may be others, such as the same in half precision."""
    copy = shutil.copytree(BUNDLED / "retouch-mini", tmp_path / "model")
    read = next((copy / "transformer").glob("*.safetensors"))
    shutil.copy(read, read.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert told(capsys, "--model", str(copy))["weights"] == told(capsys, "--model", "retouch-mini")["weights"]


def test_a_wrong_setting_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    copy = shutil.copytree(BUNDLED / "retouch-mini", tmp_path / "model")
    (copy / "retouch.json").write_text('{"steps": "4"}')
    assert main(["models", "--model", str(copy)]) == 2
    assert "retouch.json: steps is '4'; give a whole number" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(FAMILIES))
def test_traits_are_declared_in_words(name: str) -> None:
    traits = adapter_of(checkpoint.FAMILIES[name]).traits(checkpoint.FAMILIES[name])
    assert isinstance(traits, Traits)
    assert all(getattr(traits, field.name) not in ("", None) for field in fields(traits))
