"""Traces on file: what is written is read again, a file that is wrong says where, and masks are drawn the same everywhere."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retouch import trace
from retouch.edit import InvalidMask, OutputFailed
from retouch.measure.masks import KINDS, random_shape
from retouch.trace import InvalidTrace, Request, Result, Shape, Trace, View

# Written and read


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
