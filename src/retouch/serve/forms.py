"""What a request may say, as multipart form or as JSON, and what is read of it: an `Ask`."""

from __future__ import annotations

import base64
import binascii
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from retouch.edit import MAX_PROMPT_CHARACTERS, MAX_STEPS, ImageTooLarge
from retouch.serve.errors import BadRequest, WrongContentType, about, of_validation

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

MAX_IMAGES, MAX_VARIATIONS, MAX_PARTIALS = 16, 10, 3
SEEDS = 2**31
"""Variations without a seed draw one below this, so that every client's integers hold it."""

SMALL = 1 << 18
"""Bytes of a body that are parsed where it is read, in a millisecond or two."""

QUALITIES = {"low": 0.5, "medium": 1.0, "auto": 1.0, "high": 2.0}
"""`quality` -> denoising steps, as a multiple of the model's own."""


class Fields(BaseModel):
    """What edits and generations share. `seed` is the first variation's, the others count up."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)]
    n: Annotated[int, Field(ge=1, le=MAX_VARIATIONS)] = 1
    size: Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", description="WxH, or auto")] = "auto"
    quality: Annotated[
        Literal["auto", "low", "medium", "high"],
        Field(description="denoising steps: low has half of the model's own, high twice as many"),
    ] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    output_format: Literal["png", "webp", "jpeg"] = "png"
    output_compression: Annotated[int | None, Field(ge=0, le=100, description="quality of jpeg; png and webp are exact")] = None
    response_format: Literal["b64_json"] | None = None
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIALS)] = 0
    user: str | None = None
    seed: Annotated[int | None, Field(ge=0, lt=2**62)] = None
    num_inference_steps: Annotated[int | None, Field(ge=1, le=MAX_STEPS)] = None
    guidance_scale: Annotated[float | None, Field(ge=0, le=100, allow_inf_nan=False)] = None
    negative_prompt: Annotated[
        str, Field(max_length=MAX_PROMPT_CHARACTERS, description="what an edit that is guided by a second pass keeps away from")
    ] = ""
    adapters: Annotated[str | None, Field(max_length=1000, description="LoRA: NAME or NAME:SCALE, commas between")] = None
    priority: Annotated[int, Field(ge=-100, le=100, description="higher comes first")] = 0
    deadline_ms: Annotated[int | None, Field(ge=1, le=86_400_000)] = None
    use_cache: Annotated[bool, Field(description="false: a finished result of the very same edit is not reused")] = True

    def worn(self) -> tuple[tuple[str, float], ...]:
        """Adapters and their scales. Raises BadRequest."""
        found = []
        for text in self.adapters.split(",") if self.adapters else ():
            name, _, scale = text.strip().partition(":")
            try:
                found.append((name, float(scale or 1)))
            except ValueError as error:
                raise BadRequest(f"adapters: {text!r} is not NAME or NAME:SCALE, such as ink:0.8.", "adapters") from error
        return tuple(found)

    def steps(self, own: int) -> int | None:
        """`own` are the model's. Raises BadRequest where two fields say it."""
        if self.num_inference_steps is not None:
            if self.quality not in ("auto", "medium"):
                raise BadRequest("quality and num_inference_steps both say how many steps; give one.", "quality")
            return self.num_inference_steps
        return None if QUALITIES[self.quality] == 1 else min(MAX_STEPS, max(1, round(own * QUALITIES[self.quality])))


class EditFields(Fields):
    """Of an edit, apart from its pictures. `document` is the id of one that was uploaded, in place of an image."""

    prompt: Annotated[
        str, Field(max_length=MAX_PROMPT_CHARACTERS, description="needed, but where model is a filter, which reads none")
    ] = ""
    input_fidelity: Literal["high"] | None = None
    mask_mode: Annotated[Literal["alpha", "white"], Field(description="edit where alpha is 0, or where it is white")] = "alpha"
    document: Annotated[str | None, Field(max_length=80)] = None


class ImageReference(BaseModel):
    """A picture in JSON: a data URL or plain base64, or the id of an uploaded document."""

    model_config = ConfigDict(extra="forbid")

    image_url: Annotated[str | None, Field(description="data:image/png;base64,... ; other addresses are not fetched")] = None
    file_id: Annotated[str | None, Field(max_length=80)] = None


class EditJson(EditFields):
    """An edit as JSON."""

    images: Annotated[list[ImageReference], Field(max_length=MAX_IMAGES)] = []
    mask: ImageReference | None = None


@dataclass(slots=True)
class Ask:
    """One request: its fields, and its pictures as they were sent (bytes) or as ids of documents (text)."""

    fields: Fields
    images: list[bytes | str] = field(default_factory=list)
    mask: bytes | None = None


async def read_edit(request: Request, file_bytes: int) -> Ask:
    """Raises BadRequest, WrongContentType, ImageTooLarge."""
    kind = _content_type(request)
    images: list[bytes | str] = []
    if kind == "application/json":
        return _checked(await parsed(request, _of_json), file_bytes)
    if kind != "multipart/form-data":
        raise WrongContentType("send multipart/form-data, or application/json with images.")
    masks: list[bytes] = []
    texts: dict[str, str] = {}
    async with multipart(request, max_files=MAX_IMAGES + 2, max_fields=64) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in ("image", "image[]", "mask"):
                    raise BadRequest(f"{name} is not a file of this request; send image and mask.", name)
                _check_size(name, value.size or 0, file_bytes)
                (masks if name == "mask" else images).append(await value.read())
            elif name in texts:
                raise BadRequest(f"{name} is given twice; give it once.", name)
            elif name in ("image", "image[]", "mask"):
                raise BadRequest(f"{name} is not a file; send it as a file part.", name.rstrip("[]"))
            else:
                texts[name] = value
    if len(masks) > 1:
        raise BadRequest("mask is given twice; give it once.", "mask")
    return _checked(Ask(_validated(EditFields, texts), images, masks[0] if masks else None), file_bytes)


def _of_json(data: bytes) -> Ask:
    body = _validated(EditJson, _json(data))
    images = [_picture_of(reference, f"images.{i}") for i, reference in enumerate(body.images)]
    mask = None if body.mask is None else _picture_of(body.mask, "mask")
    if isinstance(mask, str):
        raise BadRequest("mask.file_id: a mask is sent as image_url with a data URL.", "mask")
    fields = body.model_dump(exclude={"images", "mask"})
    return Ask(EditFields(**fields), images, mask)


def _checked(ask: Ask, file_bytes: int) -> Ask:
    assert isinstance(ask.fields, EditFields)
    if ask.fields.document is not None:
        ask.images.insert(0, ask.fields.document)
    if not ask.images:
        raise BadRequest("there is no picture to edit: send image, or document with the id of an uploaded one.", "image")
    if len(ask.images) > MAX_IMAGES:
        raise BadRequest(f"there are {len(ask.images)} images; send at most {MAX_IMAGES}.", "image")
    for name, data in (("mask", ask.mask), *((f"image {i + 1}", image) for i, image in enumerate(ask.images))):
        if isinstance(data, bytes):
            _check_size(name, len(data), file_bytes)
    return ask


def _check_size(name: str, size: int, limit: int) -> None:
    if size > limit:
        error = ImageTooLarge(f"{name} has {size / 1e6:.0f} MB; this server takes {limit / 1e6:.0f}. Save it smaller.")
        raise about("mask" if name == "mask" else "image", error)


async def read_generation(request: Request) -> Ask:
    """Raises BadRequest, WrongContentType."""
    if _content_type(request) != "application/json":
        raise WrongContentType("send application/json.")
    return Ask(_validated(Fields, await parsed(request, _json)))


class _Whole(MultiPartParser):
    """Refuses a body that stops before its closing boundary: the part it stops in, a mask perhaps, would only be left out."""

    closed = False

    def on_end(self) -> None:
        self.closed = True

    async def parse(self) -> FormData:
        form = await super().parse()
        if not self.closed:
            await form.close()
            raise MultiPartException("it stops before its closing boundary")
        return form


@asynccontextmanager
async def multipart(request: Request, max_files: int, max_fields: int) -> AsyncIterator[FormData]:
    """The parts of a form; their files are gone afterwards. Raises BadRequest."""
    try:
        async with aclosing(request.stream()) as stream:
            form = await _Whole(request.headers, stream, max_files=max_files, max_fields=max_fields).parse()
    except (MultiPartException, ValueError, LookupError) as error:  # the latter two where its charset is a strange one
        raise BadRequest(f"the form cannot be read: {getattr(error, 'message', error)}") from error
    try:
        yield form
    finally:
        await form.close()


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def parsed(request: Request, parse: Callable[[bytes], T]) -> T:
    """What `parse` makes of the body: of a large one in a thread, so that the event loop goes on.

    The request does not keep the body, as `Request.body` would have it do to its end.
    """
    data = b"".join([part async for part in request.stream()])
    if len(data) <= SMALL:
        return parse(data)
    async with request.app.state.service.parsing:
        return await run_in_threadpool(parse, data)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is no JSON: {error}.") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises BadRequest where it has a name twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise BadRequest(f"{name} is given twice; give it once.", name)
    return made


def _validated(model: type[M], content: Any) -> M:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise of_validation(error) from error


def _picture_of(reference: ImageReference, param: str) -> bytes | str:
    if (reference.image_url is None) == (reference.file_id is None):
        raise BadRequest(f"{param}: give image_url or file_id, one of the two.", param)
    if reference.file_id is not None:
        return reference.file_id
    text = reference.image_url or ""
    if text.startswith(("http:", "https:", "file:", "ftp:")):
        raise BadRequest(f"{param}: addresses are not fetched; send a data URL, or upload it to /v1/documents.", param)
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise BadRequest(f"{param}: the data URL is not base64; begin it with data:image/png;base64,", param)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"{param} is not base64: {error}.", param) from error
