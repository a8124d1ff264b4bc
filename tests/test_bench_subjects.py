"""Who the bench measures, in which order, what warms them up, what is left off of them, and who judges them."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest

from retouch import picture, record
from retouch.edit import Edit, InvalidOption, RetouchError
from retouch.engine import savings
from retouch.measure import jury, standing, tally, traffic, trial
from retouch.measure.cases import Case
from retouch.measure.pictures import Pictures
from retouch.measure.plan import of_trace
from retouch.measure.quality import Answers
from retouch.measure.subjects import AGAIN, RUNG, Common, Subject, chosen, named, peers, rungs, spread
from retouch.measure.traffic import Knobs

WHERE = record.environment("", "float32", 1)


def subject(name, role="full"):
    return Subject(name, role, (), 1)


def test_peers_are_spread_between_the_rungs():
    common = Common("m", "float32", 1, 8)
    order = spread(rungs(common), [subject(name) for name in "abcd"])
    assert order[0].name == "plain"
    assert order[-1].role == AGAIN
    places = [place for place, one in enumerate(order) if one.role == "full"]
    assert max(b - a for a, b in pairwise(places)) <= 3
    assert spread([], [subject("a")]) == [subject("a")]


def test_the_ladder_leaves_off_what_it_says():
    made = rungs(Common("m", "float32", 1, 8))
    switches = [one.command[one.command.index("--savings") + 1] for one in made]
    assert switches[:3] == ["none", "documents", "documents,mask"]
    assert switches[4] == switches[-1] == ",".join(savings.SAVINGS)
    assert ["--compile" in one.command for one in made] == [False] * 5 + [True] * 3
    assert ["--context" in one.command for one in made] == [False] * 6 + [True] * 2
    assert made[-1].name == f"{made[-2].name}, again"


def test_a_name_may_have_commas():
    batch, single = "LitServe static batch, klein-inpaint crop", "LitServe, klein-KV crop"
    some = [*rungs(Common("m", "float32", 1, 8)), subject(batch, "crop"), subject(single, "crop"), subject("a"), subject("b")]
    assert named(single, some) == (single,)
    assert named(f"a, {single.lower()},b", some) == ("a", single.lower(), "b")
    assert named("LitServe*, klein-KV*,a", some) == ("LitServe*, klein-KV*", "a")
    assert named("*batch*,*crop", some) == ("*batch*", "*crop")  # each of them fits somebody by itself
    assert named(" rung ,,plain,", some) == ("rung", "plain")
    assert named("", some) == ()
    assert [one.name for one in chosen(some, named(f"{batch},a", some), [])] == [batch, "a"]
    with pytest.raises(InvalidOption, match="'nobody' fits nobody"):
        chosen(some, named("a,nobody", some), [])


def test_names_choose_who_is_measured():
    some = [*rungs(Common("m", "float32", 1, 8)), subject("Ray Serve", "other")]
    assert [one.name for one in chosen(some, ["ray*"], [])] == ["Ray Serve"]
    assert {one.name for one in chosen(some, ["+ context*"], [])} == {"+ context of 64 px", "+ context of 64 px, again"}
    assert {one.role for one in chosen(some, ["rung"], [])} == {RUNG, AGAIN}
    assert "plain" not in {one.name for one in chosen(some, [], ["plain"])}
    with pytest.raises(InvalidOption, match="fits nobody; there are plain"):
        chosen(some, ["diffusers"], [])
    with pytest.raises(InvalidOption, match="nobody is left"):
        chosen(some, ["plain"], ["plain"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("peer = 3", "has to hold"),
        ("[[peer]]\nname = 'a'\nkind = 'full'", "command is None"),
        ("[[peer]]\ncommand = ['a.py']\nkind = 'full'", "has no name"),
        ("[[peer]]\nname = 'a'\ncommand = ['a.py']\nkind = 'half'", "kind is 'half'"),
        ("[[peer]]\nname = 'a'\ncommand = ['a.py']\nkind = 'full'\nconcurrency = 0", "concurrency is 0"),
        ("[[peer]]\nname = 'a'\ncommand = ['a.py']\nkind = 'full'\nspeed = 3", "unknown field 'speed'"),
        ("[[peer]]\nname = 'a'\ncommand = ['a.py']\nkind = 'full'\nsend = ['user']", "send is ['user']; give a list of"),
        ("[[peer]]\nname = 'a'\ncommand = ['a.py']\nkind = 'full'\nsend = ['documents']", "priority, seed, use_cache"),
        ("[[peer]]\nname = 'a'\ncommand = ['a.py']\nkind = 'full'\nsend = 'seed'", "send is 'seed'"),
        ("[[peer]]\nname = 'a'\ncommand = ['a.py']\nkind = 'full'\n" * 2, "two peers of the name 'a'"),
        ("[[peer", "cannot be read"),
    ],
)
def test_a_peers_file_is_refused_with_what_mends_it(text, says, tmp_path):
    path = tmp_path / "peers.toml"
    path.write_text(text)
    with pytest.raises(InvalidOption, match=re.escape(says)):
        peers(path, Common("m", "float32", 1, 8))


def test_the_warm_up_knows_no_document_and_no_prompt_of_the_trace():
    asked = traffic.make("personal", 1, Knobs(requests=12, side=(64, 96)), Pictures())
    plan = of_trace(asked, Pictures())
    warm = trial.warming(plan, 4)
    assert len(warm.calls) == 4
    assert all(call.n == 1 for call in warm.calls)
    sizes = list(dict.fromkeys(call.size for call in plan.calls if call.after is None))
    assert [call.size for call in warm.calls][: len(sizes)] == sizes[:4]
    assert not {call.prompt for call in warm.calls} & {call.prompt for call in plan.calls}
    for name, image in warm.documents.items():
        assert (image != plan.documents[name]).any(axis=2).sum() <= 1
        assert not np.array_equal(image, plan.documents[name])


def test_savings_are_named_or_refused():
    assert savings.parsed("all") == savings.SAVINGS
    assert savings.parsed("none") == ()
    assert savings.parsed("mask, packing") == ("mask", "packing")
    with pytest.raises(InvalidOption, match="no saving 'speed'"):
        savings.parsed("mask,speed")


def test_an_engine_without_savings_keeps_nothing_and_computes_all():
    from retouch.engine import load

    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    edits = [
        Edit(image, "a red apple", picture.box_mask((16, 16, 32, 16), (96, 64)), seed=seed, reuse=False) for seed in (0, 1)
    ]
    plain, kept = load(dtype="float32", savings=()), load(dtype="float32", savings=("documents", "prompts", "packing"))
    answers = [engine.edit(edits) for engine in (plain, kept)]
    for one in answers[0]:
        assert one.usage.cache_hits == ()
        assert one.usage.tokens_computed == one.usage.tokens_whole
        assert np.array_equal(one.image[0], image[0])
    assert answers[1][1].usage.cache_hits == ("document", "prompt")
    assert plain.tokens == 1
    assert max(len(store) for store in (plain.documents, plain.prompts)) == 0
    for one, other in zip(*answers, strict=True):  # what is kept and packed changes nothing
        assert np.abs(one.image.astype(int) - other.image).max() <= 1
    with pytest.raises(RetouchError, match="no saving"):
        load(savings=("speed",))


def case(number):
    image = np.zeros((64, 80, 3), np.uint8)
    image[...] = np.arange(80)[:, None] + 20 * number
    mask = picture.box_mask((16, 16, 32, 24), (80, 64))
    truth = image.copy()
    truth[mask] = 90
    return Case(Edit(image, "a red apple", mask, reuse=False), truth, "insert", f"case-{number}")


def test_the_jury_holds_everybody_against_the_truth_and_the_plain_rung():
    cases = [case(number) for number in range(3)]
    bench = jury.Jury(cases, 1)

    def judged(name, grey, role=RUNG):
        pictures = {}
        for one in cases:
            pictures[one.name, 0] = np.where(one.mask[..., None], np.uint8(grey), one.edit.image)
        made = trial.Trial(Subject(name, role, (), 1))
        made.quality = Answers(pictures)
        return bench.rows(made, WHERE, {"run": "r", "mix": "personal", **tally.of_subject(made.subject)})

    plain, fast = judged("plain", 100), judged("+ packing", 130)
    assert judged("+ packing, again", 130, AGAIN) == []
    assert not [row for row in plain if row.name == "the gate"]
    (gate,) = (row for row in fast if row.name == "the gate")
    assert gate.extra["verdict"] in ("undecided", "fail")  # three cases decide nothing good
    worst = [row for row in fast if row.name == "worst picture"]
    assert len(worst) == 3
    assert all(
        row.extra["picture"].startswith("data:image/webp;base64,") and len(row.extra["picture"]) < 30_000 for row in worst
    )
    assert worst[0].value > 0
    found = standing.of("personal", [*plain, *fast])
    line = found.line("+ packing")
    assert line.quality["", "inside psnr"].value < found.line("plain").quality["", "inside psnr"].value
    assert line.losses["inside psnr"].value > 0
