"""All subjects, one after the other, in one run: their rows are on file as soon as each is done."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from retouch import record
from retouch.measure import tally, waterfall
from retouch.measure.kept import Kept
from retouch.measure.load import Answer
from retouch.measure.subjects import AGAIN, LADDER, Subject
from retouch.measure.trial import Course, run
from retouch.record import Record, Scalar

if TYPE_CHECKING:
    from retouch.measure.jury import Jury


log = logging.getLogger(__name__)


@dataclass(slots=True)
class Contest:
    """`kept` takes the rows; `where` and `extra` go with every one, `rate` measures the machine, `earlier` are rows of the same
    run, which goes on. `again`: who was measured while the machine was slowed is measured once more, at the end.
    """

    course: Course
    kept: Kept
    where: Mapping[str, Any]
    extra: Mapping[str, Scalar]
    per_hour: float
    rate: Callable[[], float]
    jury: Jury | None = None
    earlier: Sequence[Record] = ()
    again: bool = True
    rows: list[Record] = field(default_factory=list)

    @property
    def done(self) -> set[str]:
        """Subjects that have figures already."""
        return {str(row.extra.get("subject")) for row in self.earlier if row.name == tally.COST and not row.error}

    async def run(self, subjects: Sequence[Subject]) -> None:
        """Those that are done are left out, but for what quality is judged against."""
        self.rows = list(self.earlier)
        done = self.done
        left = [one for one in subjects if one.name not in done]
        if self.jury is not None and left and LADDER[0].name in done:
            left = [one for one in subjects if one.name == LADDER[0].name] + left
        with _bar(len(self.course.plan.calls)) as bar:
            for number, subject in enumerate(left, 1):
                await self._one(subject, bar, f"{number} of {len(left)}  {subject.name}", load=subject.name not in done)
            slow = self._slowed(subjects)
            for number, subject in enumerate(slow, 1):
                await self._one(subject, bar, f"again {number} of {len(slow)}  {subject.name}", judge=False)
        fall = waterfall.of(tally.counting(self.rows))
        if fall is not None and (left or slow):
            self._keep(waterfall.records(fall, self.where, self.extra))

    def _slowed(self, subjects: Sequence[Subject]) -> list[Subject]:
        """Who is to be measured again, and was not yet."""
        if not self.again:
            return []
        times = Counter(row.extra.get("subject") for row in self.rows if row.name == tally.COST)
        slow = {name: share for name, share in tally.slowed(tally.counting(self.rows)).items() if times[name] == 1}
        found = [one for one in subjects if one.name in slow]
        for one in found:
            log.warning("the machine ran at %.0f %% of its usual rate beside %s: again", 100 * slow[one.name], one.name)
        return found

    async def _one(self, subject: Subject, bar: _Bar, name: str, load: bool = True, judge: bool = True) -> None:
        """Without `load` it has its figures, and is only asked for its pictures."""
        bar.begin(name)
        course = replace(self.course, load=load, warm_up=self.course.warm_up if load else 0)
        before = self.rate()
        started = time.perf_counter()
        if self.jury is not None and judge and subject.role != AGAIN:
            course = self.jury.course(course, subject.concurrency)
        trial = await run(subject, course, bar.heard, bar.said)
        seconds = time.perf_counter() - started
        after = self.rate()
        where = {**self.where, "date": record.now()}
        order = sum(row.name == tally.COST for row in self.rows)
        extra = {**self.extra, "rate_before": before, "rate_after": after, "order": order, "seconds_in_all": seconds}
        made = tally.rows(trial, where, extra, self.per_hour) if load else [tally.asked_again(trial, seconds, where, extra)]
        if self.jury is not None and not trial.error:
            bar.said("judging")
            judged = self.jury.rows(trial, where, {**extra, **tally.of_subject(subject)})
            made += judged if load else []
        self._keep(made)

    def _keep(self, made: Sequence[Record]) -> None:
        self.kept.add(made)
        self.rows += made


class _Bar:
    def __init__(self, bar: Progress, total: int) -> None:
        self._bar, self._total, self._name = bar, total, ""
        self._task = bar.add_task("", total=total, doing="")

    def begin(self, name: str) -> None:
        self._bar.reset(self._task, total=self._total)
        self._name = name

    def said(self, doing: str) -> None:
        self._bar.update(self._task, description=self._name, doing=doing)

    def heard(self, answer: Answer) -> None:
        self._bar.update(self._task, advance=1)


@contextmanager
def _bar(total: int) -> Iterator[_Bar]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[doing]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield _Bar(bar, total)
