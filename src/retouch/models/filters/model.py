"""A filter as an EditModel: one step that takes the tiles of every picture in it, those of one size together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from PIL import Image

from retouch import picture
from retouch.edit import CheckpointMismatch, Edit, ImageTooLarge, InvalidOption
from retouch.models.base import Document, Frame, Job, Prompt
from retouch.models.filters.graph import Graph, axes
from retouch.models.filters.spec import Spec
from retouch.models.filters.tiles import Canvas, starts

TOGETHER = 8
"""Tiles that go through the graph in one call, where it takes more than one."""

CELL = 16
"""A filter has no tokens; its size is counted in squares of so many pixels, so that its tokens are of the families' order."""


@dataclass(frozen=True, slots=True)
class Tile:
    """`pixels` (h, w, 3) uint8 of one job's picture, as large as the graph wants them, from `top` and `left` on."""

    job: int
    pixels: np.ndarray
    top: int
    left: int


class Filter:
    """`fingerprint` names the weights and the TOML.

    Of the protocol's nouns a Document and a Prompt are empty here, but for the number for which a store without room leaves
    them: nothing of a picture is worth keeping, and nothing is said about it (an edit's prompt is the filter's name). A Job's
    `latents` are, after its step, what came out, (H, W, C) in 0 to 1.
    """

    approximate: tuple[str, ...] = ()

    def __init__(self, spec: Spec, graph: Graph, fingerprint: str = "") -> None:
        self.spec, self.graph = spec, graph
        self.together = 1 if graph.inputs[spec.input.name][0] == 1 else TOGETHER
        self._fingerprint = fingerprint.encode()

    def frame(self, edit: Edit) -> Frame:
        """The whole picture. What a filter has no use for is refused."""
        height, width = edit.image.shape[:2]
        self._check(edit)
        if (made := height * width * self.spec.output.scale**2) > picture.MAX_PIXELS:
            raise ImageTooLarge(
                f"{self.spec.name} would make {made / 1e6:,.0f} megapixels of it, more than "
                f"{picture.MAX_PIXELS / 1e6:,.0f}; scale it down."
            )
        digest = hashlib.blake2b(self._fingerprint + f"|{edit.tenant}|{edit.image.shape}".encode(), digest_size=20)
        digest.update(edit.image.tobytes())
        return Frame((0, 0, width, height), 1.0, edit.image[..., :3], (), digest.hexdigest())

    def _check(self, edit: Edit) -> None:
        name, output = self.spec.name, self.spec.output
        if edit.references or edit.blank:
            raise InvalidOption(f"{name} works on one picture; leave references out, and give a document.")
        if edit.adapters:
            raise InvalidOption(f"{name} is no model that adapters fit; leave them out.")
        if edit.guidance is not None or edit.negative or edit.steps not in (None, 1):
            raise InvalidOption(f"{name} has one step and no guidance; leave steps, guidance and negative prompt out.")
        if edit.prompt != name:
            raise InvalidOption(f"{name} reads no prompt; give its name instead.")
        if edit.mask is not None and (output.kind == "mask" or output.scale > 1):
            raise InvalidOption(f"{name} makes a whole new picture; leave the mask out.")

    def size(self, edit: Edit, frame: Frame) -> tuple[int, int]:
        tiles = len(self._starts(frame.pixels.shape[0], 1)) * len(self._starts(frame.pixels.shape[1], 0))
        height, width = self._tile(frame.pixels)
        return max(1, tiles * height * width // CELL**2), 1

    def prompt_key(self, text: str, tenant: str, frame: Frame) -> str:
        return f"{tenant}|{text}"

    def negative(self, edit: Edit) -> str | None:
        return None

    def encode_document(self, frame: Frame) -> Document:
        return Document(frame.key, torch.zeros(1), (), torch.zeros(0), torch.zeros(0))

    def encode_prompt(self, key: str, text: str, document: Document) -> Prompt:
        return Prompt(key, torch.zeros(0), torch.zeros(1))

    def start(self, edit: Edit, frame: Frame, document: Document, prompt: Prompt, negative: Prompt | None) -> Job:
        tokens = self.size(edit, frame)[0]
        job = Job(
            edit, frame, document, prompt, None, None, torch.arange(tokens), None, torch.zeros(0), torch.zeros(0), (1.0, 0.0)
        )
        job.usage.tokens_whole = tokens
        return job

    def step(self, jobs: Sequence[Job]) -> None:
        scale, channels = self.spec.output.scale, 3 if self.spec.output.kind == "image" else 1
        made: list[Canvas | None] = [None] * len(jobs)
        for tiles in self._groups(jobs):
            out = self._run(np.stack([tile.pixels for tile in tiles]))
            for tile, one in zip(tiles, out, strict=True):
                job = jobs[tile.job]
                if self.spec.size.rule == "resize":
                    job.latents = torch.from_numpy(one)
                    continue
                height, width = job.frame.pixels.shape[:2]
                canvas = made[tile.job] or Canvas(height * scale, width * scale, channels)
                made[tile.job] = canvas
                canvas.add(one, tile.top * scale, tile.left * scale, self.spec.size.overlap * scale)
        for job, drawn in zip(jobs, made, strict=True):
            if drawn is not None:
                job.latents = torch.from_numpy(drawn.picture())
            job.step = job.usage.steps = 1
            job.width = len(job.cells)
            job.usage.tokens_computed += job.width

    def _groups(self, jobs: Sequence[Job]) -> Iterator[list[Tile]]:
        """Tiles of one size, as many as go together; no more of them lie ready than that, whatever the picture's size."""
        waiting: dict[tuple[int, ...], list[Tile]] = {}
        for index, job in enumerate(jobs):
            for tile in self._cut(index, job.frame.pixels):
                group = waiting.setdefault(tile.pixels.shape, [])
                group.append(tile)
                if len(group) == self.together:
                    yield waiting.pop(tile.pixels.shape)
        yield from waiting.values()

    def _cut(self, index: int, pixels: np.ndarray) -> Iterator[Tile]:
        """A picture's tiles. Where it is smaller than one, its last row and column are repeated."""
        if self.spec.size.rule == "resize":
            scaled = Image.fromarray(np.ascontiguousarray(pixels)).resize(self.spec.size.side, Image.Resampling.LANCZOS)
            yield Tile(index, np.asarray(scaled), 0, 0)
            return
        height, width = self._tile(pixels)
        for top in self._starts(pixels.shape[0], 1):
            for left in self._starts(pixels.shape[1], 0):
                part = pixels[top : top + height, left : left + width]
                missing = [(0, side - there) for side, there in zip((height, width), part.shape[:2], strict=True)]
                yield Tile(index, np.pad(part, [*missing, (0, 0)], mode="edge"), top, left)

    def _tile(self, pixels: np.ndarray) -> tuple[int, int]:
        """Height and width of what goes into the graph."""
        size = self.spec.size
        if size.rule in ("fixed", "resize"):
            return size.side[1], size.side[0]
        height, width = (min(side, size.tile or side) for side in pixels.shape[:2])
        return height + -height % size.multiple, width + -width % size.multiple

    def _starts(self, length: int, axis: int) -> list[int]:
        """`axis` 0: across, 1: down."""
        size = self.spec.size
        tile = {"fixed": size.side[axis], "resize": length}.get(size.rule, size.tile or length)
        return starts(length, tile, size.overlap)

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        """(N, h, w, 3) uint8 -> (N, scale h, scale w, C) float32, black or clear at 0, white or opaque at 1."""
        given, wanted = self.spec.input, self.spec.output
        low, high = given.range
        colours = slice(None) if given.order == "RGB" else slice(None, None, -1)
        x = pixels[..., colours].astype(np.float32) * ((high - low) / 255) + low
        mean, std = (np.array(numbers, np.float32) for numbers in (given.mean, given.std))
        x = (x - mean) / std
        out = self.graph.run(np.ascontiguousarray(x.transpose(0, 3, 1, 2) if given.layout == "NCHW" else x))
        if out.ndim == 3 and wanted.kind == "mask":
            out = out[:, None] if given.layout == "NCHW" else out[..., None]
        expected = (len(pixels), 3 if wanted.kind == "image" else 1, *(side * wanted.scale for side in pixels.shape[1:3]))
        if out.ndim != 4 or axes(out.shape, self.spec) != expected:
            self._mismatch(pixels.shape, out.shape, expected)
        out = out.transpose(0, 2, 3, 1)[..., colours] if given.layout == "NCHW" else out[..., colours]
        if wanted.range == "stretch":
            return out
        black, white = wanted.range
        return (out - black) / (white - black)

    def _mismatch(self, given: tuple[int, ...], got: tuple[int, ...], expected: tuple[int, ...]) -> NoReturn:
        raise CheckpointMismatch(
            f"{self.spec.name}: of {given[2]} x {given[1]} pixels the graph makes {'x'.join(map(str, got))}, where the TOML's "
            f"[output] promises {'x'.join(map(str, expected))} (N, C, H, W); mend kind, scale or [size] there."
        )

    def synchronize(self) -> None:
        """What came out lies in host memory already."""

    @contextmanager
    def apart(self) -> Iterator[None]:
        yield

    def finish(self, job: Job) -> np.ndarray:
        out = job.latents.numpy()
        if self.spec.output.range == "stretch":
            low, high = float(out.min()), float(out.max())
            out = (out - low) / max(high - low, 1e-6)
        made = np.rint(np.clip(out, 0, 1) * 255).astype(np.uint8)
        image, scale = job.edit.image, self.spec.output.scale
        size = (image.shape[1] * scale, image.shape[0] * scale)
        if made.shape[1::-1] != size:
            made = _resized(made, size)
        alpha = image[..., 3] if image.shape[2] == 4 else None
        if self.spec.output.kind == "mask":
            shown = made[..., 0] if alpha is None else np.rint(made[..., 0] * (alpha / 255)).astype(np.uint8)
            return np.dstack([image[..., :3], shown])
        if alpha is not None:
            made = np.dstack([made, alpha if scale == 1 else _resized(alpha[..., None], size)])
        if job.edit.mask is not None:
            made = np.where(job.edit.mask[..., None], made, image)
        return made

    def preview(self, job: Job) -> np.ndarray:
        return self.finish(job)


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w, 1 or 3) uint8 -> the same of another (width, height)."""
    flat = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return np.asarray(flat.resize(size, Image.Resampling.BICUBIC)).reshape(size[1], size[0], -1)
