"""Which jobs step next: policies over tickets, a budget in tokens, and the clock that knows what a step costs. No torch.

A ticket is what a policy may know of an edit. Policies only order tickets; a step is filled from that order, so a running job
that a more urgent one displaces simply waits a step: its state lies on the Job.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar


@dataclass(slots=True, eq=False)
class Ticket:
    """An admitted edit. Times are seconds on one monotonic clock.

    `tokens` are what one of its steps computes, `steps` how many are left. `deadline` is a time, not a span.
    """

    tenant: str
    priority: int
    arrived: float
    deadline: float | None
    tokens: int
    steps: int

    @property
    def work(self) -> int:
        """Tokens that are still to be computed."""
        return self.tokens * self.steps


T = TypeVar("T", bound=Ticket)


class Policy:
    """An order of urgency. Most keep nothing; one that does is told by `charge` what was served."""

    def order(self, tickets: Sequence[T], now: float) -> list[T]:
        """The same tickets, most urgent first."""
        raise NotImplementedError

    def owed(self, order: Sequence[T]) -> list[T]:
        """Of tickets in this policy's order, those that everything else gives way to: nothing is put beside them that makes
        their step longer, and nobody else is encoded or finished before they are done.
        """
        return []

    def charge(self, tickets: Sequence[Ticket]) -> None:
        """These have been stepped once."""

    def copy(self) -> Policy:
        """One that may be asked what would come without its changing."""
        return self


class FirstCome(Policy):
    def order(self, tickets: Sequence[T], now: float) -> list[T]:
        return sorted(tickets, key=lambda ticket: ticket.arrived)


@dataclass(frozen=True, slots=True)
class Priority(Policy):
    """Higher priorities first; waiting `ageing` seconds is worth one, so that nothing waits for ever."""

    ageing: float = 10.0

    def order(self, tickets: Sequence[T], now: float) -> list[T]:
        return sorted(tickets, key=lambda t: (-(t.priority + (now - t.arrived) / self.ageing), t.arrived))


class EarliestDeadline(Policy):
    """Those without a deadline come last, in the order of their arrival."""

    def order(self, tickets: Sequence[T], now: float) -> list[T]:
        return sorted(tickets, key=lambda ticket: (math.inf if ticket.deadline is None else ticket.deadline, ticket.arrived))


@dataclass(slots=True)
class FairShare(Policy):
    """The tenant that has been served the fewest tokens, for its weight, comes first.

    A tenant that comes back after a pause, and has been served less than those who are there, comes back that much behind
    them, but by no more than the work of `credit` typical edits: it does not wait behind a flood, and whoever floods waits for
    so many edits at most, however long the pause was. As long as a tenant is clearly behind, it is owed.
    Source: the virtual token counter of https://arxiv.org/abs/2401.00588, over denoised tokens, with the bounded warp of
    borrowed virtual time, https://doi.org/10.1145/319151.319169.
    """

    weights: dict[str, float] = field(default_factory=dict)
    credit: float = 4.0
    served: dict[str, float] = field(default_factory=dict)
    present: frozenset[str] = frozenset()

    def order(self, tickets: Sequence[T], now: float) -> list[T]:
        self._greet(tickets)
        # One after the other, each as if those before it had been served: one tenant's tickets do not all come first.
        served = {tenant: self.served[tenant] for tenant in self.present}
        queues: dict[str, list[T]] = {tenant: [] for tenant in self.present}
        for ticket in sorted(tickets, key=lambda ticket: -ticket.arrived):
            queues[ticket.tenant].append(ticket)
        order: list[T] = []
        while len(order) < len(tickets):
            tenant = min((t for t in queues if queues[t]), key=lambda t: (served[t], queues[t][-1].arrived))
            ticket = queues[tenant].pop()
            served[tenant] += self._cost(ticket)
            order.append(ticket)
        return order

    def owed(self, order: Sequence[T]) -> list[T]:
        """Those of tenants who are further behind the one served most than taking turns brings about."""
        most = max((self.served[ticket.tenant] for ticket in order), default=0.0)
        turns = 2 * max(map(self._cost, order), default=0.0)
        return [ticket for ticket in order if most - self.served[ticket.tenant] > turns]

    def _greet(self, tickets: Sequence[Ticket]) -> None:
        present = frozenset(ticket.tenant for ticket in tickets)
        stayed = [self.served[tenant] for tenant in present & self.present]
        base = min(stayed, default=max(self.served.values(), default=0.0))  # a newcomer's 0 would be years behind
        for tenant in present - self.present:
            work = sum(ticket.steps * self._cost(ticket) for ticket in tickets) / len(tickets)
            self.served[tenant] = max(self.served.get(tenant, 0.0), base - self.credit * work)
        self.present = present

    def _cost(self, ticket: Ticket) -> float:
        return ticket.tokens / self.weights.get(ticket.tenant, 1.0)

    def charge(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            self.served[ticket.tenant] += self._cost(ticket)

    def copy(self) -> FairShare:
        return replace(self, served=dict(self.served))


POLICIES: dict[str, Callable[[], Policy]] = {
    "first-come": FirstCome,
    "priority": Priority,
    "deadline": EarliestDeadline,
    "fair": FairShare,
}
"""Value of the option -> a policy of one's own."""


def fitting(order: Sequence[T], budget: int) -> list[T]:
    """Of tickets in order of urgency, as many as fit into `budget` tokens, and at least one.

    One that does not fit is passed over, not waited for; the first is always in, so a large edit is never starved.
    """
    chosen: list[T] = []
    left = budget
    for ticket in order:
        if not chosen or ticket.tokens <= left:
            chosen.append(ticket)
            left -= ticket.tokens
    return chosen


@dataclass(slots=True)
class StepClock:
    """Seconds of a step as `fixed + each * tokens`, fitted to the steps that were measured, the recent ones most.

    Until there are two sizes to fit, all of a step's time counts as each token's.
    """

    memory: float = 0.98
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)

    def observe(self, tokens: int, seconds: float) -> None:
        self._sums = [
            self.memory * total + new
            for total, new in zip(self._sums, (1.0, tokens, tokens**2, seconds, seconds * tokens), strict=True)
        ]

    @property
    def _spread(self) -> float:
        """Of the sizes; 0 where all are alike."""
        n, x, xx = self._sums[:3]
        spread = n * xx - x * x
        return spread if spread >= 1e-6 * n * xx else 0.0

    @property
    def line(self) -> tuple[float, float]:
        """(fixed, each): seconds of any step, and seconds of each token in it; never negative."""
        n, x, xx, y, xy = self._sums
        if not x:
            return 0.0, 0.0
        spread = self._spread
        if not spread:
            return 0.0, y / x
        each = max(0.0, (n * xy - x * y) / spread)
        fixed = (y - each * x) / n
        return (fixed, each) if fixed > 0 else (0.0, xy / xx)

    def seconds(self, tokens: int) -> float:
        fixed, each = self.line
        return fixed + each * tokens

    def room(self, tokens: int, longer: float = 1.25) -> int:
        """Tokens of a step that takes at most `longer` times as long as one of `tokens`."""
        fixed, each = self.line
        return int(longer * tokens + (longer - 1) * fixed / each) if each else tokens

    def budget(self, efficiency: float = 0.9, longest: float = 0.5, least: int = 256, most: int = 65_536) -> int:
        """Tokens a step at which its fixed cost is down to 1 - `efficiency` of it, but no step above `longest` seconds.

        Where steps of one size alone were seen there is room for twice as much, so that another size is tried.
        """
        fixed, each = self.line
        if not each:
            return least
        n, x = self._sums[:2]
        wanted = efficiency / (1 - efficiency) * fixed / each if self._spread else 2 * x / n
        return int(min(max(wanted, least), max((longest - fixed) / each, least), most))


def finish_time(
    ticket: T, others: Sequence[T], policy: Policy, budget: int, clock: StepClock, now: float,
    aside: Callable[[Sequence[T]], float] = lambda tickets: 0.0, beside: int = 0,
) -> float:  # fmt: skip
    """When `ticket` would be done, were nobody else to come: what an admission is decided by.

    All before it by `policy` share the steps with it; those after it only fill what is left, which costs it no more than the
    step's own growth. `aside` says how many seconds some tickets still take together apart from their steps. With nothing
    `beside` the steps, what those ahead take comes in turn with them, and adds to them. Else so many threads do it while the
    loop steps, and whichever takes longer is waited for. `ticket`'s own comes on top either way. What those after it take is
    left out, though who joins its first step is encoded before that.
    """
    order = policy.copy().order([*others, ticket], now)
    place = next(index for index, other in enumerate(order) if other is ticket)
    ahead = order[:place] if ticket.steps else []
    work = sum(other.work for other in ahead) + ticket.work
    steps = max(ticket.steps, math.ceil(work / max(budget, ticket.tokens)))
    load = min(max(budget, ticket.tokens), math.ceil(work / max(1, steps)))
    stepping = steps * clock.seconds(load)
    ahead += [other for other in order[place + 1 :] if not other.steps]  # they are being finished, whatever their place
    waited = aside(ahead)
    own = aside([*ahead, ticket]) - waited
    return now + own + (max(stepping, waited / beside) if beside else stepping + waited)
