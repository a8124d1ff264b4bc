"""From a Trial to Records: the rows of `retouch bench`. docs/bench.md lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from retouch.measure import summary
from retouch.measure.load import Replay
from retouch.measure.subjects import Subject
from retouch.measure.trial import Point, Trial
from retouch.prices import spent
from retouch.record import Record, Scalar

SUITE = "bench"
COST, UNIT = "dollars per million edits", "$/M"
ASKED_AGAIN = "asked again"
MILLION = 1e6
IDLE = "not on the device"
"""The part of an edit's time in which the device did none of its stages: the server's own work, the client's, waiting."""


def per_million(seconds: float, per_hour: float) -> float:
    """Dollars of a million edits that take `seconds` of the machine each."""
    return spent(seconds * MILLION, per_hour)


def rows(trial: Trial, where: Mapping[str, Any], extra: Mapping[str, Scalar], per_hour: float) -> list[Record]:
    """All but quality. A trial without figures is one row that says why."""
    said = {**extra, **of_subject(trial.subject)}

    def row(name: str, value: float | None, unit: str, n: int = 1, **more: Any) -> Record:
        return Record(SUITE, name, value, unit, n=n, **where, extra={**said, **more.pop("said", {})}, **more)

    replay = trial.replay
    if trial.error or replay is None:
        return [row(COST, None, UNIT, 0, error=trial.error or "nothing was measured", said={"log": trial.log})]
    edits = sum(answer.n for answer in replay.answers)
    made = [
        row(COST, per_million(replay.seconds / edits, per_hour), UNIT, edits),
        row("start", trial.start_seconds, "s"),
        row("warm-up", trial.warm_seconds, "s"),
    ]
    made += [replace(one, suite=SUITE, extra=said) for one in summary.records(replay, where, said)]
    if trial.checked:
        made.append(row("identical outside the mask", trial.exact / trial.checked, "1", trial.checked))
    made += [
        row("dollars by stage", per_million(seconds, per_hour), UNIT, edits, said={"stage": stage})
        for stage, seconds in stages(replay).items()
    ]
    return [*made, *(_point(point, row) for point in trial.points)]


def asked_again(trial: Trial, seconds: float, where: Mapping[str, Any], extra: Mapping[str, Scalar]) -> Record:
    """Of a subject that has its figures, and only answered once more what quality is judged by; or why it did not."""
    said = {**extra, **of_subject(trial.subject), **({"log": trial.log} if trial.error else {})}
    value, n = (None, 0) if trial.error else (seconds, 1)
    return Record(SUITE, ASKED_AGAIN, value, "s", n=n, error=trial.error, **where, extra=said)


def of_subject(subject: Subject) -> dict[str, Scalar]:
    """By which a row is known to be of this subject."""
    return {
        "subject": subject.name, "role": subject.role, "step": subject.step, "clients": subject.concurrency,
        "sends": ",".join(subject.sends),
    }  # fmt: skip


def stages(replay: Replay) -> dict[str, float]:
    """Seconds of the wall clock an edit by what the device did in them, and the rest; nothing where the server does not say.

    Where stages run side by side on one device, their sum may be more than the wall clock; the rest is below 0 then.
    """
    usages = [answer.usage for answer in replay.answers if answer.usage is not None]
    if len(usages) < len(replay.answers) or not usages:
        return {}
    edits = sum(answer.n for answer in replay.answers)
    total: dict[str, float] = {}
    for usage in usages:
        for stage, seconds in usage.seconds.items():
            total[stage] = total.get(stage, 0.0) + seconds / edits
    return {**total, IDLE: replay.seconds / edits - sum(total.values())}


def _point(point: Point, row: Any) -> Record:
    """Of the latency curve: the median, with p10 and p90."""
    seconds = np.array([answer.seconds for answer in point.replay.answers])
    low, middle, high = (float(np.percentile(seconds, at)) for at in (10, 50, 90))
    late = float(np.percentile([answer.late for answer in point.replay.answers], 99))
    said = {"load": point.load, "rate": point.rate, "edits": sum(answer.n for answer in point.replay.answers), "late": late}
    return row("latency at load", middle, "s", len(seconds), low=low, high=high, said=said)


def latest(rows_: Sequence[Record]) -> dict[str, list[Record]]:
    """By mix and then trace, the rows of the last run of each, in the order in which they were measured."""
    last: dict[str, Scalar] = {}
    for row in rows_:
        if "run" in row.extra:
            last[mix_of(row)] = row.extra["run"]
    return {mix: [row for row in rows_ if mix_of(row) == mix and row.extra.get("run") == run] for mix, run in last.items()}


def mix_of(row: Record) -> str:
    return str(row.extra.get("mix", ""))
