"""How good edits are against ground truth, in three zones, and whether a fast path is as good as a plain one.

`answers` asks a target for the pictures of an edit set, `scored` holds them against the truths, `compare` one path's scores
against another's, `records` makes rows of it all, and `sheet` shows the worst pictures.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from retouch import picture
from retouch.edit import InvalidEdit, InvalidImage
from retouch.measure import metrics
from retouch.measure.cases import Case
from retouch.measure.contact import sheet
from retouch.measure.gate import GATED, LOSS, PASS, Bounds, Key, Verdict, decide
from retouch.measure.plan import of_edits
from retouch.measure.targets import Failed, Target
from retouch.measure.zones import zones_of
from retouch.record import Record, Scalar
from retouch.train.cases import main_hue

__all__ = [
    "Answers", "Bounds", "Key", "Scores", "Verdict", "answers", "compare", "judged", "records", "score", "scored", "sheet",
]  # fmt: skip

SUITE = "quality"
Look = Callable[[Case, np.ndarray], tuple[dict[str, float], bool | None]]
"""What needs weights: further metrics of the inside, and whether the asked thing is there (`learned.Learned`)."""


@dataclass(frozen=True, slots=True)
class Scores:
    """One answer against its truth: {metric: value} of each zone, and how many pixels outside of the mask are not the
    document's.

    A mask of the whole picture has no seam and no outside. `right`: whether what was asked for is there, where something can
    tell that (a hue; a concept, where there is a judge).
    """

    inside: Mapping[str, float]
    seam: Mapping[str, float]
    outside: Mapping[str, float]
    changed_outside: int
    right: bool | None = None

    def flat(self) -> dict[str, float]:
        """By "zone metric"."""
        zones = {"inside": self.inside, "seam": self.seam, "outside": self.outside}
        return {f"{zone} {metric}": value for zone, found in zones.items() for metric, value in found.items()}


@dataclass(frozen=True, slots=True)
class Answers:
    """`pictures` (H, W, 3) uint8, and for the rest why there is none."""

    pictures: dict[Key, np.ndarray] = field(default_factory=dict)
    failed: dict[Key, str] = field(default_factory=dict)


def score(case: Case, image: np.ndarray, look: Look | None = None) -> Scores:
    """Of an answer (H, W, 3 or 4) uint8 in the document's size. Raises InvalidImage."""
    shown = _checked(case, image)
    found = metrics.by_zone(case.truth, shown, zones_of(case.mask))
    changed = int((shown != case.edit.image[..., :3]).any(2)[~case.mask].sum())
    right = main_hue(shown, _thing(case)) == case.colour if case.kind == "recolour" else None
    if look is not None:
        more, seen = look(case, shown)
        found["inside"] |= more
        right = seen if right is None else right
    return Scores(found["inside"], found.get("seam", {}), found.get("outside", {}), changed, right)


def _thing(case: Case) -> np.ndarray:
    """Where a recoloured thing lies: what its truth changes."""
    return (case.truth != case.edit.image[..., :3]).any(2)


def scored(
    cases: Sequence[Case], answered: Answers, look: Look | None = None, heard: Callable[[], None] | None = None
) -> dict[Key, Scores]:  # fmt: skip
    """Of every answer there is."""
    by_name = {case.name: case for case in cases}
    found = {}
    for key, image in answered.pictures.items():
        found[key] = score(by_name[key[0]], image, look)
        if heard is not None:
            heard()
    return found


def _checked(case: Case, image: np.ndarray) -> np.ndarray:
    """Without the alpha that a document did not have, if nothing is transparent."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4):
        raise InvalidImage(f"the answer to {case.name} is {image.dtype} {image.shape}; it is to be (height, width, 3) uint8.")
    if image.shape[:2] != case.truth.shape[:2]:
        have, wanted = ("x".join(map(str, shape[1::-1])) for shape in (image.shape, case.truth.shape))
        raise InvalidImage(f"wrong size: the document of {case.name} is {wanted}, the answer's picture {have}")
    if image.shape[2] == 4 and (image[..., 3] != 255).any():
        raise InvalidImage(f"the answer to {case.name} is transparent in places, which its document is not")
    return image[..., :3]


async def answers(
    target: Target, cases: Sequence[Case], seeds: Sequence[int] = (0, 1), clients: int = 1, steps: int | None = None,
    heard: Callable[[], None] | None = None,
) -> Answers:  # fmt: skip
    """What an open target answers to every case with every seed, `clients` at a time, in the order of the cases.

    Seed number k of a case is its own seed plus k: cases do not share their noise. Whatever fails is kept with its reason.
    """
    keys = [(case, seed) for case in cases for seed in seeds]
    plan = of_edits([replace(case.edit, seed=case.edit.seed + seed, steps=steps, reuse=False) for case, seed in keys])
    found, documents = Answers(), dict[str, asyncio.Task[Any]]()
    waiting = iter(zip(keys, plan.calls, strict=True))

    async def client() -> None:
        for (case, seed), call in waiting:
            key = case.name, seed
            try:
                if call.document not in documents:
                    brought = target.document(plan.documents[call.document], call.tenant)
                    documents[call.document] = asyncio.ensure_future(brought)
                served = await target.send(call, target.prepare(call), await documents[call.document])
                found.pictures[key] = _checked(case, _pixels(served.made))
            except Failed as error:
                found.failed[key] = str(error)
            except InvalidEdit as error:
                found.failed[key] = f"no picture: {error}"
            if heard is not None:
                heard()

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


def _pixels(made: Sequence[Any]) -> np.ndarray:
    """Raises InvalidImage."""
    if len(made) != 1:
        raise InvalidImage(f"one was asked for, {len(made)} came")
    return made[0] if isinstance(made[0], np.ndarray) else picture.read(made[0]).pixels


def compare(
    plain: Mapping[Key, Scores], fast: Mapping[Key, Scores], bounds: Bounds | None = None,
    floor: Mapping[str, float] | None = None,
) -> Verdict:  # fmt: skip
    """The fast path held against the plain one, pair by pair; `floor` as in `gate.decide`."""
    changed = {key: one.changed_outside for key, one in fast.items() if one.changed_outside}
    before, after = ({key: one.flat() for key, one in side.items()} for side in (plain, fast))
    return decide(before, after, changed, bounds or Bounds(), floor)


def records(
    name: str, scores: Mapping[Key, Scores], verdict: Verdict | None, where: Mapping[str, Any],
    kinds: Mapping[str, str] | None = None, failed: Mapping[Key, str] | None = None, extra: Mapping[str, Scalar] | None = None,
) -> list[Record]:  # fmt: skip
    """Rows of the path `name`: each metric by zone over all edits and over those of each kind (`kinds`, by case), the pixels
    changed outside, what could not be measured and why, and, with a verdict, the paired losses with bounds and the gate.

    `where` is `record.environment`. A loss's low and high are its confidence bounds, of the others p10 and p90.
    """
    row, rows = _row(name, where, extra), []
    for kind in ("", *dict.fromkeys((kinds or {}).values())):
        chosen = {key: one for key, one in scores.items() if not kind or (kinds or {}).get(key[0]) == kind}
        rows += [row(what, said={"kind": kind}, **spread) for what, spread in _spreads(chosen).items()]
    if scores:
        counts = [one.changed_outside for one in scores.values()]
        said = {"most_pixels": max(counts)}
        rows.append(row("edits changed outside", float(np.count_nonzero(counts)), "1", n=len(counts), said=said))
    else:
        reason = next(iter((failed or {}).values()), "no edit was asked for")
        rows.append(row("inside psnr", None, "dB", n=0, error=f"nothing was answered: {reason}"))
    if failed:
        (case, seed), why = next(iter(failed.items()))
        rows.append(row("failed edits", float(len(failed)), "1", said={"first": f"{case}, seed {seed}: {why}"}))
    rows += [row(f"inside {metric}", None, metrics.UNITS[metric], n=0, error=why) for metric, why in metrics.missing().items()]
    return rows if verdict is None else [*rows, *judged(name, verdict, where, extra)]


def _row(name: str, where: Mapping[str, Any], extra: Mapping[str, Scalar] | None) -> Callable[..., Record]:
    def row(what: str, value: float | None, unit: str, **more: Any) -> Record:
        said = more.pop("said", {})
        return Record(SUITE, what, value, unit, **more, **where, extra={"path": name, **(extra or {}), **said})

    return row


def _spreads(scores: Mapping[Key, Scores]) -> dict[str, dict[str, Any]]:
    """Value (the mean, which is what losses are of), unit, p10, p90 and n by "zone metric"; or why there is no mean."""
    flat = [one.flat() for one in scores.values()]
    found: dict[str, dict[str, Any]] = {}
    for what in dict.fromkeys(name for one in flat for name in one):
        values = [one[what] for one in flat if what in one]
        unit = metrics.UNITS.get(what.split()[-1], "")
        if strange := int((~np.isfinite(values)).sum()):
            error = f"not a number in {strange} of {len(values)} edits"
            found[what] = {"value": None, "unit": unit, "n": 0, "error": error}
            continue
        low, high = (float(np.percentile(values, at)) for at in (10, 90))
        found[what] = {"value": float(np.mean(values)), "unit": unit, "low": low, "high": high, "n": len(values)}
    right = [one.right for one in scores.values() if one.right is not None]
    if right:
        found["what was asked is there"] = {"value": float(np.mean(right)), "unit": "1", "n": len(right)}
    return found


def judged(
    name: str, verdict: Verdict, where: Mapping[str, Any], extra: Mapping[str, Scalar] | None = None
) -> list[Record]:  # fmt: skip
    """Rows of the path `name`: its paired losses with bounds, and the gate."""
    row, rows = _row(name, where, extra), []
    for loss in verdict.losses.values():
        said: dict[str, Scalar] = {"plain": loss.plain, "fast": loss.fast, "limit": loss.limit, "seeds": loss.seeds}
        finite = np.isfinite([loss.low, loss.high]).all()
        interval = {"low": loss.low, "high": loss.high} if finite else {}
        unit = metrics.UNITS.get(loss.name.split()[-1], "")
        rows.append(row(f"{LOSS}{loss.name}", loss.mean, unit, n=loss.n, said=said, **interval))
    worst, why = ", ".join(f"{name} seed {seed}" for name, seed in verdict.worst[:5]), "; ".join(verdict.reasons)
    said = {"verdict": verdict.verdict, "reasons": why, "worst": worst, "unpaired": len(verdict.unpaired)}
    return [*rows, row(GATED, float(verdict.verdict == PASS), "1", said=said)]
