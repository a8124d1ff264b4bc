"""The session of the demo: which edits, of which photo, at which place, and each of them through every path."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from retouch import picture
from retouch.edit import Edit, Edited, InvalidImage

if TYPE_CHECKING:
    from retouch.models.peer import Peer


class Editor(Protocol):
    """An engine, or what stands for one."""

    def edit(self, edits: Sequence[Edit]) -> list[Edited]: ...


PATHS = ("inpaint", "KV", "Retouch")
CELL = 16
MAX_SIDE = 512
"""The longer side of the bundled photos, on which the places below are given."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One edit of the session, on the photo's current document. `commit`: its result is the current document from then on.

    `place` is (x, y, width, height) in pixels of the stored photo, a box or the ellipse in it.
    """

    kind: str
    photo: str
    prompt: str
    place: tuple[int, int, int, int]
    ellipse: bool = False
    seed: int = 1
    commit: bool = False


GRASS, SKY, LEAVES, SHADE = (138, 204, 144, 116), (312, 14, 116, 132), (350, 28, 132, 128), (10, 186, 118, 118)

SESSION = (
    Turn("insert", "meadow", "a car", GRASS, seed=1),
    Turn("insert", "meadow", "a car", GRASS, seed=2),
    Turn("insert", "meadow", "a car", GRASS, seed=3, commit=True),
    Turn("recolour", "meadow", "make the car blue", GRASS),
    Turn("replace", "meadow", "replace the car with a penguin", GRASS),
    Turn("remove", "meadow", "remove the car", GRASS),
    Turn("insert", "china", "a red balloon", SKY, ellipse=True, commit=True),
    Turn("recolour", "china", "make the balloon yellow", SKY, ellipse=True),
    Turn("replace", "china", "replace the balloon with a rocket", SKY, ellipse=True),
    Turn("remove", "china", "remove it", SKY, ellipse=True),
    Turn("insert", "flower", "a butterfly", LEAVES, ellipse=True),
    Turn("insert", "flower", "a strawberry", SHADE),
)


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """What the paths made of one turn. `images`, (H, W, 3) uint8, and `seconds` by path.

    `source` is the number, from 1, of the edit whose result was edited here; 0: the photo itself.
    """

    turn: Turn
    source: int
    edit: Edit
    edited: Edited
    images: dict[str, np.ndarray]
    seconds: dict[str, float]

    @property
    def speedup(self) -> float:
        """Against the faster of the plain pipelines."""
        return min(self.seconds["inpaint"], self.seconds["KV"]) / self.seconds["Retouch"]

    @property
    def mask(self) -> np.ndarray:
        assert self.edit.mask is not None
        return self.edit.mask

    @property
    def cached(self) -> bool:
        return "document" in self.edited.usage.cache_hits

    def agreement(self, one: str, other: str) -> float:
        """PSNR inside the mask in dB, at most 99."""
        first, second = (self.images[path][self.mask].astype(np.float64) for path in (one, other))
        error = float(((first - second) ** 2).mean())
        return min(99.0, 10 * float(np.log10(255**2 / error))) if error else 99.0


def totals(results: Sequence[Result]) -> tuple[dict[str, float], float]:
    """Seconds of the session by path, and the speed-up against the faster of the plain pipelines."""
    sums = {path: sum(result.seconds[path] for result in results) for path in PATHS}
    return sums, min(sums["inpaint"], sums["KV"]) / sums["Retouch"]


def about(setting: dict[str, Any]) -> str:
    """One phrase on what ran where."""
    threads, steps = (f"{n} {noun}{'s' * (n != 1)}" for n, noun in ((setting["threads"], "thread"), (setting["steps"], "step")))
    return f"{setting['model']}, {setting['dtype']} on {setting['device']}, {threads}, {steps}"


def edit_of(turn: Turn, folder: Path, side: int, steps: int | None) -> Edit:
    """The turn's edit on the photo as it is stored, scaled to `side` and to whole cells."""
    path = folder / f"{turn.photo}.jpg"
    if not path.is_file():
        raise InvalidImage(f"there is no {path}; the demo's photos are in the folder photos/ of the clone: give --photos DIR.")
    photo = picture.read(path).pixels[..., :3]
    height, width = photo.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = [max(CELL, round(length * scale / CELL) * CELL) for length in (width, height)]
    small = np.array(Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS))
    mask = _mask(turn, (size[0] / width, size[1] / height), small.shape[:2])
    return Edit(small, turn.prompt, mask, seed=turn.seed, steps=steps)


def _mask(turn: Turn, scale: tuple[float, float], shape: tuple[int, ...]) -> np.ndarray:
    x0, y0 = turn.place[0] * scale[0], turn.place[1] * scale[1]
    w, h = turn.place[2] * scale[0], turn.place[3] * scale[1]
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    across, down = (x - x0 - w / 2) / (w / 2), (y - y0 - h / 2) / (h / 2)
    inside: np.ndarray = across**2 + down**2 <= 1 if turn.ellipse else np.maximum(abs(across), abs(down)) <= 1
    return inside


def run(engine: Editor, plain: Peer, session: Sequence[tuple[Turn, Edit]], progress: Callable[[str], None]) -> list[Result]:
    """Every turn through every path, one edit at a time, after one throwaway edit of each path.

    A committed result is Retouch's, for all paths, so that all edit the same document. `progress` hears a turn's prompt
    before each of its edits.
    """
    # Mirrored, and with another prompt, so that the session finds neither in a cache.
    first = session[0][1]
    _through_all(engine, plain, replace(first, image=first.image[:, ::-1].copy(), prompt="a star"), progress)
    results: list[Result] = []
    committed: dict[str, tuple[int, np.ndarray]] = {}
    for turn, stored in session:
        source, document = committed.get(turn.photo, (0, stored.image))
        edit = replace(stored, image=document)
        result = Result(turn, source, edit, *_through_all(engine, plain, edit, progress))
        for path, image in result.images.items():
            assert (image[~result.mask] == edit.image[~result.mask]).all(), f"{path} changed pixels outside the mask"
        results.append(result)
        if turn.commit:
            committed[turn.photo] = len(results), result.edited.image
    return results


def _through_all(
    engine: Editor, plain: Peer, edit: Edit, progress: Callable[[str], None]
) -> tuple[Edited, dict[str, np.ndarray], dict[str, float]]:
    """The answer of Retouch, and by path the pictures and the seconds. Pasting is on no pipeline's time."""
    images, seconds = {}, {}
    for path, make in (("inpaint", plain.inpaint), ("KV", plain.kv)):
        progress(edit.prompt)
        started = time.perf_counter()
        whole = make(edit)
        seconds[path] = time.perf_counter() - started
        images[path] = plain.paste(edit, whole)
    progress(edit.prompt)
    started = time.perf_counter()
    (edited,) = engine.edit([edit])
    seconds["Retouch"], images["Retouch"] = time.perf_counter() - started, edited.image
    return edited, images, seconds
