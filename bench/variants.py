"""What runs side by side: the stock pipelines, crops of them, and Retouch cold, warm and packed, over one workload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ceiling import decoder, document, encoder, packed_step, prompt
from pipelines import Peer
from retouch.cache.memory import Memory
from retouch.cache.store import Store
from retouch.edit import Edit
from retouch.engine import Engine
from retouch.models.flux2 import Flux2
from retouch.passes.fold import folded
from timing import Clock, Sample, Spread

PHOTOS = Path(__file__).parent.parent / "photos"
SHARES = (0.03, 0.11, 0.35, 1.0)
BATCHES = (1, 4, 8, 16)
CONTEXT = 32
"""Pixels around the mask that the crop peers see."""
PROMPTS = (
    "a red apple", "remove the object", "replace the dog with a cat", "make the car blue", "add a yellow banana",
    "a green tree", "remove the car", "make the hat purple",
)  # fmt: skip


def roomy(model: Flux2) -> Engine:
    """An engine that keeps every document: what is measured here is no eviction."""
    return Engine(model, documents=Store(Memory("device", 1 << 40)))


@dataclass(frozen=True, slots=True)
class Settings:
    side: int = 512
    rounds: int = 5
    steps: int = 4
    seed: int = 0
    compiled: bool = True
    shares: tuple[float, ...] = SHARES
    batches: tuple[int, ...] = BATCHES


@dataclass(slots=True)
class Variant:
    """One row group. `share` is of the picture under the mask; None where the mask changes nothing of the work."""

    name: str
    share: float | None
    run: Callable[[int], Sample]
    batch: int = 1
    first: float = 0.0
    error: str = ""
    samples: list[Sample] = field(default_factory=list)

    def spread(self, stage: str) -> Spread:
        return Spread.of([sample.seconds[stage] for sample in self.samples])


class Edits:
    """The workload: documents from the photos, and edits of them with masks at places that the seed decides."""

    def __init__(self, settings: Settings) -> None:
        self.settings, count = settings, max(settings.batches)
        size = (settings.side, settings.side)
        photos = sorted(PHOTOS.glob("*.jpg"))[:count]
        self.documents = [np.array(ImageOps.fit(Image.open(path).convert("RGB"), size)) for path in photos]
        rng = np.random.default_rng(settings.seed)
        while len(self.documents) < count:
            noise = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            self.documents.append(np.array(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)))

    def of(self, turn: int, share: float, count: int, same_prompt: bool = False) -> list[Edit]:
        """`count` edits of as many documents."""
        rng = np.random.default_rng([self.settings.seed, turn, round(share * 1000), count])
        edits = []
        for index in range(count):
            mask = box_mask(self.settings.side, share, rng)
            text = PROMPTS[0 if same_prompt else index % len(PROMPTS)]
            image = self.documents[(turn + index) % len(self.documents)]
            edits.append(Edit(image, text, mask, seed=turn * 100 + index, steps=self.settings.steps))
        return edits


def box_mask(side: int, share: float, rng: np.random.Generator, cell: int = 16) -> np.ndarray:
    """A box of about that share of the picture, as square as whole cells allow, at a random cell."""
    cells = side // cell
    width = min(cells, max(1, round(cells * share**0.5)))
    height = min(cells, max(1, round(share * cells * cells / width)))
    x, y = int(rng.integers(cells - width + 1)), int(rng.integers(cells - height + 1))
    mask = np.zeros((side, side), bool)
    mask[y * cell : (y + height) * cell, x * cell : (x + width) * cell] = True
    return mask


def serve(engine: Engine, edits: Sequence[Edit], clock: Clock, warm: bool) -> Sample:
    """Edits of equal steps as the engine's loop serves them, timed by stage."""
    model, shapes = engine.model, []
    assert isinstance(model, Flux2)
    watch = model.vae.decoder.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[-2:]))
    try:
        marks = [clock()]
        jobs = [engine.admit(edit) for edit in edits]
        marks.append(clock())
        while not jobs[0].done:
            engine.step(jobs)
        marks.append(clock())
        for job in jobs:
            engine.finish(job)
        marks.append(clock())
    finally:
        watch.remove()
    assert all(job.usage.cache_hits == (("document", "prompt") if warm else ()) for job in jobs)
    config = model.transformer.config
    fresh = [] if warm else [_encode_flops(model, job.edit, len(job.prompt.embedded)) for job in jobs]
    flops = (sum(fresh), jobs[0].steps * packed_step(config, jobs), sum(decoder(model.vae, *shape) for shape in shapes))
    return Sample.of(marks, flops, sum(len(job.cells) for job in jobs))


def _encode_flops(model: Flux2, edit: Edit, words: int) -> int:
    height, width = edit.image.shape[:2]
    reference = document(model.transformer.config, height * width // model.cell**2) if model.family.cached else 0
    return encoder(model.vae, height, width) + prompt(model.text_encoder, words) + reference


def variants(model: Flux2, settings: Settings, clock: Clock) -> list[Variant]:
    """All rows of the bench: the peers on the modules as they were read, Retouch on what `engine.load` makes of them. The
    documents and prompts of the warm engine are encoded here.
    """
    ours = folded(model)
    edits, warm = Edits(settings), roomy(ours)
    made = []
    for kind in ("KV", "plain") if model.family.cached else ("plain",):
        for compiled in (False, True) if settings.compiled else (False,):
            peer = Peer(model, kind, compiled, clock, settings.steps)
            whole = lambda turn, peer=peer: peer.run(edits.of(turn, 0.11, 1, same_prompt=True)[0])  # noqa: E731
            made.append(Variant(peer.name, None, whole))
            if kind == "KV" or not model.family.cached:
                made += [_cropped(peer, share, edits) for share in settings.shares if share < 1]
    for image, text in zip(edits.documents, cycle(PROMPTS)):
        warm.admit(Edit(image, text))
    for share in settings.shares:
        cold = lambda turn, share=share: serve(roomy(ours), edits.of(turn, share, 1), clock, warm=False)  # noqa: E731
        made.append(Variant("Retouch cold", share, cold))
        for count in settings.batches:
            packed = lambda turn, share=share, count=count: serve(warm, edits.of(turn, share, count), clock, warm=True)  # noqa: E731
            made.append(Variant("Retouch warm" if count == 1 else f"Retouch warm x{count}", share, packed, count))
    return made


def _cropped(peer: Peer, share: float, edits: Edits) -> Variant:
    """The trick of every user with a small mask: edit a crop around it, and paste that back."""

    def run(turn: int) -> Sample:
        edit = edits.of(turn, share, 1, same_prompt=True)[0]
        rows, columns = np.nonzero(edit.mask.any(1))[0], np.nonzero(edit.mask.any(0))[0]  # type: ignore[union-attr]
        side = min(edits.settings.side, max(np.ptp(rows), np.ptp(columns)) + 1 + 2 * CONTEXT)
        top, left = (int(np.clip(at[0] - CONTEXT, 0, edits.settings.side - side)) for at in (rows, columns))
        return peer.run(edit, (left, top, left + int(side), top + int(side)))

    return Variant(peer.name.replace(" ", " crop "), share, run)
