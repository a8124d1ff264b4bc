"""Sample sheets: what the model draws now, for a person to look at while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from retouch.edit import Edit
from retouch.models.checkpoint import Family
from retouch.models.flux2 import Flux2
from retouch.train import text
from retouch.train.concepts import caption
from retouch.train.data import Scene, Source

ROWS = 8


def edit_sheet(pipeline: Any, source: Source, path: Path, steps: int = 4) -> None:
    """A row a scene: the empty place, an insert, its truth; then the thing, its removal, a replacement, its truth."""
    family = Family(
        cached=True,
        steps=steps,
        out_layers=text.OUT_LAYERS,
        max_sequence_length=text.MAX_LENGTH,
        pad_prompts=False,
        max_side=512,
        masked=True,
    )
    training = pipeline.transformer.training
    model = Flux2(pipeline, family)
    rows = []
    for seed in range(ROWS):
        rng = np.random.default_rng([seed, 5])
        scene = source.scene(128, 128, rng)
        tiles = [scene.pictures[0], _edited(model, scene, 0, 1, rng), scene.pictures[1]]
        tiles += [_edited(model, scene, 1, 0, rng), _edited(model, scene, 1, 2, rng), scene.pictures[2]]
        rows.append(np.concatenate(tiles, 1))
    Image.fromarray(np.concatenate(rows, 0)).save(path)
    pipeline.transformer.train(training)
    pipeline.text_encoder.train(training)


def _edited(model: Flux2, scene: Scene, before: int, after: int, rng: np.random.Generator) -> np.ndarray:
    prompt = caption(scene.stickers[before], scene.stickers[after], rng)
    edit = Edit(scene.pictures[before], prompt, scene.mask, seed=1)
    frame = model.frame(edit)
    document = model.encode_document(frame)
    job = model.start(edit, frame, document, model.encode_prompt("", prompt, document), None)
    while not job.done:
        model.step([job])
    return model.finish(job)
