"""What is asked (`Edit`), what is answered (`Edited`, `Usage`), and every way to refuse (the error tree)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

MAX_PROMPT_CHARACTERS = 32_000
MAX_STEPS = 100


class RetouchError(Exception):
    """Anything Retouch refuses or fails at. `status` is its one HTTP status, the text says how to mend it."""

    status = 500


class InvalidEdit(RetouchError):
    """The request itself cannot be served as it stands."""

    status = 400


class InvalidImage(InvalidEdit):
    """The picture is missing, unreadable, truncated or no picture."""


class ImageTooLarge(InvalidImage):
    """The picture has more pixels than the decoder is allowed to unfold (a decompression bomb)."""

    status = 413


class InvalidMask(InvalidEdit):
    """The mask is empty, of another size, or outside the picture."""


class InvalidPrompt(InvalidEdit):
    """The prompt is empty, not text, or longer than the model can read."""


class InvalidOption(InvalidEdit):
    """An option has a value outside its range, or does not go with another."""


class UnknownCheckpoint(RetouchError):
    """No checkpoint of that name, or no directory at that path."""

    status = 404


class CheckpointMismatch(RetouchError):
    """The checkpoint is there, but it is of another architecture, or weights are missing from it."""

    status = 422


class UnknownAdapter(RetouchError):
    """No LoRA adapter of that name, or no folder of them."""

    status = 404


class AdapterMismatch(RetouchError):
    """The adapter is there, but it was made for another model, is of another kind, or lacks weights."""

    status = 422


class QueueFull(RetouchError):
    """As many edits wait as may; a later try, `retry_after` seconds from now, will find room."""

    status = 429

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineTooSoon(RetouchError):
    """The edit could not be done in the time it is given: refused on arrival, not late."""

    status = 504


class DeadlinePassed(RetouchError):
    """The edit was taken on, but its time ran out before it was done."""

    status = 504


class WorkerLost(RetouchError):
    """The process that computed the edit died, and those that took it over died too, or none could be started."""

    status = 503


class OutputFailed(RetouchError):
    """The answer could not be written. Nothing half-written is left behind."""

    status = 507


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """One request.

    `image` is (H, W, 3 or 4) uint8, upright. `mask` is (H, W) bool, true = edit here; None = the whole picture.
    `references` are further pictures the model may look at, same form as `image`, any size.
    `steps` and `guidance` default to the checkpoint's own. `deadline` is in seconds from submission. `blank`: there is no
    document, `image` gives the size alone (text to image). `reuse`: a finished result of the very same edit may be the answer.
    `negative` says what an edit that is guided by a second pass is to keep away from. `adapters` are names of LoRA adapters and
    their scales.
    """

    image: np.ndarray
    prompt: str
    mask: np.ndarray | None = None
    references: tuple[np.ndarray, ...] = ()
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    priority: int = 0
    deadline: float | None = None
    tenant: str = ""
    blank: bool = False
    reuse: bool = True
    negative: str = ""
    adapters: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        for name, image in (("image", self.image), *((f"references[{i}]", r) for i, r in enumerate(self.references))):
            _check_image(name, image)
        if self.mask is not None:
            _check_mask(self.mask, self.image)
        _check_prompt(self.prompt)
        if self.negative:
            _check_prompt(self.negative)
        _check_adapters(self.adapters)
        if self.steps is not None and not 1 <= self.steps <= MAX_STEPS:
            raise InvalidOption(f"steps is {self.steps}; give 1 to {MAX_STEPS}, or leave it out for the model's own.")
        if self.guidance is not None and not 0 <= self.guidance <= 100:
            raise InvalidOption(f"guidance is {self.guidance}; give 0 to 100, or leave it out for the model's own.")
        if not 0 <= self.seed < 2**63:
            raise InvalidOption(f"seed is {self.seed}; give a whole number from 0 to 2^63 - 1.")
        if self.deadline is not None and not self.deadline > 0:
            raise InvalidOption(f"deadline is {self.deadline}; give seconds from now, above 0, or leave it out.")
        if self.blank and (self.mask is not None or self.references):
            raise InvalidOption("a picture from nothing has no mask and no references; leave them out, or give a document.")


@dataclass(slots=True)
class Usage:
    """What one edit cost.

    `seconds` is device time by stage (document, prompt, step, finish), a shared step split by tokens.
    `tokens_computed` counts image tokens over all steps, `tokens_whole` what the whole picture would have taken, `tokens_text`
    those of the prompt. `kept_bytes` is the most that was kept from step to step for partial steps. `approximate` names what
    makes the answer differ from the plain model's; empty: nothing does but the decode of a crop (`Options.halo`), not counted.
    `dollars` is None where no price is known.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    tokens_computed: int = 0
    tokens_whole: int = 0
    tokens_text: int = 0
    steps: int = 0
    cache_hits: tuple[str, ...] = ()
    approximate: tuple[str, ...] = ()
    dollars: float | None = None
    kept_bytes: int = 0

    @property
    def tokens_saved(self) -> int:
        return self.tokens_whole - self.tokens_computed

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


@dataclass(frozen=True, slots=True, eq=False)
class Edited:
    """The answer: `image` in the form and size of the request's, the seed that made it, and what it cost."""

    image: np.ndarray
    seed: int
    usage: Usage


def _check_image(name: str, image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4):
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InvalidImage(f"{name} is {got}; give a (height, width, 3 or 4) uint8 array, as picture.read returns.")
    if min(image.shape[:2]) < 1:
        raise InvalidImage(f"{name} has no pixels ({image.shape[1]} x {image.shape[0]}).")


def _check_mask(mask: np.ndarray, image: np.ndarray) -> None:
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.ndim != 2:
        raise InvalidMask("mask must be a (height, width) bool array, true = edit here; picture.read_mask makes one.")
    if mask.shape != image.shape[:2]:
        raise InvalidMask(
            f"the mask is {mask.shape[1]} x {mask.shape[0]} but the picture is {image.shape[1]} x {image.shape[0]}; "
            "give a mask of the picture's own size (after EXIF rotation)."
        )
    if not mask.any():
        raise InvalidMask("the mask is empty: mark at least one pixel, or leave it out to edit the whole picture.")


def _check_adapters(adapters: tuple[tuple[str, float], ...]) -> None:
    for name, scale in adapters:
        if not isinstance(name, str) or isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= 100:
            raise InvalidOption(f"adapter {name!r} has scale {scale!r}; give its name and a number from -100 to 100.")
    if len({name for name, _ in adapters}) < len(adapters):
        raise InvalidOption(f"an adapter is given twice among {', '.join(name for name, _ in adapters)}; give it once.")


def _check_prompt(prompt: str) -> None:
    if not isinstance(prompt, str):
        raise InvalidPrompt(f"the prompt is {type(prompt).__name__}; give text.")
    if not prompt.strip():
        raise InvalidPrompt('the prompt is empty; say what to draw, such as "a red apple" or "remove the object".')
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InvalidPrompt(f"the prompt is no text at character {error.start + 1}; send valid Unicode.") from error
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise InvalidPrompt(f"the prompt has {len(prompt):,} characters; give at most {MAX_PROMPT_CHARACTERS:,}.")
