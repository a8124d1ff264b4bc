"""The sweep of the reuse knobs (`bench/reuse.py`): its traces, and its rows of figures that are known."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import reuse


@pytest.mark.parametrize("mix", reuse.POINTS)
def test_each_setting_turns_what_it_says(mix: str) -> None:
    points = reuse.points([mix], 1, 6)
    assert len({point.knobs for point in points}) == len(points) == len(reuse.POINTS[mix])
    assert all(len(point.plan.calls) == 6 for point in points)
    assert "as it is" in {point.knobs for point in points}


def test_more_documents_are_more_pictures_to_encode() -> None:
    few, many = (point for point in reuse.points(["template"], 1, 24) if point.knobs in ("documents=4", "documents=16"))
    assert len(few.plan.documents) <= 4 < len(many.plan.documents)


def test_what_is_saved_is_of_the_seconds_without_caches() -> None:
    (point, *_) = reuse.points(["personal"], 1, 2)
    point.seconds = {reuse.KEPT: [0.2, 0.3, 0.4], reuse.BARE: [0.5, 0.6, 0.7]}
    point.documents, point.prompts = 0.5, 0.25
    assert point.saved == pytest.approx(0.5)
    rows = {(row.name, row.extra.get("caches")): row for row in reuse.rows_of([point], {"device": "x"}, {})}
    assert rows["device seconds an edit", reuse.KEPT].value == pytest.approx(0.3)
    assert rows["saved by what is kept", None].value == pytest.approx(0.5)
    assert rows["edits that found their prompt encoded", None].value == 0.25
    assert all(row.n == 6 for row in rows.values())
