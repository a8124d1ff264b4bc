"""Finding and reading checkpoints: a bundled name, a directory, a file or a hub name; every way they can be wrong is said."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError

from retouch.edit import CheckpointMismatch, InvalidOption, UnknownCheckpoint
from retouch.models import declared, single_file
from retouch.models.weights import check as check_weights
from retouch.models.weights import files_of, is_there

log = logging.getLogger(__name__)

BUNDLED = Path(__file__).parent / "bundled"


@dataclass(frozen=True, slots=True)
class Family:
    """What the pipeline class of a checkpoint says about how it is run.

    `adapter` names its family's class in `families.ADAPTERS`. `masked`: trained to compute the masked cells alone.
    `references`: further pictures that it looks at. `cached`: references attend to themselves at timestep 0, so their keys and
    values can be kept (FLUX.2-klein-KV); else they run along. `guidance`: the default, embedded or by a second pass; None where
    the checkpoint is distilled. `grey`: it has always seen a document, so a picture from nothing starts from a grey one instead
    of none. `sees` (FLUX.1, Qwen-Image): the document in the `sequence`, as `channels` with the mask's hole in it, or
    `nothing` of it.
    """

    cached: bool = False
    adapter: str = "flux2"
    masked: bool = False
    references: int = 15
    embeds_guidance: bool = False
    steps: int = 4
    guidance: float | None = None
    out_layers: tuple[int, ...] = (9, 18, 27)
    max_sequence_length: int = 512
    pad_prompts: bool = True
    max_side: int = 1024
    grey: bool = False
    sees: str = "sequence"


FAMILIES = {
    "Flux2KleinKVPipeline": Family(cached=True),
    "Flux2KleinPipeline": Family(cached=False),
    "Flux2KleinInpaintPipeline": Family(cached=False),
    "Flux2Pipeline": Family(cached=False, embeds_guidance=True, steps=50, guidance=4.0, out_layers=(10, 20, 30)),
    "FluxFillPipeline": Family(adapter="flux1", sees="channels", references=0, embeds_guidance=True, steps=50, guidance=30.0),
    "FluxKontextPipeline": Family(adapter="flux1", references=1, embeds_guidance=True, steps=28, guidance=3.5),
    "FluxKontextInpaintPipeline": Family(adapter="flux1", references=1, embeds_guidance=True, steps=28, guidance=3.5),
    "FluxPipeline": Family(adapter="flux1", sees="nothing", references=0, embeds_guidance=True, steps=28, guidance=3.5),
    "QwenImageEditPipeline": Family(adapter="qwen", references=0, steps=50, guidance=4.0),
    "QwenImageEditPlusPipeline": Family(adapter="qwen", references=2, steps=40, guidance=4.0),
    "QwenImageEditInpaintPipeline": Family(adapter="qwen", references=0, steps=50, guidance=4.0),
    "QwenImagePipeline": Family(adapter="qwen", sees="nothing", references=0, steps=50, guidance=4.0),
    "QwenImageInpaintPipeline": Family(adapter="qwen", sees="nothing", references=0, steps=50, guidance=4.0),
    "StableDiffusionXLInpaintPipeline": Family(adapter="sdxl", references=0, steps=50, guidance=7.5),
    "StableDiffusionXLPipeline": Family(adapter="sdxl", references=0, steps=50, guidance=5.0),
    "StableDiffusionInpaintPipeline": Family(adapter="sdxl", references=0, steps=50, guidance=7.5, max_side=512),
}
"""Pipeline class in `model_index.json` -> how it is run. A checkpoint's own `retouch.json` may say otherwise."""


PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".gguf")
"""Endings of files of weights that are not read."""


def find(name: str, file: Path | None = None, weights: bool = True) -> Path:
    """The directory of a checkpoint, or its one file. A hub name (`owner/model`) is downloaded; of parts whose weights are in
    `file`, the configs alone, and without `weights` nothing but what `family_of` reads. Raises UnknownCheckpoint,
    CheckpointMismatch.
    """
    path = _looked_up(name)
    if name == path.name and (BUNDLED / name / "model_index.json").is_file():
        return BUNDLED / name
    if path.is_dir():
        if not is_there(path / "model_index.json"):
            raise CheckpointMismatch(f"{path} has no model_index.json; give the directory of a diffusers pipeline.")
        return path
    if path.is_file():
        if path.suffix != ".safetensors":
            why = "is a pickle, which may run code" if path.suffix in PICKLED[:-1] else "is no file of safetensors"
            raise CheckpointMismatch(f"{path} {why}; give its weights as .safetensors, or a directory.")
        return path
    bundled = ", ".join(sorted(p.parent.name for p in BUNDLED.glob("*/model_index.json"))) or "none"
    if name.count("/") != 1 or path.is_absolute() or name.startswith("."):
        raise UnknownCheckpoint(
            f"no checkpoint {name!r}: bundled are {bundled}; else give a directory, a file, or owner/model of the hub."
        )
    try:
        if not weights:
            return _hub_index(name)
        held = () if file is None else single_file.parts_of(single_file.names_of(file), _hub_parts(name))
        folder = Path(DiffusionPipeline.download(name, **dict.fromkeys(held)))
        for part in held:
            hf_hub_download(name, f"{part}/config.json")
        _fetch_settings(name)
        return folder
    except Exception as error:  # whatever the hub's client raises, it is one answer here
        reason = " ".join(str(error).split())[:300]
        raise UnknownCheckpoint(
            f"no directory {name!r}, and the hub does not give it: {reason} Bundled are {bundled}."
        ) from error


def _looked_up(name: str) -> Path:
    """`name` as a path that can be asked for. Raises UnknownCheckpoint for one that no file or folder can have."""
    try:
        path = Path(name).expanduser()
        path.exists()  # in Python 3.11 it raises for a name that is too long, or in a folder that may not be read
    except (OSError, RuntimeError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UnknownCheckpoint(f"no checkpoint can be looked for at {name[:200]!r} ({why}); check the path.") from error
    return path


def _hub_parts(name: str) -> list[str]:
    path = Path(hf_hub_download(name, "model_index.json"))
    return declared.parts_of(_json(path), path)


def _hub_index(name: str) -> Path:
    """The folder with the small files of a hub name that `family_of` reads."""
    index = Path(hf_hub_download(name, "model_index.json"))
    if isinstance(_json(index).get("transformer"), list):
        hf_hub_download(name, "transformer/config.json")
    _fetch_settings(name)
    return index.parent


def _fetch_settings(name: str) -> None:
    """retouch.json, which is no part of a pipeline; most have none."""
    try:
        hf_hub_download(name, "retouch.json")
    except LocalEntryNotFoundError:
        log.warning("the hub cannot be asked whether %s has a retouch.json; it is run as its pipeline is", name)
    except EntryNotFoundError:
        log.debug("%s has no retouch.json", name)


def family_of(path: Path) -> tuple[str, Family, dict[str, Any]]:
    """(pipeline class, how it is run, model_index.json).

    Raises CheckpointMismatch for a family that is not served, and for a setting or a part that is not as it should be.
    """
    index = _json(path / "model_index.json")
    declared.parts_of(index, path / "model_index.json")
    name = str(index.get("_class_name"))
    if name not in FAMILIES:
        raise CheckpointMismatch(f"{path} is a {name}; served are {', '.join(FAMILIES)}.")
    family = FAMILIES[name]
    if index.get("is_distilled") is False and not family.embeds_guidance:
        family = replace(family, steps=50, guidance=4.0)
    transformer = path / "transformer" / "config.json"
    if family.adapter == "flux1" and is_there(transformer) and not _json(transformer).get("guidance_embeds"):  # schnell
        family = replace(family, embeds_guidance=False, guidance=None, steps=4, max_sequence_length=256)
    own = path / "retouch.json"
    if is_there(own):
        family = declared.applied(family, _json(own), own)
    return name, family, index


def base_of(path: Path, base: str | None, weights: bool = True) -> Path:
    """The directory of what a checkpoint has beside its weights: itself, or for a file that of `base`, found by its name, as
    `find` does.

    Raises InvalidOption, UnknownCheckpoint, CheckpointMismatch.
    """
    if path.is_dir():
        if base is not None:
            raise InvalidOption(f"--base goes with a single file, and {path} is a directory; leave it out.")
        return path
    names = single_file.names_of(path)
    if base is None:
        raise InvalidOption(
            f"{path} is a single file ({single_file.kind_of(names)}), without configs, tokenizers and a schedule: give --base "
            "with the directory of a diffusers pipeline of the same architecture, or its hub name."
        )
    folder = find(base, path, weights)
    if folder.is_file():
        raise InvalidOption(f"--base {base} is a file; give the directory of a diffusers pipeline, or its hub name.")
    return folder


def read(path: Path, dtype: torch.dtype, base: Path | None = None) -> tuple[Any, Family]:
    """The diffusers pipeline in `path`, every weight checked to be there in its shape.

    Where `path` is a single file, all but the weights in it comes from the directory `base` (`base_of`). Raises
    CheckpointMismatch, InvalidOption.
    """
    folder = base or base_of(path, None)
    name, family, index = family_of(folder)
    for part, (library, _) in ((k, v) for k, v in index.items() if isinstance(v, list) and v[0] is not None):
        if not os.path.isdir(folder / part):
            raise CheckpointMismatch(f"{folder} lacks the folder {part}/ that its model_index.json names ({library}).")
    quiet = [library.utils.logging for library in (diffusers, transformers)]
    for logger in quiet:
        logger.disable_progress_bar()
    try:
        given = {} if path == folder else single_file.read(path, folder, index, dtype)
        parts = [part for part in index if isinstance(index[part], list) and part not in given]
        models = [part for part in parts if is_there(folder / part / "config.json")]
        for part in models:
            files_of(folder / part, index[part][0])
        apart = {"processor": None} if index.get("processor") else {}  # whole, it wants torchvision for videos
        pipeline = getattr(diffusers, name).from_pretrained(folder, dtype=dtype, local_files_only=True, **apart, **given)
        if apart:
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

            pipeline.register_modules(processor=Qwen2VLImageProcessorPil.from_pretrained(folder / "processor"))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400]
        raise CheckpointMismatch(f"{folder} cannot be read as a {name}: {reason}") from error
    finally:
        for logger in quiet:
            logger.enable_progress_bar()
    for part in models:
        check_weights(folder / part, getattr(pipeline, part), index[part][0])
    return pipeline, family


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointMismatch(f"{path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointMismatch(f"{path} holds no JSON object.")
    return content
