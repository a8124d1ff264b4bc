"""`Trace`: who asks for which edit when, as JSON lines: a header, then one line a request. docs/measuring.md has the format.

A trace names its pictures by a file's name and hash and holds none. One that was recorded may keep a hash in the place of the
name too, and in the place of a prompt.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from retouch.boxes import Box, Size
from retouch.edit import MAX_PROMPT_CHARACTERS, MAX_STEPS, InvalidMask, OutputFailed
from retouch.picture import MAX_PIXELS
from retouch.trace.fields import Fields, InvalidTrace, parsed, short
from retouch.trace.shape import Shape

FORMAT, VERSION = "retouch-trace", 1
MAX_VARIATIONS = 10


def hash_of(data: bytes) -> str:
    """What a trace knows a picture's file by."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class View:
    """A picture of a folder, or a part of it: cut to `crop`, mirrored if `flip`, scaled to `size` (width, height).

    `hash` is of the file's bytes (`hash_of`). Without a `file`, any picture of that hash is meant.
    """

    hash: str
    size: Size
    file: str = ""
    crop: Box | None = None
    flip: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What an earlier request of the same session made: the document of whoever edits on. Both count from 0."""

    request: int
    variation: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One line. `at` is in seconds from the trace's beginning. `n` variations have the seeds from `seed` on.

    `mask` None: the whole picture. `prompt_hash` stands in the place of a prompt that was not to be recorded. `steps` None:
    the model's own. `deadline` is in seconds from `at`.
    """

    at: float
    session: str
    document: View | Result
    prompt: str = ""
    prompt_hash: str = ""
    mask: Shape | None = None
    seed: int = 0
    n: int = 1
    steps: int | None = None
    tenant: str = ""
    priority: int = 0
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """`knobs` are what it was made with; a recorded one has none."""

    requests: tuple[Request, ...]
    mix: str = "recorded"
    seed: int = 0
    knobs: Mapping[str, Any] = field(default_factory=dict)

    def sizes(self) -> list[Size]:
        """Of each request's document."""
        sizes: list[Size] = []
        for request in self.requests:
            document = request.document
            sizes.append(document.size if isinstance(document, View) else sizes[document.request])
        return sizes

    def roots(self) -> list[View]:
        """For each request the picture that its document goes back to."""
        roots: list[View] = []
        for request in self.requests:
            document = request.document
            roots.append(document if isinstance(document, View) else roots[document.request])
        return roots

    def first(self, count: int) -> Trace:
        """The trace up to its request `count`."""
        return Trace(self.requests[:count], self.mix, self.seed, self.knobs)


def write(path: Path, trace: Trace) -> None:
    """The file appears whole or not at all. Raises OutputFailed."""
    temporary = path.parent / f".retouch-{secrets.token_hex(8)}.tmp"
    try:
        temporary.write_text("".join(lines(trace)), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputFailed(f"{path} could not be written ({error.strerror or error}); write elsewhere.") from error


def lines(trace: Trace) -> Iterator[str]:
    """Equal traces have equal lines."""
    yield line(header(trace.mix, trace.seed, trace.knobs, len(trace.requests)))
    for request in trace.requests:
        yield line(request)


def header(mix: str, seed: int = 0, knobs: Mapping[str, Any] | None = None, requests: int | None = None) -> dict[str, Any]:
    """What the first line says. A recording does not know yet how many `requests` there will be."""
    first: dict[str, Any] = {"format": FORMAT, "version": VERSION, "mix": mix, "seed": seed}
    return first | ({} if requests is None else {"requests": requests}) | {"knobs": dict(knobs or {})}


def line(said: Request | Mapping[str, Any]) -> str:
    """Of a file: a request, or what `header` says."""
    row = _told(said) if isinstance(said, Request) else said
    return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def _told(value: Any) -> dict[str, Any]:
    """The fields of a Request, Shape, View or Result that say something other than their default."""
    row: dict[str, Any] = {}
    for one in fields(value):
        said = getattr(value, one.name)
        if said != one.default:
            row[one.name] = _told(said) if isinstance(said, View | Result | Shape) else said
    return row


def read(path: Path) -> Trace:
    """Raises InvalidTrace with file and line, and how to mend it.

    Of a recording, which does not say how many requests it has, a last line that is cut off is left out: its server was killed.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidTrace(f"{path} cannot be read ({error.strerror}); give a trace, as retouch trace make writes.") from error
    if not data.strip():
        raise InvalidTrace(f"{path} is empty; make a trace with retouch trace make.")
    whole = data.endswith(b"\n")
    rows = data.removesuffix(b"\n").split(b"\n")
    mix, seed, knobs, count = _header_of(parsed(path, 1, rows[0], whole or len(rows) > 1))
    if count is None and not whole and len(rows) > 1 and not _is_json(rows[-1]):
        rows.pop()
    requests: list[Request] = []
    for number, row in enumerate(rows[1:], 2):
        requests.append(_request_of(parsed(path, number, row, whole or number < len(rows)), requests))
    if count is not None and count != len(requests):
        raise InvalidTrace(
            f"{path} ends after {len(requests):,} of {count:,} requests: it is not whole. Make it again, or take "
            '"requests" out of its first line to use what is there.'
        )
    if not requests:
        raise InvalidTrace(f"{path} has a header, but no request; make a trace with retouch trace make.")
    return Trace(tuple(requests), mix, seed, knobs)


def _is_json(row: bytes) -> bool:
    try:
        json.loads(row.decode())
    except (ValueError, RecursionError):
        return False
    return True


def _header_of(line: Fields) -> tuple[str, int, dict[str, Any], int | None]:
    if line.row.pop("format", None) != FORMAT:
        line.wrong(f'it is no header of a trace: it does not say "format":"{FORMAT}". Give a file of retouch trace make.')
    version = line.whole("version", 1, 2**31)
    if version != VERSION:
        line.wrong(f"the trace is of version {version}, this Retouch reads version {VERSION}; use a newer one.")
    mix, seed = line.text("mix", 200, "recorded"), line.whole("seed", 0, 2**63 - 1, 0)
    count = line.whole("requests", 0, 2**40) if "requests" in line.row else None
    knobs = line.part("knobs")
    line.no_more(VERSION)
    return mix, seed, {} if knobs is None else knobs.row, count


def _request_of(line: Fields, before: list[Request]) -> Request:
    at, last = line.number("at", 0), before[-1].at if before else 0.0
    if at < last:
        line.wrong(f"time runs backwards: at is {at:g}, after {last:g} before it. Sort the requests by at.")
    session, tenant = line.text("session", 200), line.text("tenant", 200, "")
    document = _document_of(line, session, before)
    size = _size_of(document, before)
    prompt, hashed = line.text("prompt", MAX_PROMPT_CHARACTERS, ""), line.text("prompt_hash", 128, "")
    if bool(prompt.strip()) == bool(hashed):
        line.wrong("give prompt, or prompt_hash in its place; one of the two.")
    n, seed = line.whole("n", 1, MAX_VARIATIONS, 1), line.whole("seed", 0, 2**62 - 1, 0)
    steps = None if line.row.get("steps") is None else line.whole("steps", 1, MAX_STEPS)
    priority = line.whole("priority", -100, 100, 0)
    deadline = None if line.row.get("deadline") is None else line.number("deadline", 0.001)
    mask = _shape_of(line.part("mask"), size)
    for name in ("steps", "deadline"):
        line.row.pop(name, None)  # where they say null
    line.no_more(VERSION)
    return Request(at, session, document, prompt, hashed, mask, seed, n, steps, tenant, priority, deadline)


def _document_of(line: Fields, session: str, before: list[Request]) -> View | Result:
    said = line.part("document")
    if said is None:
        line.wrong("there is no document; give one with hash and size, or with request.")
    if "request" in said.row:
        made = Result(said.whole("request", 0, 2**40), said.whole("variation", 0, MAX_VARIATIONS - 1, 0))
        said.no_more(VERSION)
        if made.request >= len(before) or made.variation >= before[made.request].n:
            said.wrong(f"request {made.request} has no variation {made.variation} before this line; both count from 0.")
        if before[made.request].session != session:
            said.wrong(f"request {made.request} is of another session; a result is edited by its own session only.")
        return made
    hashed, file = said.text("hash", 128), said.text("file", 255, "")
    if not hashed:
        said.wrong("hash is empty; give that of the picture's file.")
    if file != os.path.basename(file) or file in (".", ".."):
        said.wrong(f"file is {short(file)}; give a plain name, the folder is told when the trace is replayed.")
    size, crop, flip = said.numbers("size", 2), said.numbers("crop", 4), said.flag("flip")
    if len(size) != 2 or min(size) < 1:
        said.wrong(f"size is {short(list(size))}; give width and height, 1 pixel or more each.")
    if size[0] * size[1] > MAX_PIXELS:
        said.wrong(f"size is {size[0] * size[1] / 1e6:,.0f} megapixels; give at most {MAX_PIXELS / 1e6:,.0f}.")
    if crop and not (0 <= crop[0] < crop[2] and 0 <= crop[1] < crop[3]):
        said.wrong(f"crop is {short(list(crop))}; give x0, y0, x1, y1 with an area.")
    said.no_more(VERSION)
    box: Box | None = (crop[0], crop[1], crop[2], crop[3]) if crop else None
    return View(hashed, (size[0], size[1]), file, box, flip)


def _size_of(document: View | Result, before: list[Request]) -> Size:
    while isinstance(document, Result):
        document = before[document.request].document
    return document.size


def _shape_of(said: Fields | None, size: Size) -> Shape | None:
    if said is None:
        return None
    box = said.numbers("box", 4)
    shape = Shape(
        (box[0], box[1], box[2], box[3]) if box else None, said.numbers("polygon"), said.numbers("runs"), said.flag("outside"),
        said.text("kind", 40, ""), said.text("source", 40, ""),
    )  # fmt: skip
    said.no_more(VERSION)
    try:
        shape.check(size)
    except InvalidMask as error:
        said.wrong(str(error))
    return shape
