"""Replays a plan against a target: open loop (arrivals wait for no answer), closed loop (so many clients), and the search for
the rate that saturates it.

A request that edits the result of another waits for it, as a person would. What is not served is an answer with its cause; it
ends nothing.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any

from retouch.edit import Usage
from retouch.measure.plan import Call, Plan
from retouch.measure.targets import Failed, Target
from retouch.trace import Result

Heard = Callable[["Answer"], None]
UPLOADS = 8
"""Documents that are brought to the target at once, before the clock runs."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a call. `seconds` from when it was due to its last byte; `late` of these passed before it was sent, which
    is this client's fault. `due` counts from the replay's beginning. `error` is the cause where it was not served.
    """

    number: int
    due: float
    late: float
    seconds: float
    n: int
    deadline: float | None
    error: str = ""
    detail: str = ""
    status: int = 0
    bytes: int = 0
    usage: Usage | None = None

    def good(self, deadline: float | None) -> bool:
        """Served, and in time by its own deadline or else by this one."""
        limit = self.deadline if self.deadline is not None else deadline
        return not self.error and (limit is None or self.seconds <= limit)


@dataclass(frozen=True, slots=True)
class Replay:
    """All answers in the order in which they came, and the seconds from the first call to the last answer."""

    answers: tuple[Answer, ...]
    seconds: float


async def open_loop(target: Target, plan: Plan, speed: float = 1.0, heard: Heard | None = None) -> Replay:
    """Each call at its time, `speed` times as fast, whatever has been answered by then."""
    course = await _Course.prepared(target, plan, heard)
    first = plan.calls[0].at if plan.calls else 0.0
    tasks = []
    course.begun = time.perf_counter()
    for call in plan.calls:
        due = course.begun + (call.at - first) / speed
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(course.ask(call, due)))
    await _all(tasks)
    return course.replay()


async def closed_loop(target: Target, plan: Plan, clients: int, heard: Heard | None = None, rounds: int = 1) -> Replay:
    """So many clients, each with a session at a time, sending its next call when the last is answered."""
    course = await _Course.prepared(target, plan, heard)
    waiting = chain.from_iterable(repeat(plan.sessions(), rounds))

    async def client() -> None:
        for session in waiting:
            for call in session:
                await course.ask(call, None)

    course.begun = time.perf_counter()
    await _all([asyncio.create_task(client()) for _ in range(clients)])
    return course.replay()


async def _all(tasks: Sequence[asyncio.Task[None]]) -> None:
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


class _Course:
    """One replay on its way."""

    def __init__(self, target: Target, plan: Plan, heard: Heard | None) -> None:
        self.target, self.heard, self.begun = target, heard, 0.0
        self.ready = {call: target.prepare(call) for call in plan.calls}
        self.documents: dict[tuple[str, str], Any] = {}
        self.results: dict[Result, asyncio.Future[Any]] = {
            call.after: asyncio.get_running_loop().create_future() for call in plan.calls if call.after is not None
        }
        self.answers: list[Answer] = []

    @classmethod
    async def prepared(cls, target: Target, plan: Plan, heard: Heard | None) -> _Course:
        """With all that can be done before the clock runs: masks are drawn, documents are at the target."""
        course = cls(target, plan, heard)
        gate = asyncio.Semaphore(UPLOADS)

        async def bring(name: str, tenant: str) -> None:
            async with gate:
                course.documents[name, tenant] = await _or_failed(target.document(plan.documents[name], tenant))

        needed = dict.fromkeys((call.document, call.tenant) for call in plan.calls if call.after is None)
        await asyncio.gather(*(bring(*key) for key in needed))
        return course

    async def ask(self, call: Call, due: float | None) -> None:
        """`due` None: as soon as may be."""
        document = self.documents[call.document, call.tenant] if call.after is None else await self.results[call.after]
        now = time.perf_counter()
        due = now if due is None else due if call.after is None else max(due, now)
        answer = Answer(call.number, due - self.begun, now - due, 0.0, call.n, call.deadline)
        made: Sequence[Any] | Failed
        try:
            if isinstance(document, Failed):
                raise Failed(document.cause, document.detail, document.status)
            served = await self.target.send(call, self.ready[call], document)
            made, seconds = served.made, served.ended - due
            answer = replace(answer, seconds=seconds, status=served.status, bytes=served.bytes, usage=served.usage)
        except Failed as error:
            made, seconds = error, error.ended - due
            answer = replace(answer, seconds=seconds, error=error.cause, detail=error.detail, status=error.status)
        self.answers.append(answer)
        if self.heard is not None:
            self.heard(answer)
        await self._keep(call, made)

    async def _keep(self, call: Call, made: Sequence[Any] | Failed) -> None:
        """What later calls edit is brought back to the target at once, as an application would while its user looks at it."""
        for variation in range(call.n):
            waited_for = self.results.get(Result(call.number, variation))
            if waited_for is None or waited_for.done():
                continue
            if isinstance(made, Failed):
                waited_for.set_result(Failed("its document failed", f"request {call.number}, whose result it edits: {made}"))
            else:
                waited_for.set_result(await _or_failed(self.target.kept(made[variation], call.tenant)))

    def replay(self) -> Replay:
        return Replay(tuple(self.answers), time.perf_counter() - self.begun)


async def _or_failed(document: Awaitable[Any]) -> Any:
    try:
        return await document
    except Failed as error:
        return error


@dataclass(frozen=True, slots=True)
class Probe:
    """At `rate` requests a second, `good` of them were served in time."""

    rate: float
    good: float


@dataclass(frozen=True, slots=True)
class Saturation:
    """`held` is the highest rate at which enough were served in time, `failed` the lowest at which not; None: none was seen."""

    held: float | None
    failed: float | None
    probes: tuple[Probe, ...]


async def saturation(
    probe: Callable[[float], Awaitable[float]], share: float, start: float, most: float = math.inf, precision: float = 1.1,
    probes: int = 12,
) -> Saturation:  # fmt: skip
    """Doubles or halves the rate from `start` until `share` of the requests is no longer, or again, served in time, then
    bisects to `precision`. No rate above `most` is tried, where the plan would be too short to tell.
    """
    seen: list[Probe] = []
    held: float | None = None
    failed: float | None = None
    rate = min(start, most)
    while len(seen) < probes:
        seen.append(Probe(rate, await probe(rate)))
        if seen[-1].good >= share:
            held = rate
        else:
            failed = rate
        if held is not None and failed is not None:
            if failed <= held * precision:
                break
            rate = math.sqrt(held * failed)
        elif held is not None:
            if rate >= most:
                break
            rate = min(2 * rate, most)
        else:
            rate /= 2
    return Saturation(held, failed, tuple(seen))
