"""Quality beside cost: every subject answers the same edits, and is held against the truth and against the plain rung."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from retouch.boxes import bounds
from retouch.measure import quality
from retouch.measure.cases import Case
from retouch.measure.gate import LIMITS, Bounds, Key, Verdict, pair_losses
from retouch.measure.quality import Answers, Scores
from retouch.measure.subjects import AGAIN, LADDER
from retouch.measure.tally import SUITE, WORST
from retouch.measure.targets import Target
from retouch.measure.trial import Course, Trial
from retouch.record import Record, Scalar

TILE = 144
SHOWN = 3
AROUND = 0.35
"""Of the mask's longer side, what is shown around it."""


class Jury:
    """`cases` edits, with `seeds` seeds each. All that come later are held against the
    plain rung's answers, which are kept for as long as this is.
    """

    def __init__(self, cases: Sequence[Case], seeds: int) -> None:
        self.cases = cases
        self.seeds = range(seeds)
        self._plain: tuple[Answers, dict[Key, Scores]] | None = None

    def course(self, course: Course, clients: int) -> Course:
        """With these edits to be answered, so many at a time."""

        async def judge(target: Target) -> Answers:
            return await quality.answers(target, self.cases, self.seeds, clients)

        return replace(course, judge=judge)

    def rows(self, trial: Trial, where: Mapping[str, Any], extra: Mapping[str, Scalar]) -> list[Record]:
        """Of a trial that has answered. The first of the plain rung is what the rest is held against; a second measurement of a
        rung is not judged again.
        """
        name, answered = trial.subject.name, trial.quality
        if answered is None or trial.subject.role == AGAIN:
            return []
        scores = quality.scored(self.cases, answered)
        verdict = None
        if name == LADDER[0].name:
            self._plain = answered, scores
        elif self._plain is not None:
            verdict = quality.compare(self._plain[1], scores, Bounds())
        kinds = {case.name: case.kind for case in self.cases}
        made = [
            row
            for row in quality.records(name, scores, verdict, where, kinds, answered.failed, extra)
            if not row.extra.get("kind") or row.name in LIMITS  # of each kind of edit what is gated, of all everything
        ]
        return made + ([] if verdict is None else self._worst(answered, scores, verdict, where, extra))

    def _worst(
        self, answered: Answers, scores: Mapping[Key, Scores], verdict: Verdict, where: Mapping[str, Any],
        extra: Mapping[str, Scalar],
    ) -> list[Record]:  # fmt: skip
        """A row each of the pairs that lose most, with its picture."""
        assert self._plain is not None
        plain, before = self._plain
        flat, own = ({key: one.flat() for key, one in side.items()} for side in (before, scores))
        losses = pair_losses(flat, own, tuple(LIMITS))
        by_name = {case.name: case for case in self.cases}
        made = []
        for key in list(dict.fromkeys(verdict.worst))[:SHOWN]:
            case = by_name[key[0]]
            said: dict[str, Scalar] = {
                "case": key[0], "case_seed": key[1], "case_kind": case.kind, "prompt": case.edit.prompt,
                "picture": strip(case, plain.pictures[key], answered.pictures[key]),
                "lost": ", ".join(f"{name.removeprefix('inside ')} {loss:+.2f}" for name, loss in losses[key].items()),
            }  # fmt: skip
            lost = losses[key].get("inside psnr", 0.0)
            made.append(Record(SUITE, WORST, lost, "dB", **where, extra={**extra, **said}))
        return made


def strip(case: Case, plain: np.ndarray, made: np.ndarray) -> str:
    """Document (paler outside the mask), truth, the plain rung's answer and this one, around the mask; a data URI."""
    pixels = case.edit.image[..., :3]
    paler = np.where(case.mask[..., None], pixels, 0.5 * pixels + 127).astype(np.uint8)
    x0, y0, x1, y1 = _around(case.mask)
    tiles = [Image.fromarray(np.ascontiguousarray(one[y0:y1, x0:x1, :3])) for one in (paler, case.truth, plain, made)]
    page = Image.new("RGB", (len(tiles) * TILE, TILE))
    for place, tile in enumerate(tiles):
        page.paste(tile.resize((TILE, TILE), Image.Resampling.LANCZOS), (place * TILE, 0))
    buffer = io.BytesIO()
    page.save(buffer, "WEBP", quality=80, method=6)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _around(mask: np.ndarray) -> tuple[int, int, int, int]:
    """A square around the mask, inside the picture; the picture's shorter side at most."""
    height, width = mask.shape
    x0, y0, x1, y1 = bounds(mask)
    side = min(height, width, round((1 + 2 * AROUND) * max(x1 - x0, y1 - y0)))
    left, top = (
        int(np.clip((low + high - side) // 2, 0, most - side)) for low, high, most in ((x0, x1, width), (y0, y1, height))
    )
    return left, top, left + side, top + side
