"""Made traffic: the same bytes again, with the statistics that were published, on any pictures."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from retouch import cli, picture, trace
from retouch.edit import InvalidOption
from retouch.measure import figures, masks, prompts, published, traffic
from retouch.measure.masks import KINDS
from retouch.measure.pictures import Pictures, another
from retouch.measure.traffic import MIXES, Knobs
from retouch.trace import InvalidTrace, Request, Result, Shape, Trace, View, hash_of

ROOT = Path(__file__).parent.parent
CARD = (ROOT / "src/retouch/models/bundled/retouch-mini/README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def photos():
    return Pictures()


@pytest.fixture(scope="module")
def personal(photos):
    return traffic.make("personal", 7, replace(MIXES["personal"], requests=2000, side=(256,)), photos)


@pytest.fixture(scope="module")
def template(photos):
    return traffic.make("template", 7, replace(MIXES["template"], requests=2000, side=(256,)), photos)


@pytest.fixture
def folder(tmp_path):
    """Two pictures of one's own."""
    for name, colour in (("b.png", 10), ("a.png", 20)):
        pixels = np.full((48, 64, 3), colour, np.uint8)
        pixels[:24, :32] = 200
        picture.write(tmp_path / name, pixels)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def told(made):
    """The figures of a trace by group and name."""
    return {(figure.group, figure.name): figure.value for figure in figures.figures(made)}


# The same again


def test_the_same_seed_and_knobs_give_the_same_bytes(photos, tmp_path):
    knobs = Knobs(requests=40, tenants=3, deadline=5, steps=4, side=(128, 64))
    texts = []
    for seed in (3, 3, 4):
        path = tmp_path / f"{len(texts)}.jsonl"
        trace.write(path, traffic.make("personal", seed, knobs, Pictures()))
        texts.append(path.read_bytes())
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("knob", "value", "changes"),
    [
        ("rate", 9.0, {"at"}), ("burst", 1.0, {"at"}), ("think", 1.0, {"at"}), ("variations", 2, {"n", "document"}),
        ("steps", 3, {"steps"}), ("deadline", 2.0, {"deadline"}), ("masks", (0.0, 0.0, 1.0), {"mask"}),
        ("tenants", 5, {"tenant"}),
    ],
)  # fmt: skip
def test_a_knob_changes_what_it_is_for_and_nothing_else(photos, knob, value, changes):
    base = Knobs(requests=40, side=(64,), turns=1.0, repeat_prompt=0, repeat_mask=0)
    one, other = (traffic.make("personal", 5, knobs, photos) for knobs in (base, replace(base, **{knob: value})))
    pairs = list(zip(one.requests, other.requests, strict=True))
    differ = {name.name for name in fields(Request) if any(getattr(a, name.name) != getattr(b, name.name) for a, b in pairs)}
    assert differ <= changes


# Statistics


def test_mask_areas_are_the_published_ones(personal, template):
    """Tolerances: what so many draws vary by, and what the published fit itself misses, at the smallest most."""
    for made in (personal, template):
        found = told(made)
        for source, share in zip(published.SOURCES, traffic.MASKS, strict=True):
            group = f"masks, {source.name}"
            assert found[group, "of all"] == pytest.approx(share, abs=0.04)
            for name, value in source.figures.items():
                assert found[group, name] == pytest.approx(value, rel=0.3 if name == "P10" else 0.2), (group, name)


def test_the_fits_are_those_of_the_published_figures():
    rng = np.random.default_rng(1)
    production, inpainting, detailing = ([source.draw(rng) for _ in range(40_000)] for source in published.SOURCES)
    assert np.mean(production) == pytest.approx(0.112, rel=0.01)
    assert np.percentile(production, 50) == pytest.approx(0.095, rel=0.07)
    assert np.mean(inpainting) == pytest.approx(0.354, rel=0.01)
    for share, area in zip(*published.KNOTS, strict=True):
        assert published.inpainting_area(share) == pytest.approx(area)
    assert np.mean(detailing) == pytest.approx(0.029, rel=0.06)


def test_the_personal_mix(personal):
    found = told(personal)
    assert found["traffic", "requests"] == 2000
    assert found["sessions", "variations"] == 3
    assert found["sessions", "turns"] == pytest.approx(3, rel=0.1)
    assert found["sessions", "think time, mean"] == pytest.approx(40, rel=0.1)
    assert found["reuse", "pictures"] == found["traffic", "sessions"]
    assert found["reuse", "requests that repeat the prompt before"] == pytest.approx(0.17, abs=0.03)
    assert found["reuse", "requests that repeat the mask before"] == pytest.approx(0.17, abs=0.03)
    assert 0.2 < found["reuse", "requests that repeat either"] < 0.4
    assert found["traffic", "requests a second"] == pytest.approx(1, rel=0.3)
    assert all(request.n == 3 and request.tenant == "" for request in personal.requests)
    assert len({request.seed for request in personal.requests}) > 1990


def test_the_template_mix(template):
    asked = Counter(request.document for request in template.requests)
    first, *others = (count for _, count in asked.most_common())
    harmonic = sum(1 / rank for rank in range(1, 1001))
    assert first / 2000 == pytest.approx(1 / harmonic, rel=0.2)
    assert sum(others[:9]) + first == pytest.approx(2000 * sum(1 / k for k in range(1, 11)) / harmonic, rel=0.1)
    assert 400 < len(asked) < 1000
    found = told(template)
    assert found["reuse", "requests on results of earlier ones"] == 0
    assert found["reuse", "requests that repeat the mask before"] == pytest.approx(0.3, abs=0.04)


def test_bursts_are_more_than_poisson():
    knobs = Knobs(requests=3000, turns=1, repeat_mask=0, repeat_prompt=0)
    spread = []
    for burst in (1.0, 8.0):
        turns = traffic._turns(replace(knobs, burst=burst), np.random.default_rng(2))
        made = Trace(tuple(Request(turn.at, f"s{turn.session}", View("h", (16, 16)), "x") for turn in turns))
        found = told(made)
        assert found["traffic", "requests a second"] == pytest.approx(1, rel=0.2)
        spread.append(found["traffic", f"sessions begun in {figures.WINDOW:g} s: variance over mean"])
    assert spread[0] == pytest.approx(1, abs=0.25)
    assert spread[1] > 2


def test_sessions_go_on_from_what_they_made(small):
    results = [request for request in small.requests if isinstance(request.document, Result)]
    assert results
    for request in results:
        assert small.requests[request.document.request].session == request.session
    assert [request.at for request in small.requests] == sorted(request.at for request in small.requests)


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        ({"requests": 0}, "--requests is 0"), ({"turns": 0.5}, "--turns is 0.5"), ({"variations": 11}, "--variations is 11"),
        ({"turns": 1.0}, "--repeat-prompt is 0.17, but only 0%"), ({"masks": (1.0,)}, "--masks has 1 shares"),
        ({"masks": (0.0, 0.0, 0.0)}, "--masks"), ({"side": ()}, "--side is empty"), ({"side": (32,)}, "--side is 32"),
        ({"burst_share": float("nan")}, "--burst-share is nan"), ({"rate": float("inf")}, "--rate is inf"),
    ],
)  # fmt: skip
def test_knobs_out_of_range_are_refused(knobs, text):
    with pytest.raises(InvalidOption, match=text):
        Knobs(**knobs)


def test_the_prompts_are_those_that_the_model_card_names():
    (listed,) = re.findall(r"^24 concepts: (.*)\.$", CARD, re.MULTILINE)
    assert listed.split(", ") == list(prompts.CONCEPTS)
    ((colours, things),) = re.findall(r"^In the colours (.*): (.*)\.$", CARD, re.MULTILINE)
    assert (colours.split(", "), things.split(", ")) == (list(prompts.COLOURS), list(prompts.COLOURABLE))
    rng = np.random.default_rng(0)
    colours = "|".join(prompts.COLOURS)
    forms = rf"an? [a-z ]+|remove the object|replace the [a-z ]+ with a [a-z ]+|make the [a-z ]+ ({colours})"
    for there in ("", "car", "cactus"):
        made = [prompts.wish(there, rng) for _ in range(200)]
        assert all(re.fullmatch(forms, wish.prompt) for wish in made)
    assert not any(wish.prompt.startswith("make the cactus") for wish in made)


# Pictures


def test_documents_are_the_photos_and_then_parts_of_them(photos):
    made = traffic.make("personal", 1, Knobs(requests=60, turns=1.0, repeat_prompt=0, repeat_mask=0, side=(256,)), photos)
    views = [request.document for request in made.requests]
    assert len(set(views)) == 60
    assert [view.file for view in views[:20]] == sorted(path.name for path in (ROOT / "photos").glob("*.jpg"))
    assert all(view.crop is None for view in views[:20])
    assert all(view.crop is not None for view in views[20:])
    assert {view.flip for view in views[20:]} == {True, False}
    for view in (views[0], views[30], views[59]):
        assert max(view.size) == 256
        assert photos.pixels(view).shape == (view.size[1], view.size[0], 3)
    whole = View(views[0].hash, (512, 512), "astronaut.jpg")
    assert (photos.pixels(whole) == picture.read(ROOT / "photos" / "astronaut.jpg").pixels).all()
    flipped = photos.pixels(replace(whole, flip=True))
    assert (flipped == photos.pixels(whole)[:, ::-1]).all()


def test_any_folder_of_pictures_will_do(folder, tmp_path):
    pictures = Pictures(folder)
    assert pictures.names == ["a.png", "b.png"]
    made = traffic.make("personal", 0, Knobs(requests=6, side=(64,)), pictures)
    path = tmp_path / "t.jsonl"
    trace.write(path, made)
    pictures.check(trace.read(path), path)
    assert {view.file for view in made.roots()} <= {"a.png", "b.png"}


def test_a_folder_without_enough_in_it_is_refused(tmp_path):
    with pytest.raises(InvalidOption, match="cannot be read"):
        Pictures(tmp_path / "nowhere")
    with pytest.raises(InvalidOption, match="no picture in"):
        Pictures(tmp_path)
    picture.write(tmp_path / "one.png", np.zeros((1, 1, 3), np.uint8))
    with pytest.raises(InvalidOption, match="different documents; add pictures"):
        traffic.make("personal", 0, Knobs(requests=30, turns=1.0, repeat_mask=0, repeat_prompt=0), Pictures(tmp_path))


def test_missing_and_changed_pictures_are_named_with_their_line(folder, tmp_path):
    pictures, path = Pictures(folder), tmp_path / "t.jsonl"
    made = traffic.make("personal", 0, Knobs(requests=9, turns=1.0, repeat_mask=0, repeat_prompt=0, side=(64,)), pictures)
    first = made.requests[0].document
    picture.write(folder / "a.png", np.zeros((48, 64, 3), np.uint8))
    with pytest.raises(InvalidTrace, match=r"t.jsonl, line 2: .*a.png has changed since .*make the trace again"):
        Pictures(folder).check(made, path)
    (folder / "a.png").unlink()
    with pytest.raises(InvalidTrace, match=r"line 2: a.png is not in .*--pictures"):
        Pictures(folder).check(made, path)
    with pytest.raises(InvalidTrace, match=r"the crop .* leaves b.png, which is 64 x 48"):
        Pictures(folder).pixels(View(hash_of((folder / "b.png").read_bytes()), (64, 48), "b.png", (0, 0, 65, 48)))
    with pytest.raises(InvalidTrace, match=r"the crop \[70, 0, 90, 48\] leaves b.png, which is 64 x 48; mend the line"):
        Pictures(folder).pixels(View(hash_of((folder / "b.png").read_bytes()), (64, 48), crop=(70, 0, 90, 48)))
    assert first.file == "a.png"


def test_a_picture_known_by_its_hash_is_found_or_stood_in_for(folder):
    known = View(hash_of((folder / "b.png").read_bytes()), (64, 48))
    assert (Pictures(folder).pixels(known) == picture.read(folder / "b.png").pixels).all()
    unknown = View("feed", (96, 32))
    with pytest.raises(InvalidTrace, match=r"no picture in .* has the hash feed; .*--stand-ins"):
        Pictures(folder).pixels(unknown)
    one, two, other = (Pictures(folder, stand_ins=True).pixels(replace(unknown, hash=h)) for h in ("feed", "feed", "food"))
    assert one.shape == (32, 96, 3)
    assert (one == two).all()
    assert (one != other).any()


def test_another_document_differs_in_one_pixel():
    image = np.zeros((4, 4, 3), np.uint8)
    changed = {another(image, number).tobytes() for number in (1, 255, 256, 65536)}
    assert len(changed) == 4
    assert (another(image, 70_000) != image).any(2).sum() == 1


# The command


def test_the_command_makes_and_shows(tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    knobs = ["--requests", "30", "--side", "64,96", "--masks", "1,0,0", "--turns", "2.5"]
    assert cli.main(["trace", "make", "--mix", "personal", "--seed", "3", "--out", str(path), *knobs]) == 0
    made = trace.read(path)
    assert made.knobs["side"] == [64, 96]
    assert (made.mix, made.seed, len(made.requests)) == ("personal", 3, 30)
    assert {max(size) for size in made.sizes()} == {64, 96}
    assert cli.main(["trace", "show", str(path)]) == 0
    text = capsys.readouterr().out
    for part in ("30 requests", "masks, production", "11.2 %", "think time", "20 to 40 % assumed"):
        assert part in text
    assert "detailing" not in text


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["make", "--out", "{}/t.jsonl", "--rate", "0"], "--rate is 0"),
        (["make", "--out", "{}/t.jsonl", "--seed", "-1"], "--seed is -1"),
        (["make", "--out", "{}/no/t.jsonl", "--requests", "2"], "could not be written"),
        (["make", "--out", "{}/t.jsonl", "--pictures", "{}"], "no picture in"),
        (["show", "{}/nothing.jsonl"], "cannot be read"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, capsys, argv, text):
    assert cli.main(["trace", *(part.format(tmp_path) for part in argv)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("retouch: ")
    assert error.count("\n") == 1
    assert text in error
    assert not list(tmp_path.glob("**/*.tmp"))


def test_the_page_on_measuring_names_every_knob():
    text = (ROOT / "docs" / "measuring.md").read_text(encoding="utf-8")
    for one in fields(Knobs):
        assert f"`{traffic.option(one.name)}`" in text, one.name
    for name in (*(f.name for f in fields(Request)), *(f.name for f in fields(Shape)), *(f.name for f in fields(View))):
        assert f"`{name}`" in text, name
    assert set(masks.OUTLINES) | {"box"} == set(KINDS)
