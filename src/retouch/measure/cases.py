"""Edits with known answers: the frozen set in `edits/`, made once by `bench/edit_set.py`, and sets of the same form elsewhere.

A set is a folder: `index.json`, and for each case two lossless WebPs, the document, whose alpha is 0 inside the mask (OpenAI's
convention), and the truth inside the mask's box. Outside of the mask the truth is the document by construction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from retouch import picture
from retouch.boxes import bounds
from retouch.edit import Edit, OutputFailed, RetouchError
from retouch.measure.zones import cut

BUNDLED = Path(__file__).parent / "edits"
INDEX = "index.json"
FORMAT = 1
SAID = ("name", "kind", "prompt", "seed", "concept", "colour", "ground")


class InvalidCases(RetouchError):
    """An edit set cannot be read, or is not of this form."""

    status = 422


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One edit and its answer: `truth` (H, W, 3) uint8, which is the document outside of the mask.

    `kind` is what is asked: "remove on photos", "remove on flat", "insert", "replace", "recolour" in the bundled set. `concept`
    and `colour` are of what is to be there afterwards, where the judge can tell; `ground` names what the document is cut from.
    """

    edit: Edit
    truth: np.ndarray
    kind: str
    name: str
    concept: str = ""
    colour: str = ""
    ground: str = ""

    @property
    def mask(self) -> np.ndarray:
        assert self.edit.mask is not None
        return self.edit.mask


def load(folder: Path = BUNDLED, kinds: Iterable[str] = (), count: int | None = None) -> list[Case]:
    """The cases of a set, of these kinds (all of them). `count`: so many at most, evenly from all. Raises InvalidCases."""
    try:
        told = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise InvalidCases(f"{folder} is an edit set of format {told['format']}; this version reads format {FORMAT}.")
        listed = [{name: entry[name] for name in SAID} for entry in told["cases"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InvalidCases(f"{folder / INDEX} is no index of an edit set ({error!r}); bench/edit_set.py makes one.") from error
    names = [entry["name"] for entry in listed]
    if len(set(names)) < len(names):
        raise InvalidCases(f"{folder / INDEX} has two cases of one name; give each its own.")
    unknown = sorted(set(kinds) - {entry["kind"] for entry in listed})
    if unknown:
        have = ", ".join(dict.fromkeys(str(entry["kind"]) for entry in listed))
        raise InvalidCases(f"there is no kind {', '.join(unknown)} in {folder}; there are {have}.")
    chosen = [entry for entry in listed if not kinds or entry["kind"] in set(kinds)]
    if count is not None and count < len(chosen):
        chosen = [chosen[int(at)] for at in np.linspace(0, len(chosen) - 1, count).round()]
    return [_read(folder, entry) for entry in chosen]


def said(folder: Path) -> str:
    """What rows call a set: its folder's name and a digest of its index, or "bundled". Raises InvalidCases."""
    if folder == BUNDLED:
        return "bundled"
    try:
        digest = hashlib.blake2b((folder / INDEX).read_bytes(), digest_size=4).hexdigest()
    except OSError as error:
        raise InvalidCases(
            f"{folder / INDEX} cannot be read ({error.strerror}); bench/edit_set.py makes an edit set."
        ) from error
    return f"{folder.resolve().name} {digest}"


def _read(folder: Path, entry: dict[str, Any]) -> Case:
    name = str(entry["name"])
    files = [folder / f"{name}{end}.webp" for end in ("", "-truth")]
    try:
        document, patch = (picture.read(file).pixels for file in files)
        if document.shape[2] != 4:
            raise InvalidCases(f"{files[0]} has no alpha; it is to be 0 inside the mask.")
        image, mask = np.ascontiguousarray(document[..., :3]), document[..., 3] == 0
        edit = Edit(image, str(entry["prompt"]), mask, seed=int(entry["seed"]), reuse=False)
        box = bounds(mask)
        inside = cut(mask, box)
        if patch.shape != (*inside.shape, 3):
            raise InvalidCases(f"{files[1]} is {patch.shape[1]} x {patch.shape[0]}, its mask's box another size.")
    except InvalidCases:
        raise
    except (RetouchError, ValueError, TypeError) as error:
        raise InvalidCases(f"case {name} of {folder} cannot be used: {error}") from error
    truth = image.copy()
    cut(truth, box)[inside] = patch[inside]
    about = {field: str(entry[field]) for field in ("concept", "colour", "ground")}
    return Case(edit, truth, str(entry["kind"]), name, **about)


def write(folder: Path, cases: Sequence[Case], about: str = "") -> None:
    """A set that `load` reads. Raises OutputFailed, and InvalidCases where a truth differs outside of its mask."""
    entries = []
    for case in cases:
        if (case.truth != case.edit.image)[~case.mask].any():
            raise InvalidCases(f"the truth of {case.name} differs from its document outside of the mask; enlarge the mask.")
        told = {"prompt": case.edit.prompt, "seed": case.edit.seed}
        entries.append({name: told[name] if name in told else getattr(case, name) for name in SAID})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for case in cases:
            alpha = np.where(case.mask, 0, 255).astype(np.uint8)[..., None]
            _write(folder / f"{case.name}.webp", np.concatenate([case.edit.image[..., :3], alpha], 2))
            box = bounds(case.mask)
            _write(folder / f"{case.name}-truth.webp", np.where(cut(case.mask, box)[..., None], cut(case.truth, box), 0))
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
        index = f'{{"format": {FORMAT}, "about": {json.dumps(about)}, "cases": [\n{lines}\n]}}\n'
        (folder / INDEX).write_text(index, encoding="utf-8")
    except OSError as error:
        raise OutputFailed(f"{folder} cannot be written ({error.strerror or error}); give another folder.") from error


def _write(path: Path, pixels: np.ndarray) -> None:
    """Lossless, and the colours under a transparent pixel too."""
    Image.fromarray(pixels).save(path, "WEBP", lossless=True, exact=True, quality=100, method=6)
