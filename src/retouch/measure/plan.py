"""What is going to be sent: the requests of a trace, or edits, with their pictures in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from retouch.boxes import Size
from retouch.edit import Edit, InvalidOption
from retouch.measure.pictures import Pictures, another
from retouch.measure.prompts import wish
from retouch.trace import InvalidTrace, Request, Result, Shape, Trace, View

MEMORY = 8 << 30
"""Bytes that the pictures of one plan may take."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One request to be sent, `number` in its plan. `document` names one of the plan's; `after`: the result that is edited.

    `at` and `deadline` are in seconds. `mask` None: the whole picture. `reuse`: a finished result may be the answer.
    """

    number: int
    at: float
    session: str
    size: Size
    document: str
    after: Result | None
    prompt: str
    mask: Shape | np.ndarray | None
    seed: int = 0
    n: int = 1
    steps: int | None = None
    tenant: str = ""
    priority: int = 0
    deadline: float | None = None
    reuse: bool = False

    def drawn(self) -> np.ndarray | None:
        """The mask, (H, W) bool. Raises InvalidTrace where nothing is in it."""
        mask = self.mask.drawn(self.size) if isinstance(self.mask, Shape) else self.mask
        if mask is not None and not mask.any():
            raise InvalidTrace(f"the mask of request {self.number} (they count from 0) has no pixel of its picture; mend it.")
        return mask

    def edits(self, image: np.ndarray, mask: np.ndarray | None) -> list[Edit]:
        """One for each variation. Raises InvalidEdit's errors."""
        return [
            Edit(
                image, self.prompt, mask, seed=self.seed + i, steps=self.steps, priority=self.priority, deadline=self.deadline,
                tenant=self.tenant, reuse=self.reuse,
            )
            for i in range(self.n)
        ]  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Calls in the order of their times, and the pictures (H, W, 3 or 4) uint8 that they name."""

    calls: tuple[Call, ...]
    documents: Mapping[str, np.ndarray] = field(default_factory=dict)

    def sessions(self) -> list[list[Call]]:
        """In the order in which they begin."""
        found: dict[str, list[Call]] = {}
        for call in self.calls:
            found.setdefault(call.session, []).append(call)
        return list(found.values())

    def alone(self, count: int) -> Plan:
        """The first so many calls that edit a picture as it came."""
        calls = [call for call in self.calls if call.after is None][:count]
        return Plan(tuple(calls), {call.document: self.documents[call.document] for call in calls})

    def renewed(self, turn: int) -> Plan:
        """The same with documents that differ in one pixel, so that no cache knows them; `turn` 0: as they are."""
        if not turn:
            return self
        return replace(self, documents={name: another(image, turn) for name, image in self.documents.items()})


def of_trace(trace: Trace, pictures: Pictures, reuse: bool = False) -> Plan:
    """Raises InvalidTrace, InvalidImage, and InvalidOption where the pictures would not go into memory."""
    names: dict[View, str] = {}
    for root in trace.roots():
        names.setdefault(root, f"picture {len(names)}")
    bytes_ = sum(3 * view.size[0] * view.size[1] for view in names)
    if bytes_ > MEMORY:
        raise InvalidOption(
            f"the trace's {len(names):,} pictures take {bytes_ / 1e9:.0f} GB in memory, more than {MEMORY / 1e9:.0f}; "
            "replay less of it with --requests."
        )
    calls = []
    for number, (request, root, size) in enumerate(zip(trace.requests, trace.roots(), trace.sizes(), strict=True)):
        after = request.document if isinstance(request.document, Result) else None
        calls.append(
            Call(
                number, request.at, request.session, size, names[root], after, _prompt(request, pictures), request.mask,
                request.seed, request.n, request.steps, request.tenant, request.priority, request.deadline, reuse,
            )
        )  # fmt: skip
    return Plan(tuple(calls), {name: pictures.pixels(view) for view, name in names.items()})


def _prompt(request: Request, pictures: Pictures) -> str:
    if request.prompt:
        return request.prompt
    if not pictures.stand_ins:
        raise InvalidOption("the trace was recorded without its prompts; replay it with --stand-ins in their place.")
    return wish("", np.random.default_rng(list(request.prompt_hash.encode()))).prompt


def of_edits(edits: Sequence[Edit], rate: float | None = None, seed: int = 0) -> Plan:
    """Each a session of its own. They come at `rate` a second, at random (Poisson), or all at once. Raises InvalidOption."""
    documents: dict[str, np.ndarray] = {}
    gaps = np.random.default_rng(seed).exponential(1 / rate, len(edits)) if rate else np.zeros(len(edits))
    calls = []
    for number, (edit, at) in enumerate(zip(edits, np.cumsum(gaps), strict=True)):
        if edit.references or edit.blank or edit.guidance is not None:
            raise InvalidOption("an edit with references or guidance, or of nothing, cannot be replayed; leave it out.")
        name = str(id(edit.image))
        documents[name] = edit.image
        height, width = edit.image.shape[:2]
        calls.append(
            Call(
                number, float(at), str(number), (width, height), name, None, edit.prompt, edit.mask, edit.seed, 1, edit.steps,
                edit.tenant, edit.priority, edit.deadline, edit.reuse,
            )
        )  # fmt: skip
    return Plan(tuple(calls), documents)
