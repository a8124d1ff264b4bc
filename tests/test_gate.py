"""The gate: a pass, a fail, or undecided, as the statistics say."""

import math

import numpy as np
import pytest

from judged import losses_of, pairs
from retouch.edit import InvalidOption
from retouch.measure import gate
from retouch.measure.gate import FAIL, PASS, UNDECIDED, Bounds, pair_losses
from retouch.measure.quality import Scores, compare, records


@pytest.mark.parametrize(
    ("mean", "spread", "verdict"),
    [(0.0, 0.3, PASS), (-2.0, 1.0, PASS), (0.45, 1.0, UNDECIDED), (0.7, 1.5, UNDECIDED), (1.5, 0.5, FAIL)],
)
def test_the_gate_has_three_answers(mean, spread, verdict):
    found = compare(*pairs(losses_of(mean, spread)))
    assert found.verdict == verdict, found.reasons
    assert (verdict == PASS) == (not found.reasons)
    loss = found.losses["inside psnr"]
    assert loss.low < loss.mean < loss.high
    assert loss.mean == pytest.approx(mean)
    assert (loss.n, loss.seeds) == (40, 2)


def test_too_few_cases_or_seeds_are_never_a_pass():
    assert compare(*pairs(losses_of(-5, 0.1, n=8))).verdict == UNDECIDED
    assert compare(*pairs(losses_of(-5, 0.1), seeds=1)).verdict == UNDECIDED
    assert compare({}, {}).verdict == UNDECIDED
    assert compare(*pairs([0.0])).losses["inside psnr"].high == math.inf
    assert compare(*pairs(losses_of(9, 0.1, n=8))).verdict == UNDECIDED


def test_one_changed_pixel_outside_fails_however_few_they_are():
    plain, fast = pairs([0.0, 0.0])
    fast["case 1", 0] = Scores(fast["case 1", 0].inside, {}, {}, 1)
    found = compare(plain, fast)
    assert found.verdict == FAIL
    assert "case 1, seed 0" in found.reasons[0]
    assert found.worst[0] == ("case 1", 0)


def test_an_edit_that_one_path_did_not_answer_is_not_left_out_silently():
    plain, fast = pairs(losses_of(-1, 0.1))
    del fast["case 3", 1]
    found = compare(plain, fast)
    assert found.verdict == UNDECIDED
    assert found.unpaired == (("case 3", 1),)


def test_a_gated_metric_that_was_not_measured_decides_nothing():
    plain, fast = pairs(losses_of(-1, 0.1))
    for side in (plain, fast):
        for key, one in side.items():
            side[key] = Scores({"psnr": one.inside["psnr"]}, {}, {}, 0)
    found = compare(plain, fast)
    assert found.verdict == UNDECIDED
    assert "inside ssimulacra2 was measured in 0 of 40 cases" in found.reasons


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["plain", "fast"])
def test_what_is_not_a_number_decides_nothing(wrong, side):
    plain, fast = pairs(losses_of(-1, 0.1))
    sides = {"plain": plain, "fast": fast}
    sides[side]["case 7", 1] = Scores({**plain["case 7", 1].inside, "ssimulacra2": wrong}, {}, {}, 0)
    found = compare(plain, fast)
    assert found.verdict == UNDECIDED
    assert "inside ssimulacra2 is not a number in 1 edits (case 7, seed 1)" in found.reasons
    assert math.isfinite(found.losses["inside ssimulacra2"].mean)
    assert len(found.worst) == 80
    flat = [{key: one.flat() for key, one in some.items()} for some in (plain, fast)]
    assert set(pair_losses(*flat, ["inside psnr", "inside ssimulacra2"])["case 7", 1]) == {"inside psnr"}
    rows = records("engine", sides[side], found, {}, {f"case {number}": "insert" for number in range(40)})
    means = [row for row in rows if row.name == "inside ssimulacra2"]
    assert [row.error for row in means] == ["not a number in 1 of 80 edits"] * 2


def test_a_floor_that_is_not_a_number_decides_nothing():
    assert compare(*pairs(losses_of(-1, 0.1)), floor={"inside psnr": math.nan}).verdict == UNDECIDED


def test_what_is_lost_outweighs_what_is_not_a_number():
    plain, fast = pairs(losses_of(5, 0.1))
    fast["case 7", 1] = Scores({**fast["case 7", 1].inside, "psnr": math.nan}, {}, {}, 0)
    assert compare(plain, fast).verdict == FAIL


def test_what_the_plain_path_does_to_itself_is_allowed_for():
    plain, fast = pairs(losses_of(0.3, 0.2))
    assert compare(plain, fast).verdict == PASS
    assert compare(plain, fast, floor={"inside psnr": 0.01}).verdict == PASS
    unsure = compare(plain, fast, floor={"inside psnr": 0.2})
    assert unsure.verdict == UNDECIDED
    assert "moves by 0.2" in unsure.reasons[0]
    plain, fast = pairs(losses_of(1.5, 0.2))
    assert compare(plain, fast, floor={"inside psnr": 2.0, "inside ssimulacra2": 2.0}).verdict == UNDECIDED


def test_of_a_metric_whose_less_is_better_more_is_a_loss():
    bounds = Bounds({"inside flip": 0.1})
    plain = {(f"{i}", s): Scores({"flip": 0.1}, {}, {}, 0) for i in range(30) for s in (0, 1)}
    fast = {key: Scores({"flip": 0.3}, {}, {}, 0) for key in plain}
    found = compare(plain, fast, bounds)
    assert found.losses["inside flip"].mean == pytest.approx(0.2)
    assert found.verdict == FAIL


def test_the_worst_come_first():
    plain, fast = pairs([0.1, 3.0, -1.0, 0.5] * 10)
    found = compare(plain, fast)
    assert {int(name.split()[1]) % 4 for name, _ in found.worst[:20]} == {1}
    losses = pair_losses(*({key: one.flat() for key, one in side.items()} for side in (plain, fast)), ["inside psnr"])
    assert losses[found.worst[0]]["inside psnr"] == pytest.approx(3.0, abs=0.01)


@pytest.mark.parametrize(
    "wrong", [{"limits": {}}, {"limits": {"inside psnr": 0}}, {"limits": {"inside psnr": math.nan}}, {"level": 1}, {"cases": 1}]
)
def test_bounds_that_bound_nothing_are_refused(wrong):
    with pytest.raises(InvalidOption):
        Bounds(**wrong)


def test_students_t_is_that_of_the_tables():
    for level, freedom, known in ((0.95, 1, 6.313752), (0.95, 5, 2.015048), (0.975, 10, 2.228139), (0.95, 63, 1.669402)):
        assert gate.student(level, freedom) == pytest.approx(known, abs=2e-6)


@pytest.mark.parametrize("draw", ["normal", "skewed", "few"])
def test_an_upper_bound_covers_the_mean_as_often_as_it_says(draw, monkeypatch):
    """95 % each side, over 250 samples: no fewer than 91 % cover (three standard errors), but for very skewed ones 87 %."""
    monkeypatch.setattr(gate, "RESAMPLES", 1000)
    rng, covered = np.random.default_rng(1), []
    for seed in range(250):
        n = 20 if draw == "few" else 64
        values = rng.exponential(1.0, n) - 1 if draw == "skewed" else rng.normal(0, 1, n)
        low, high = gate.interval(values, 0.95, seed)
        covered.append((low <= 0, high >= 0))
    assert np.mean(covered, 0).min() >= (0.87 if draw == "skewed" else 0.91)
    assert np.mean(covered, 0).max() < 1


def test_an_interval_is_the_same_every_time():
    values = np.random.default_rng(5).normal(0, 1, 30)
    assert gate.interval(values, 0.95) == gate.interval(values, 0.95)
    assert gate.interval(np.zeros(30), 0.95) == (0, 0)
