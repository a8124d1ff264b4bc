"""Who steps next, and when an edit would be done. Pure Python: no model, no clock but the test's own."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retouch.engine.scheduler import (
    POLICIES,
    EarliestDeadline,
    FairShare,
    FirstCome,
    Policy,
    Priority,
    StepClock,
    Ticket,
    finish_time,
    fitting,
)


def ticket(
    arrived: float = 0.0, tokens: int = 100, steps: int = 4, tenant: str = "", priority: int = 0, deadline: float | None = None
) -> Ticket:
    return Ticket(tenant, priority, arrived, deadline, tokens, steps)


def pick(tickets: list[Ticket], policy: Policy, budget: int, now: float) -> list[Ticket]:
    """One step as the engine's loop takes it."""
    chosen = fitting(policy.order(tickets, now), budget)
    policy.charge(chosen)
    return chosen


def run(tickets: list[Ticket], policy: Policy, budget: int, seconds: float = 1.0) -> dict[int, float]:
    """Step until all are done; returns when each of them (by its index) was. Tickets join when they arrive."""
    now, done, steps = 0.0, {}, [one.steps for one in tickets]
    while len(done) < len(tickets):
        here = [t for i, t in enumerate(tickets) if i not in done and t.arrived <= now]
        chosen = pick(here, policy, budget, now) if here else []
        now += seconds
        for one in chosen:
            one.steps -= 1
            if one.steps == 0:
                done[tickets.index(one)] = now
    for one, count in zip(tickets, steps, strict=True):
        one.steps = count
    return done


tickets = st.lists(
    st.builds(
        ticket, arrived=st.floats(0, 20), tokens=st.integers(1, 500), steps=st.integers(1, 5), tenant=st.sampled_from("abc"),
        priority=st.integers(-3, 3), deadline=st.none() | st.floats(1, 100),
    ),
    min_size=1, max_size=12,
)  # fmt: skip


@pytest.mark.parametrize("name", list(POLICIES))
@given(waiting=tickets, budget=st.integers(1, 600))
def test_a_step_keeps_its_budget_and_is_never_empty(name: str, waiting: list[Ticket], budget: int) -> None:
    policy = POLICIES[name]()
    ordered = policy.order(waiting, 20.0)
    assert sorted(map(id, ordered)) == sorted(map(id, waiting))
    chosen = pick(waiting, policy, budget, 20.0)
    assert chosen
    assert len({id(t) for t in chosen}) == len(chosen)
    assert len(chosen) == 1 or sum(t.tokens for t in chosen) <= budget
    assert chosen[0] is ordered[0]


@pytest.mark.parametrize("name", list(POLICIES))
@given(waiting=tickets, budget=st.integers(1, 600))
def test_every_edit_is_done_in_the_end(name: str, waiting: list[Ticket], budget: int) -> None:
    done = run(waiting, POLICIES[name](), budget)
    assert len(done) == len(waiting)


def test_first_come_first_served() -> None:
    done = run([ticket(0), ticket(0.5), ticket(0.7)], FirstCome(), budget=100)
    assert list(done) == [0, 1, 2]


def test_a_small_edit_fills_what_a_large_one_leaves() -> None:
    chosen = pick([ticket(0, 80), ticket(1, 50), ticket(2, 20)], FirstCome(), 100, 3.0)
    assert [t.tokens for t in chosen] == [80, 20]


def test_an_edit_larger_than_the_budget_steps_alone() -> None:
    assert [t.tokens for t in pick([ticket(0, 900), ticket(1, 5)], FirstCome(), 100, 2.0)] == [900]


def test_priority_goes_first_and_waiting_makes_up_for_it() -> None:
    low, high = ticket(0.0, priority=0), ticket(1.0, priority=2)
    assert Priority(ageing=10).order([low, high], 1.0) == [high, low]
    late = ticket(40.0, priority=2)
    assert Priority(ageing=10).order([low, late], 40.0) == [low, late]


def test_priority_starves_nobody() -> None:
    flood = [ticket(float(second), priority=5, steps=1) for second in range(200)]
    waiting = ticket(0.5, priority=0, steps=1)
    assert run([*flood, waiting], Priority(ageing=10), budget=100)[200] < 60


def test_the_nearest_deadline_goes_first() -> None:
    none, late, soon = ticket(0), ticket(1, deadline=50), ticket(2, deadline=9)
    assert EarliestDeadline().order([none, late, soon], 3.0) == [soon, late, none]


def test_earliest_deadline_meets_what_first_come_misses() -> None:
    waiting = [ticket(0, deadline=None), ticket(0.1, deadline=20), ticket(0.2, deadline=4.5)]
    assert run(waiting, FirstCome(), budget=100)[2] > 4.5
    assert run(waiting, EarliestDeadline(), budget=100)[2] <= 5.0


def test_a_flood_of_one_tenant_leaves_the_other_its_half() -> None:
    flood = [ticket(0.0, tenant="flood", steps=1) for _ in range(50)]
    quiet = [ticket(0.5, tenant="quiet", steps=1) for _ in range(10)]
    assert max(list(run([*flood, *quiet], FirstCome(), 100).values())[-10:]) > 50
    done = run([*flood, *quiet], FairShare(), 100)
    assert max(done[index] for index in range(50, 60)) <= 22


def test_shares_follow_the_weights() -> None:
    policy = FairShare(weights={"a": 3.0, "b": 1.0})
    waiting = [ticket(0.0, tenant=name, steps=1000) for name in "ab"]
    stepped = [pick(waiting, policy, 100, float(now))[0].tenant for now in range(400)]
    assert stepped.count("a") == pytest.approx(300, abs=2)


def back_after(pause: int, tokens: int = 10, steps: int = 4) -> list[str]:
    """Who steps when a tenant comes back, with edit after edit, to one that was alone for so many steps."""
    policy = FairShare()
    busy, back = ticket(0.0, tokens, 10_000, "busy"), ticket(1.0, tokens, steps, "back")
    busy.steps = steps  # each tenant's next edit comes when its last is done
    for now in range(pause):
        pick([busy], policy, tokens, float(now))
    return [pick([busy, back], policy, tokens, float(pause + now))[0].tenant for now in range(60)]


@pytest.mark.parametrize("pause", [100, 10_000])
def test_a_pause_is_worth_four_edits_however_long_it_was(pause: int) -> None:
    stepped = back_after(pause)
    assert stepped[:16] == ["back"] * 16, "four edits of four steps"
    assert stepped[16:].count("back") == pytest.approx(22, abs=1)


def test_who_was_gone_for_a_moment_is_behind_by_that_moment() -> None:
    assert back_after(3)[:7].count("back") == pytest.approx(5, abs=1)


def test_a_newcomer_is_not_years_ahead_of_who_was_served_before() -> None:
    """However much a tenant was served until everybody left: beside who comes first after that it waits for four edits."""
    policy = FairShare()
    old, new = ticket(0.0, 10, 4, "old"), ticket(1.0, 10, 4, "new")
    for now in range(10_000):
        pick([old], policy, 10, float(now))
    policy.order([], 10_000.0)
    for now in range(3):
        pick([new], policy, 10, 10_001.0 + now)
    stepped = [pick([old, new], policy, 10, 10_010.0 + now)[0].tenant for now in range(60)]
    assert stepped[:13] == ["new"] * 13, "four edits of four steps, three of which were done"
    assert stepped[13:].count("old") == pytest.approx(23, abs=1)


def test_a_tenant_is_owed_as_long_as_it_is_clearly_behind() -> None:
    policy = FairShare()
    flood = [ticket(0.0, 10, 4, "flood") for _ in range(5)]
    for now in range(50):
        pick(flood, policy, 20, float(now))
    assert policy.owed(policy.order(flood, 50.0)) == [], "nobody but itself is there"
    calm = ticket(50.0, 10, 4, "calm")
    order = policy.order([*flood, calm], 50.0)
    assert order[0] is calm
    assert policy.owed(order) == [calm]
    for now in range(40):
        pick([*flood, calm], policy, 10, 51.0 + now)
    assert policy.owed(policy.order([*flood, calm], 100.0)) == [], "by then they take turns"


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "fair"])
def test_no_other_policy_owes_anything(name: str) -> None:
    policy = POLICIES[name]()
    waiting = [ticket(tenant="a", priority=3), ticket(1.0, tenant="b", deadline=2.0)]
    policy.charge(waiting)
    assert policy.owed(policy.order(waiting, 2.0)) == []


def test_asking_when_an_edit_would_be_done_changes_nothing() -> None:
    policy = FairShare()
    pick([ticket(tenant="a")], policy, 100, 0.0)
    before = (dict(policy.served), policy.present)
    finish_time(ticket(tenant="b"), [ticket(tenant="a")], policy, 100, StepClock(), 0.0)
    assert (policy.served, policy.present) == before


def test_the_clock_finds_the_line_through_its_steps() -> None:
    clock = StepClock()
    assert clock.seconds(100) == 0
    clock.observe(100, 0.5)
    assert clock.seconds(200) == pytest.approx(1.0)
    for tokens in (50, 100, 400, 800, 120):
        clock.observe(tokens, 0.1 + 0.001 * tokens)
    for _ in range(300):
        clock.observe(100, 0.2)
        clock.observe(500, 0.6)
    fixed, each = clock.line
    assert fixed == pytest.approx(0.1, rel=0.01)
    assert each == pytest.approx(0.001, rel=0.01)


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(1e-4, 10)), max_size=30))
def test_the_clock_is_never_negative(steps: list[tuple[int, float]]) -> None:
    clock = StepClock()
    for tokens, seconds in steps:
        clock.observe(tokens, seconds)
    fixed, each = clock.line
    assert fixed >= 0
    assert each >= 0
    assert math.isfinite(fixed + each)
    assert clock.budget() >= 256


@pytest.mark.parametrize(("fixed", "room"), [(0.0, 125), (0.01, 375), (1.0, 25_125)])
def test_the_room_beside_an_edit_is_what_its_step_has_to_spare(fixed: float, room: int) -> None:
    clock = StepClock()
    assert clock.room(100) == 100, "nothing is known yet"
    for tokens in (100, 200, 400):
        clock.observe(tokens, fixed + 1e-5 * tokens)
    assert clock.room(100) == pytest.approx(room, abs=1)
    assert clock.seconds(clock.room(100)) <= 1.25 * clock.seconds(100) + 1e-9


def test_where_all_steps_are_alike_there_is_room_for_twice_as_much() -> None:
    """Else one size alone would be seen for ever, and nothing learned of what packing brings."""
    clock = StepClock()
    for _ in range(2000):
        clock.observe(300, 0.05)
    assert clock.budget() == 600
    for _ in range(50):
        clock.observe(600, 0.08)
    assert clock.budget(efficiency=0.9) == pytest.approx(1800, rel=0.05)
    slow = StepClock()
    slow.observe(3000, 1.0)
    assert slow.budget(longest=0.5) == 1500


def test_the_budget_buys_efficiency_within_the_longest_step() -> None:
    clock = StepClock()
    for tokens in (100, 200, 400, 800):
        clock.observe(tokens, 0.02 + 0.0001 * tokens)
    assert clock.budget(efficiency=0.9) == pytest.approx(1800, rel=0.01)
    assert clock.budget(efficiency=0.9, longest=0.1) == pytest.approx(800, rel=0.01)


@given(waiting=tickets)
def test_the_estimate_of_an_edit_alone_is_exact(waiting: list[Ticket]) -> None:
    clock = StepClock()
    for tokens in (10, 1000):
        clock.observe(tokens, 0.01 + 0.001 * tokens)
    one = waiting[0]
    expected = one.steps * clock.seconds(one.tokens)
    assert finish_time(one, [], FirstCome(), 600, clock, 0.0) == pytest.approx(expected)


def test_the_estimate_counts_who_comes_before() -> None:
    clock = StepClock()
    for tokens in (100, 200):
        clock.observe(tokens, 0.01 * tokens)
    crowd = [ticket(float(i)) for i in range(5)]
    late = ticket(9.0)
    estimate = finish_time(late, crowd, FirstCome(), 100, clock, 0.0)
    assert estimate == pytest.approx(24.0)
    assert finish_time(late, [], FirstCome(), 100, clock, 0.0) == pytest.approx(4.0)


def off_the_steps(waiting: list[Ticket]) -> float:
    """A second for each, and ten for each tenant among them: what they share is made once."""
    return len(waiting) + 10.0 * len({one.tenant for one in waiting})


@pytest.mark.parametrize(("beside", "seconds"), [(0, 24 + 25 + 11), (1, 25 + 11), (2, 24 + 11), (5, 24 + 11)])
def test_the_estimate_counts_what_those_before_take_apart_from_their_steps(beside: int, seconds: float) -> None:
    """In turn with the steps; with threads beside them, whichever takes longer."""
    clock = StepClock()
    for tokens in (100, 200):
        clock.observe(tokens, 0.01 * tokens)
    crowd, late = [ticket(float(i), tenant="ab"[i % 2]) for i in range(5)], ticket(9.0, tenant="c")
    after = ticket(10.0, tenant="d")

    def estimate(one: Ticket) -> float:
        return finish_time(one, [*crowd, after], FirstCome(), 100, clock, 0.0, off_the_steps, beside)

    assert estimate(late) == pytest.approx(seconds)
    late.tenant = "a"
    assert estimate(late) == pytest.approx(seconds - 10), "it shares what is made already"


def test_the_estimate_counts_those_that_are_being_finished_wherever_they_stand() -> None:
    done, one = ticket(1.0, steps=0), ticket(0.0)
    assert finish_time(one, [done], FirstCome(), 100, StepClock(), 0.0, len) == 2.0
    assert finish_time(done, [one], FirstCome(), 100, StepClock(), 0.0, len) == 1.0
