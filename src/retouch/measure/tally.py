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
ASKED_AGAIN, WORST = "asked again", "worst picture"
MILLION = 1e6
STEADY = 0.8
"""Of the machine's usual rate in a run; who had less is measured once more."""

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


def counting(rows_: Sequence[Record]) -> list[Record]:
    """Of one run, without the measurements of a subject that was measured once more: what counts is the one without an error,
    and of two such the one beside which the machine was the faster.
    """
    best: dict[Scalar, tuple[bool, float, Scalar]] = {}
    for row in rows_:
        if row.name == COST:
            name, found = row.extra.get("subject"), (row.value is not None, min(rates(row) or (0.0,)), row.extra.get("order"))
            best[name] = max(best.get(name, found), found, key=lambda one: one[:2])
    return [row for row in rows_ if not _of_load(row) or row.extra.get("order") == best[row.extra["subject"]][2]]


def _of_load(row: Record) -> bool:
    """Whether it is of a subject's own measurement; its answers are judged once."""
    return row.suite == SUITE and "subject" in row.extra and row.name not in (ASKED_AGAIN, WORST)


def rates(row: Record) -> tuple[float, float] | None:
    """FLOP/s of the machine's matrix products, before and after a subject."""
    before, after = row.extra.get("rate_before"), row.extra.get("rate_after")
    return (float(before), float(after)) if isinstance(before, float) and isinstance(after, float) else None


def slowed(rows_: Sequence[Record]) -> dict[str, float]:
    """Of the rows that count: the subjects beside which, before or after, the machine ran below `STEADY` of its usual rate, the
    median; and at which share of it.
    """
    costs = [row for row in rows_ if row.name == COST and row.value is not None]
    found = {str(row.extra.get("subject")): pair for row in costs if (pair := rates(row)) is not None}
    usual = float(np.median(list(found.values()))) if found else 0.0
    return {name: min(pair) / usual for name, pair in found.items() if min(pair) < STEADY * usual}


def latest(rows_: Sequence[Record]) -> dict[str, list[Record]]:
    """By mix and then trace, the rows of the last run of each, in the order in which they were measured."""
    last: dict[str, Scalar] = {}
    for row in rows_:
        if "run" in row.extra:
            last[mix_of(row)] = row.extra["run"]
    return {mix: [row for row in rows_ if mix_of(row) == mix and row.extra.get("run") == run] for mix, run in last.items()}


def mix_of(row: Record) -> str:
    return str(row.extra.get("mix", ""))
