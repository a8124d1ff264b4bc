"""One subject, from its start to its end: warmed up, loaded, held to its mask, and judged. Everything by the same client."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from retouch import picture
from retouch.boxes import Size
from retouch.edit import RetouchError
from retouch.measure import summary
from retouch.measure.endpoint import Endpoint
from retouch.measure.load import Heard, Replay, closed_loop, open_loop
from retouch.measure.pictures import another
from retouch.measure.plan import Call, Plan
from retouch.measure.running import Broken, Running
from retouch.measure.subjects import Subject
from retouch.measure.targets import Served, Target

HELD = 512 << 20
"""Bytes of answers that are kept until the clock has stopped, to be held against their documents."""

LEAST = 8
"""Requests of a point of the latency curve at least, where the trace has them; they may not all come at once."""

Judge = Callable[[Target], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Course:
    """What every subject goes through. `warm_up` requests at most go before the clock runs, one for each size of document
    first.

    `loads` are shares of its own saturation at which the open loop is replayed, for about `curve_seconds` each. `judge` asks
    for what quality is judged by; without `load`, that is all. An answer may take `timeout` seconds, a start `patience`.
    """

    plan: Plan
    threads: int
    warm_up: int = 8
    timeout: float = 300.0
    patience: float = 600.0
    loads: tuple[float, ...] = ()
    curve_seconds: float = 60.0
    judge: Judge | None = None
    load: bool = True


@dataclass(frozen=True, slots=True)
class Point:
    """Of the latency curve: at `load` of the saturation, which is `rate` requests a second."""

    load: float
    rate: float
    replay: Replay


@dataclass(slots=True)
class Trial:
    """What came of it. `exact` of `checked` edits were bit for bit the document outside the mask; `quality` is the judge's.

    `error` says why there are no figures, `log` is the end of what the subject printed.
    """

    subject: Subject
    start_seconds: float = 0.0
    warm_seconds: float = 0.0
    replay: Replay | None = None
    exact: int = 0
    checked: int = 0
    points: list[Point] = field(default_factory=list)
    quality: Any = None
    told: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    log: str = ""


async def run(subject: Subject, course: Course, heard: Heard | None = None, said: Callable[[str], None] = print) -> Trial:
    """Never raises what a subject does wrong: that is the trial's error. `said` hears what is going on."""
    trial = Trial(subject)
    running = Running(subject, course.threads, course.patience)
    try:
        said("starting")
        async with running:
            trial.start_seconds = running.start_seconds
            try:
                await _served(trial, running, course, heard, said)
            except RetouchError as error:
                raise Broken(_with_death(str(error), running), running.log()) from error
    except Broken as error:
        trial.error, trial.log = str(error), error.log
    return trial


async def _loaded(trial: Trial, endpoint: Endpoint, course: Course, heard: Heard | None, said: Callable[[str], None]) -> None:
    said("under load")
    watched = Watched(endpoint)
    trial.replay = await closed_loop(watched, course.plan, trial.subject.concurrency, heard)
    whole(trial.replay)
    trial.exact, trial.checked = watched.exact()
    saturation = len(trial.replay.answers) / trial.replay.seconds
    for turn, load in enumerate(course.loads, 2):
        at, rate = f"at {load:.0%} of its saturation", saturation * load
        said(at)
        plan = _lasting(course.plan.renewed(turn), rate, course.curve_seconds)
        own = (len(plan.calls) - 1) / (plan.calls[-1].at - plan.calls[0].at)
        replay = await open_loop(endpoint, plan, rate / own)
        whole(replay, f"{at} ")
        trial.points.append(Point(load, rate, replay))


def _with_death(error: str, running: Running) -> str:
    return f"it died ({running.died}): {error}" if running.died else error


async def _served(trial: Trial, running: Running, course: Course, heard: Heard | None, said: Callable[[str], None]) -> None:
    """Raises Broken."""
    clients = trial.subject.concurrency
    async with Endpoint(running.url, trial.subject.sends, timeout=course.timeout) as endpoint:
        said("warming up")
        started = time.perf_counter()
        whole(await closed_loop(endpoint, warming(course.plan, course.warm_up), clients), "while it warmed up ")
        trial.warm_seconds = time.perf_counter() - started
        if course.load:
            await _loaded(trial, endpoint, course, heard, said)
        if course.judge is not None:
            said("answering what quality is judged by")
            trial.quality = await course.judge(endpoint)
        trial.told = endpoint.told


def whole(replay: Replay, when: str = "") -> None:
    """An answer that fails costs less than one that does not: no figure is made of a replay with such. Raises Broken."""
    failed = [answer for answer in replay.answers if answer.error]
    if failed:
        told = [f"{count} x {cause}" + (f" ({detail})" if detail else "") for cause, count, detail in summary.causes(failed)]
        raise Broken(f"{when}{len(failed)} of {len(replay.answers)} requests were not served: {'; '.join(told)}")


def warming(plan: Plan, most: int) -> Plan:
    """Up to so many requests of one edit each, of other documents and prompts than the plan's: they warm code and no cache.

    One for each size of document comes first, since what is compiled is compiled for a size. A prompt's first letter changes
    its case: other text for a cache, as many tokens for what is compiled.
    """
    alone = [call for call in plan.calls if call.after is None]
    of_size: dict[Size, Call] = {}
    for call in alone:
        of_size.setdefault(call.size, call)
    first = list(of_size.values())
    order = [*first, *(call for call in alone if call not in first)][:most]
    calls = tuple(
        replace(call, number=number, session=str(number), n=1, prompt=_recased(call.prompt), at=0.0)
        for number, call in enumerate(order)
    )
    return Plan(calls, {call.document: another(plan.documents[call.document], 1) for call in order})


def _recased(prompt: str) -> str:
    return prompt[:1].swapcase() + prompt[1:]


def _lasting(plan: Plan, rate: float, seconds: float) -> Plan:
    """The plan's beginning, as much of it as arrives in so many seconds."""
    return replace(plan, calls=plan.calls[: max(LEAST, round(rate * seconds))])


class Watched:
    """A target that keeps what was asked and what came, to be compared when the clock has stopped."""

    def __init__(self, target: Endpoint) -> None:
        self.target, self.name = target, target.name
        self._seen: list[tuple[Call, bytes, Sequence[Any]]] = []
        self._held = 0

    async def __aenter__(self) -> Watched:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def document(self, image: np.ndarray, tenant: str) -> Any:
        return await self.target.document(image, tenant)

    async def kept(self, made: Any, tenant: str) -> Any:
        return await self.target.kept(made, tenant)

    def prepare(self, call: Call) -> Any:
        return self.target.prepare(call)

    async def send(self, call: Call, prepared: Any, document: Any) -> Served:
        served = await self.target.send(call, prepared, document)
        if self._held < HELD:
            self._seen.append((call, document.file, served.made))
            self._held += sum(map(len, served.made))
        return served

    def exact(self) -> tuple[int, int]:
        """How many edits are the document's very pixels outside their mask, of how many that were looked at."""
        exact = checked = 0
        for call, file, made in self._seen:
            mask, before = call.drawn(), picture.read(file).pixels
            for one in made:
                after = picture.read(one).pixels
                checked += 1
                exact += after.shape == before.shape and (mask is None or bool(np.array_equal(after[~mask], before[~mask])))
        return exact, checked
