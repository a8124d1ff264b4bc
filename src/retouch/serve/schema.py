"""The answers as OpenAPI describes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from retouch.serve.forms import EditFields, EditJson, Fields


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Whatever is refused."""

    error: ErrorDetail


class Costs(BaseModel):
    """What an answer took: device seconds by stage, image tokens, cache hits, dollars at the configured price.

    `approximate` names what makes the answer differ from the plain model's.
    """

    seconds: dict[str, float]
    tokens_computed: int
    tokens_whole: int
    tokens_saved: int
    steps: int
    cache_hits: list[str]
    approximate: list[str]
    dollars: float | None
    latency_seconds: float


class TokenDetails(BaseModel):
    image_tokens: int
    text_tokens: int


class UsageAnswer(BaseModel):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokenDetails
    retouch: Costs


class MadeImage(BaseModel):
    b64_json: str
    seed: int
    usage: UsageAnswer


class Images(BaseModel):
    """Pictures, in the order of their seeds."""

    created: int
    data: list[MadeImage]
    size: str
    quality: str
    background: str
    output_format: str
    usage: UsageAnswer


class Job(BaseModel):
    id: str
    object: Literal["job"]
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    created_at: int
    filter: str | None
    prompt: str
    n: int
    done: int
    size: str
    seconds: float
    error: ErrorDetail | None
    result: Images | None


class Jobs(BaseModel):
    object: Literal["list"]
    data: list[Job]


class DocumentAnswer(BaseModel):
    id: str
    object: Literal["document"]
    width: int
    height: int
    bytes: int
    created_at: int


class Deleted(BaseModel):
    id: str
    object: Literal["document"]
    deleted: bool


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    retouch: dict[str, Any]


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class FilterTotals(BaseModel):
    """What a filter was given and is done with; device seconds, and dollars at the configured price."""

    succeeded: int
    failed: int
    cancelled: int
    seconds: float
    dollars: float


class Stats(BaseModel):
    """Figures of the server since it was started: of the model's edits, and of `filters` by name. `dollars` are of both."""

    object: Literal["stats"]
    uptime_seconds: float
    model: str
    device: str
    ready: bool
    restarts: int
    price_per_hour: float | None
    price_source: str | None
    queue: dict[str, int]
    step: dict[str, float | None]
    edits: dict[str, int]
    seconds: dict[str, float]
    tokens: dict[str, int]
    filters: dict[str, FilterTotals]
    dollars: float | None
    dollars_per_million_edits: float | None
    latency: dict[str, float] | None
    caches: dict[str, dict[str, Any]]


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    ready: bool


class ServerInfo(BaseModel):
    name: str
    version: str
    extensions: list[str]


class TensorInfo(BaseModel):
    """-1 in the shape: any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelInfo(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]


class SentTensor(BaseModel):
    """`data` is flat or nested; a tensor of `parameters.binary_data_size` bytes has none, it follows the JSON instead."""

    name: str
    datatype: Literal["UINT8", "BOOL", "INT32", "INT64", "FP32", "BYTES"]
    shape: list[int]
    data: list[Any] | None = None
    parameters: dict[str, Any] | None = None


class WantedTensor(BaseModel):
    name: Literal["image", "seed", "usage"]
    parameters: dict[str, Any] | None = None


class InferBody(BaseModel):
    """A request of the Open Inference Protocol. Parameters: `priority`, `timeout`, `binary_data_output`, those of sequences."""

    id: str | None = None
    inputs: list[SentTensor]
    outputs: list[WantedTensor] | None = None
    parameters: dict[str, Any] | None = None


class Inferred(BaseModel):
    id: str | None = None
    model_name: str
    model_version: str
    outputs: list[SentTensor]


class ProtocolError(BaseModel):
    """Whatever is refused under /v2."""

    error: str


_TEXTS = {
    400: "The request cannot be served as it stands.", 401: "No key, or an unknown one.", 403: "The key does not open this.",
    404: "No such model, document or job.", 408: "The body came too slowly.", 413: "Too large.", 415: "A body of another kind.",
    422: "The filter, or an adapter, is not what its file says; who runs the server has to mend that.",
    429: "The queue, what the server holds, or one of the key's limits is full; Retry-After says when to come again.",
    500: "Something went wrong inside.", 503: "The server is starting or stopping, or its model's process is lost.",
    504: "The deadline cannot be met, or has passed.",
}  # fmt: skip

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in _TEXTS.items()
}

NOT_KEPT: dict[int | str, dict[str, Any]] = {507: {"model": ErrorAnswer, "description": "There is no place for the document."}}


def some(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Those of ERRORS that an endpoint answers."""
    return {status: ERRORS[status] for status in statuses}


def protocol(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The same under /v2; all of them, where none is named."""
    return {status: {"model": ProtocolError, "description": _TEXTS[status]} for status in statuses or _TEXTS}


EVENT = {
    "type": "object", "required": ["event", "data"],
    "description": "One event; its data is JSON, in which the event's name is the type.",
    "properties": {"event": {"type": "string"}, "data": {"type": "string", "contentMediaType": "application/json"}},
}  # fmt: skip
STREAM: dict[str, Any] = {"content": {"text/event-stream": {"schema": EVENT}}}
FILE = {"type": "string", "format": "binary"}


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """`requestBody` of an endpoint that reads JSON by itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _schema(model)}}}}


def edit_body() -> dict[str, Any]:
    """`requestBody` of an edit, in both forms."""
    form = _schema(EditFields)
    form["properties"] |= {
        "image": {**FILE, "description": "the picture to edit; further ones (image[]) are looked at"},
        "image[]": {"type": "array", "items": FILE, "maxItems": 16},
        "mask": {**FILE, "description": "where to edit; of the picture's own size"},
    }
    content = {"multipart/form-data": {"schema": form}, "application/json": {"schema": _schema(EditJson)}}
    return {"requestBody": {"required": True, "content": content}}


def generation_body() -> dict[str, Any]:
    return json_body(Fields)


def infer_body() -> dict[str, Any]:
    """`requestBody` of an inference: JSON, or JSON that is followed by binary tensors."""
    body = json_body(InferBody)
    body["requestBody"]["content"]["application/octet-stream"] = {"schema": FILE}
    return body


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """Without references to definitions, which OpenAPI keeps elsewhere."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inlined(node: Any) -> Any:
        if isinstance(node, list):
            return [inlined(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inlined(definitions[node["$ref"].rsplit("/", 1)[-1]])
        return {key: inlined(value) for key, value in node.items()}

    made = inlined(schema)
    assert isinstance(made, dict)
    return made
