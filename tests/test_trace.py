"""Traces: made again they are the same bytes, their statistics are the published ones, and a file that is wrong says where."""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import suppress
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retouch import cli, picture, trace
from retouch.edit import InvalidMask, InvalidOption, OutputFailed
from retouch.measure import figures, masks, prompts, published, traffic
from retouch.measure.masks import KINDS, random_shape
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


@pytest.fixture(scope="module")
def small(photos):
    return traffic.make("personal", 1, Knobs(requests=12, side=(64,), commit=0.9), photos)


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


SHAPES = st.one_of(
    st.builds(
        lambda x, y, w, h, **more: Shape(box=(x, y, x + w, y + h), **more),
        st.integers(0, 15), st.integers(0, 15), st.integers(1, 16), st.integers(1, 16),
        outside=st.booleans(), kind=st.sampled_from(["", "box"]), source=st.sampled_from(["", "production"]),
    ),
    st.lists(st.tuples(st.integers(-50, 99), st.integers(-50, 99)), min_size=3, max_size=9).map(
        lambda corners: Shape(polygon=tuple(x for corner in corners for x in corner))
    ),
    st.integers(0, 2**30).map(lambda seed: Shape.of(np.random.default_rng(seed).random((32, 32)) < 0.5)),
)  # fmt: skip


@st.composite
def traces(draw):
    requests, at = [], 0.0
    for number in range(draw(st.integers(1, 6))):
        at += draw(st.floats(0, 1e5, allow_nan=False))
        session = draw(st.sampled_from(["s1", "s2"]))
        earlier = [i for i in range(number) if requests[i].session == session]
        document = View(draw(st.text(min_size=1, max_size=40)), (32, 32), draw(st.sampled_from(["", "a.png", "ä b.jpg"])))
        if earlier and draw(st.booleans()):
            k = draw(st.sampled_from(earlier))
            document = Result(k, draw(st.integers(0, requests[k].n - 1)))
        elif draw(st.booleans()):
            document = replace(document, crop=(1, 2, 30, 40), flip=True)
        words = {
            draw(st.sampled_from(["prompt", "prompt_hash"])): draw(st.text("abc äö\n\u2028", min_size=1, max_size=9)) + "x"
        }
        requests.append(
            Request(
                at, session, document, mask=draw(st.none() | SHAPES), seed=draw(st.integers(0, 2**62 - 1)),
                n=draw(st.integers(1, 10)), steps=draw(st.none() | st.integers(1, 100)), tenant=draw(st.text(max_size=5)),
                priority=draw(st.integers(-100, 100)), deadline=draw(st.none() | st.floats(0.001, 1e6)), **words,
            )
        )  # fmt: skip
    return Trace(tuple(requests), draw(st.text(max_size=9)), draw(st.integers(0, 2**60)), {"x": draw(st.integers())})


@given(made=traces())
def test_what_is_written_is_read_again(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("t") / "t.jsonl"
    trace.write(path, made)
    assert trace.read(path) == made
    assert "".join(trace.lines(made)).encode() == path.read_bytes()


# Wrong files


GOOD = [
    {"format": "retouch-trace", "version": 1},
    {"at": 0.5, "session": "s", "document": {"hash": "h", "size": [32, 24], "file": "a.png"}, "prompt": "a cat", "n": 2},
    {"at": 1.5, "session": "s", "document": {"request": 0, "variation": 1}, "prompt": "a car", "mask": {"box": [0, 0, 5, 5]}},
]


def refused(path, lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    with pytest.raises(InvalidTrace) as caught:
        trace.read(path)
    text = str(caught.value)
    assert str(path) in text
    return text


def test_a_sparse_recording_is_read(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, GOOD)))
    made = trace.read(path)
    assert (made.mix, made.knobs, len(made.requests)) == ("recorded", {}, 2)
    assert made.sizes() == [(32, 24), (32, 24)]
    assert made.roots()[1].file == "a.png"


@pytest.mark.parametrize(
    ("line", "change", "text"),
    [
        (0, {"format": "other"}, "no header of a trace"),
        (0, {"version": 2}, "of version 2, this Retouch reads version 1"),
        (0, {"version": True}, "version is true"),
        (0, {"knob": 1}, "no field knob in version 1"),
        (0, {"requests": 3}, "ends after 2 of 3 requests"),
        (1, {"extra": 1, "other": 2}, "no field extra, other in version 1"),
        (1, {"at": -1}, "at is -1; give seconds"),
        (1, {"at": "x"}, 'at is "x"'),
        (1, {"at": None}, "at is missing"),
        (1, {"session": 5}, "session is 5"),
        (1, {"prompt": ""}, "give prompt, or prompt_hash"),
        (1, {"prompt_hash": "abc"}, "one of the two"),
        (1, {"n": 11}, "n is 11; give a whole number from 1 to 10"),
        (1, {"n": 1.5}, "n is 1.5"),
        (1, {"seed": -1}, "seed is -1"),
        (1, {"steps": 0}, "steps is 0"),
        (1, {"priority": 101}, "priority is 101"),
        (1, {"deadline": 0}, "deadline is 0"),
        (1, {"document": None}, "there is no document"),
        (1, {"document": {"hash": "", "size": [1, 1]}}, "hash is empty"),
        (1, {"document": {"hash": "h", "size": [1]}}, r"size is \[1\]"),
        (1, {"document": {"hash": "h", "size": [0, 5]}}, r"size is \[0, 5\]"),
        (1, {"document": {"hash": "h", "size": [60000, 60000]}}, "3,600 megapixels"),
        (1, {"document": {"hash": "h", "size": [9, 9], "file": "../a.png"}}, "give a plain name"),
        (1, {"document": {"hash": "h", "size": [9, 9], "crop": [5, 5, 5, 9]}}, r"crop is \[5, 5, 5, 9\]"),
        (1, {"document": {"hash": "h", "size": [9, 9], "colour": 1}}, "no field colour"),
        (2, {"at": 0.4}, "time runs backwards: at is 0.4, after 0.5"),
        (2, {"document": {"request": 1}}, "request 1 has no variation 0 before this line"),
        (2, {"document": {"request": 0, "variation": 2}}, "request 0 has no variation 2"),
        (2, {"session": "t"}, "request 0 is of another session"),
        (2, {"mask": {}}, "one of box, polygon and runs"),
        (2, {"mask": {"box": [0, 0, 40, 5]}}, "leaves the picture, which is 32 x 24"),
        (2, {"mask": {"box": [0, 0, 5]}}, "give a list of 4 whole numbers"),
        (2, {"mask": {"polygon": [0, 0, 1, 1]}}, "3 to 4,096 corners"),
        (2, {"mask": {"polygon": [0, 0, 1, 1, 0, 2_000_000]}}, "more than 1,000,000 pixels away"),
        (2, {"mask": {"runs": [5, 5]}}, "the runs count 10 pixels, but the picture has 768"),
        (2, {"mask": {"runs": [-1, 769]}}, "a run is negative"),
        (2, {"mask": {"circle": [1]}}, "no field circle"),
        (2, {"mask": [1]}, "give an object"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named_with_what_mends_it(tmp_path, line, change, text):
    lines = [dict(one) for one in GOOD]
    lines[line] |= change
    told = refused(tmp_path / "t.jsonl", lines)
    assert re.search(text, told), told
    assert f"line {line + 1}" in told or "requests" in change


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([], "is empty"),
        (["{"], "line 1 is no JSON"),
        (["[]"], "line 1 is no JSON object"),
        ([GOOD[0]], "has a header, but no request"),
        ([GOOD[0], '{"at":NaN}'], "line 2 is no JSON .NaN is no number"),
        ([GOOD[0], '{"at":0,"at":1}'], "line 2 is no JSON .a name is given twice"),
        ([GOOD[0], '{"at":' + "[" * 100_000], "line 2 is no JSON"),
        ([GOOD[0], GOOD[1], ""], "line 3 is no JSON"),
    ],
)
def test_what_is_no_trace_at_all(tmp_path, lines, text):
    assert re.search(text, refused(tmp_path / "t.jsonl", lines))


def test_a_truncated_last_line_is_said_to_be_one(tmp_path, small):
    path = tmp_path / "t.jsonl"
    trace.write(path, small)
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    with pytest.raises(InvalidTrace, match=f"line {len(small.requests) + 1} is cut off"):
        trace.read(path)
    path.write_bytes(data[: data.rindex(b"\n", 0, -1) + 1])  # cut at a line's end: only the header knows
    with pytest.raises(InvalidTrace, match="ends after 11 of 12 requests"):
        trace.read(path)
    path.write_bytes(data.replace(b'"prompt"', b'"\xff\xfe"', 1))
    with pytest.raises(InvalidTrace, match="line 2 is no JSON"):
        trace.read(path)
    with pytest.raises(InvalidTrace, match="cannot be read"):
        trace.read(tmp_path / "nowhere.jsonl")
    with pytest.raises(OutputFailed, match="could not be written"):
        trace.write(tmp_path / "no" / "t.jsonl", small)


@given(data=st.data())
@settings(max_examples=150)
def test_damaged_traces_are_refused_and_never_crash(data, small, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "damaged.jsonl"
    text = bytearray("".join(trace.lines(small.first(3))).replace('"requests":3,', "").encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.sampled_from([b"", b"9", b"-", b'"', b"{", b"]", b"null", b"1e9", b"\xff", b",", b"\n"])
        )
    path.write_bytes(text)
    with suppress(InvalidTrace):
        read = trace.read(path)
        for request, size in zip(read.requests, read.sizes(), strict=True):
            if request.mask is not None:
                request.mask.check(size)


# Masks


def inside(polygon, x, y):
    """By the even-odd rule, in fractions."""
    corners = list(zip(polygon[::2], polygon[1::2], strict=True))
    crossings = 0
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if (y0 <= y) != (y1 <= y):
            crossings += x0 + (y - y0) * Fraction(x1 - x0, y1 - y0) <= x
    return crossings % 2 == 1


@given(shape=SHAPES)
@settings(max_examples=40)
def test_polygons_are_drawn_by_the_even_odd_rule(shape):
    shape.check((32, 32))
    mask = shape.drawn((32, 32))
    assert mask.shape == (32, 32)
    assert mask.dtype == bool
    assert (replace(shape, outside=not shape.outside).drawn((32, 32)) == ~mask).all()
    if shape.polygon:
        half = Fraction(1, 2)
        wanted = [[inside(shape.polygon, x + half, y + half) for x in range(32)] for y in range(32)]
        assert (mask == np.array(wanted)).all()


@given(seed=st.integers(0, 2**30), width=st.integers(1, 40), height=st.integers(1, 40), share=st.floats(0, 1))
def test_any_mask_is_kept_as_runs(seed, width, height, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    shape = Shape.of(mask)
    shape.check((width, height))
    assert (shape.drawn((width, height)) == mask).all()


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_have_the_area_that_is_asked_for(kind):
    rng = np.random.default_rng(0)
    for share in (0.002, 0.02, 0.1, 0.3, 0.5, 0.7, 0.95):
        for size in ((512, 384), (256, 512)):
            shape = random_shape(kind, share, size, rng)
            shape.check(size)
            assert shape.outside == (share > 0.5)
            assert shape.drawn(size).mean() == pytest.approx(share, rel=0.04, abs=16 / (size[0] * size[1]))


def test_a_box_is_not_drawn_outside_of_its_picture():
    with pytest.raises(InvalidMask, match="leaves the picture"):
        Shape(box=(0, 0, 33, 4)).check((32, 32))


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
