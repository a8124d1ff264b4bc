"""`/v2`: the Open Inference Protocol with Triton's binary tensors, as `tritonclient` speaks it.

Sources: https://github.com/kserve/open-inference-protocol (required API), and Triton Inference Server's
docs/protocol/extension_binary_data.md, extension_parameters.md and extension_schedule_policy.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version as version_of
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from retouch.picture import Picture
from retouch.serve import schema
from retouch.serve.budget import Claim
from retouch.serve.errors import BadRequest, NotFound, WrongContentType, of_validation
from retouch.serve.forms import EditFields, parsed
from retouch.serve.images import asker, while_connected
from retouch.serve.orders import Order, order_of
from retouch.serve.runs import Run
from retouch.serve.service import Service, check_pixels, seed_of
from retouch.serve.settings import Tenant

router = APIRouter(prefix="/v2", tags=["open inference protocol"])

HEADER = "Inference-Header-Content-Length"

VERSION = "1"
"""Of the one model; a server with other weights is another server."""

DTYPES = {"UINT8": np.uint8, "BOOL": np.bool_, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}

FITTING = {"u": "iu", "i": "iu", "b": "biu", "f": "iuf"}
"""Kind of a datatype -> kinds of numbers in JSON that it may be given as."""

INPUTS = {
    "image": ("UINT8", [-1, -1, -1]), "mask": ("BOOL", [-1, -1]), "prompt": ("BYTES", [1]), "seed": ("INT64", [1]),
    "n": ("INT32", [1]), "num_inference_steps": ("INT32", [1]), "guidance_scale": ("FP32", [1]),
    "negative_prompt": ("BYTES", [1]),
}  # fmt: skip
"""Name -> (datatype, shape). image (height, width, 3 or 4) and prompt are needed; a mask may be UINT8 too, 0 = leave alone."""

OUTPUTS = {"image": ("UINT8", [-1, -1, -1, -1]), "seed": ("INT64", [-1]), "usage": ("BYTES", [1])}


@dataclass(frozen=True, slots=True)
class Tensor:
    datatype: str
    array: np.ndarray

    def one(self, name: str) -> Any:
        """The only element. Raises BadRequest."""
        if self.array.size != 1:
            raise BadRequest(f"{name} has {self.array.size} elements; give one.", name)
        return self.array.reshape(-1)[0]


@router.get("/health/live", response_model=schema.Live)
async def live() -> Response:
    """The process answers."""
    return JSONResponse({"live": True})


@router.get("/health/ready", response_model=schema.Ready, responses={503: {"model": schema.Ready}})
async def ready(request: Request) -> Response:
    """Whether edits are taken."""
    return _readiness(request.app.state.service)


@router.get(
    "/models/{model}/ready", response_model=schema.Ready,
    responses={**schema.protocol(401, 404), 503: {"model": schema.Ready}},
)  # fmt: skip
@router.get("/models/{model}/versions/{version}/ready", include_in_schema=False)
async def model_ready(request: Request, model: str) -> Response:
    """Whether edits of this model are taken."""
    service, _ = asker(request)
    _check_model(request, service, model)
    return _readiness(service)


@router.get("", response_model=schema.ServerInfo)
async def server(request: Request) -> Response:
    """The server and what of the protocol it has."""
    extensions = ["binary_tensor_data", "parameters", "schedule_policy"]
    return JSONResponse({"name": "retouch", "version": version_of("retouch"), "extensions": extensions})


@router.get("/models/{model}", response_model=schema.ModelInfo, responses=schema.protocol(401, 404))
@router.get("/models/{model}/versions/{version}", include_in_schema=False)
async def metadata(request: Request, model: str) -> Response:
    """Inputs and outputs."""
    service, _ = asker(request)
    _check_model(request, service, model)
    tensors = [
        [{"name": name, "datatype": kind, "shape": shape} for name, (kind, shape) in table.items()]
        for table in (INPUTS, OUTPUTS)
    ]
    return JSONResponse(
        {"name": model, "versions": [VERSION], "platform": "retouch", "inputs": tensors[0], "outputs": tensors[1]}
    )


@router.post(
    "/models/{model}/infer", response_model=schema.Inferred, openapi_extra=schema.infer_body(),
    responses={200: {"content": {"application/octet-stream": {"schema": schema.FILE}}}, **schema.protocol()},
)  # fmt: skip
@router.post("/models/{model}/versions/{version}/infer", include_in_schema=False)
async def infer(request: Request, model: str) -> Response:
    """One request of n edits. `parameters`: `priority` (1 is highest, 0 the default) and `timeout` in microseconds."""
    service, tenant = asker(request)
    _check_model(request, service, model)
    head, inputs = await _read(request)
    wanted, binary = _wanted(head)
    claim = service.pixels.claim()
    try:
        order = await run_in_threadpool(_order, service, tenant, head, inputs, claim)
    except BaseException:
        claim.release()
        raise
    run = service.begin(order, tenant, raw=True)
    await while_connected(request, run)
    return await run_in_threadpool(_response, model, head.get("id"), run, wanted, binary)


def _readiness(service: Service) -> Response:
    up = service.worker.ready and not service.draining
    return JSONResponse({"ready": up}, 200 if up else 503)


def _check_model(request: Request, service: Service, name: str) -> None:
    """Raises NotFound."""
    service.check_model(name)
    if request.path_params.get("version", VERSION) != VERSION:
        raise NotFound(f"{name} has no version {request.path_params['version']}; it has version {VERSION}.")


async def _read(request: Request) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON, and the input tensors by name."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise WrongContentType("compressed bodies are not read; send it as it is.")
    return await parsed(request, partial(_parsed, text=request.headers.get(HEADER)))


def _parsed(body: bytes, text: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    text = str(len(body)) if text is None else text
    if not text.isdecimal() or len(text) > 15 or int(text) > len(body):
        raise BadRequest(f"{HEADER} is {text[:20]!r}; the body has {len(body)} bytes.")
    try:
        head = json.loads(body[: int(text)])
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the request is no JSON: {error}.") from error
    if not isinstance(head, dict) or not isinstance(head.get("inputs"), list):
        raise BadRequest("the request has to be an object with a list of inputs.")
    inputs, rest = {}, memoryview(body)[int(text) :]
    for entry in head["inputs"]:
        name, tensor, rest = _tensor(entry, rest)
        if name in inputs:
            raise BadRequest(f"{name} is given twice; give it once.", name)
        inputs[name] = tensor
    if len(rest):
        raise BadRequest(f"the body has {len(rest)} bytes that belong to no input.")
    return head, inputs


def _tensor(entry: Any, rest: memoryview) -> tuple[str, Tensor, memoryview]:
    name = _name_of(entry)
    if name not in INPUTS:
        raise BadRequest(f"{name!r} is not an input; inputs are {', '.join(INPUTS)}.")
    kind, shape = entry.get("datatype"), entry.get("shape")
    if kind != INPUTS[name][0] and not (name == "mask" and kind == "UINT8"):
        raise BadRequest(f"{name} is {kind}; give {INPUTS[name][0]}.", name)
    if not isinstance(shape, list) or not all(type(side) is int and 0 < side < 2**31 for side in shape):
        raise BadRequest(f"{name}: shape is {shape!r}; give whole numbers above 0.", name)
    size = (entry.get("parameters") or {}).get("binary_data_size")
    try:
        if size is None:
            array = _of_json(kind, entry.get("data"))
        else:
            if type(size) is not int or not 0 <= size <= len(rest):
                raise BadRequest(f"{name}: binary_data_size is {size!r}; {len(rest)} bytes are left.", name)
            array, rest = _of_bytes(kind, rest[:size]), rest[size:]
        return name, Tensor(kind, array.reshape(shape)), rest
    except (ValueError, TypeError, OverflowError) as error:
        raise BadRequest(f"{name} does not fit its datatype and shape: {error}.", name) from error


def _name_of(entry: Any) -> str:
    """Of an input or an output. Raises BadRequest where it has none, or parameters that are none."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise BadRequest("inputs and outputs are lists of objects, each with a name.")
    if not isinstance(entry.get("parameters") or {}, dict):
        raise BadRequest(f"{entry['name']}: parameters is no object.", entry["name"])
    return str(entry["name"])


def _of_json(kind: str, data: Any) -> np.ndarray:
    if not isinstance(data, list):
        raise ValueError("data is no list")
    if kind == "BYTES":
        return np.array([_text(item) for item in data], dtype=object)
    array, wanted = np.asarray(data), np.dtype(DTYPES[kind])
    if array.dtype.kind not in FITTING[wanted.kind]:
        raise ValueError("data has values of another kind")
    if wanted.kind in "iu" and array.size:
        range_ = np.iinfo(kind.lower())
        if not range_.min <= array.min() <= array.max() <= range_.max:
            raise ValueError("data has values that it cannot hold")
    return array.astype(wanted).reshape(-1)


def _text(item: Any) -> str:
    if not isinstance(item, str):
        raise ValueError("data is no text")
    return item


def _of_bytes(kind: str, data: memoryview) -> np.ndarray:
    if kind != "BYTES":
        return np.frombuffer(data, DTYPES[kind])
    items, at = [], 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if end > len(data):
            raise ValueError("a text is longer than its tensor")
        items.append(bytes(data[at + 4 : end]).decode())
        at = end
    return np.array(items, dtype=object)


def _wanted(head: dict[str, Any]) -> tuple[list[str], set[str]]:
    """Names of the outputs, and those that go as bytes."""
    parameters = head.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise BadRequest("parameters is no object.", "parameters")
    if not isinstance(head.get("id") or "", str):
        raise BadRequest("id is no text.", "id")
    outputs = head.get("outputs")
    if outputs is None:
        return list(OUTPUTS), set(OUTPUTS) if parameters.get("binary_data_output") is True else set()
    if not isinstance(outputs, list) or not {_name_of(one) for one in outputs} <= OUTPUTS.keys():
        raise BadRequest(f"outputs: give a list of objects with a name; outputs are {', '.join(OUTPUTS)}.", "outputs")
    binary = {one["name"] for one in outputs if (one.get("parameters") or {}).get("binary_data") is True}
    return [one["name"] for one in outputs] or list(OUTPUTS), binary


def _order(service: Service, tenant: Tenant, head: dict[str, Any], inputs: dict[str, Tensor], claim: Claim) -> Order:
    for name in ("image", "prompt"):
        if name not in inputs:
            raise BadRequest(f"the input {name} is missing; give it.", name)
    fields: dict[str, Any] = {"prompt": inputs["prompt"].one("prompt"), **_schedule(head)}
    if "negative_prompt" in inputs:
        fields["negative_prompt"] = inputs["negative_prompt"].one("negative_prompt")
    for name in ("seed", "n", "num_inference_steps", "guidance_scale"):
        if name in inputs:
            fields[name] = inputs[name].one(name).item()
    try:
        asked = EditFields(**fields)
    except ValueError as error:
        raise of_validation(error) from error  # type: ignore[arg-type]
    photo = inputs["image"].array
    if photo.ndim != 3 or photo.shape[2] not in (3, 4):
        raise BadRequest(f"image is {list(photo.shape)}; give height, width, and 3 or 4.", "image")
    mask = inputs["mask"].array != 0 if "mask" in inputs else None
    picture = Picture(photo)
    claim.take(check_pixels(picture.size, tenant) * (1 + asked.n))  # its own answers are pixels too
    steps, side = service.info["steps"], service.info["max_side"]
    return order_of(asked, picture, mask, (), tenant, steps, side, seed_of(asked), claim)


def _schedule(head: dict[str, Any]) -> dict[str, Any]:
    parameters = head.get("parameters") or {}
    priority, timeout = parameters.get("priority", 0), parameters.get("timeout", 0)
    if not all(type(value) is int and value >= 0 for value in (priority, timeout)):
        raise BadRequest("priority and timeout are whole numbers, 0 or more.", "parameters")
    urgency = max(1, 100 - priority) if priority else 0
    return {"priority": urgency, "deadline_ms": max(1, min(86_400_000, timeout // 1000)) if timeout else None}


def _response(model: str, key: Any, run: Run, wanted: list[str], binary: set[str]) -> Response:
    images = np.stack([image for image in run.images if image is not None])
    seeds = np.array([answer["seed"] for answer in run.answers if answer is not None], np.int64)
    usage = json.dumps(run.response()["usage"]).encode()
    arrays: dict[str, Any] = {"image": images, "seed": seeds, "usage": usage}
    outputs, blobs = [], []
    for name in wanted:
        value, kind = arrays[name], OUTPUTS[name][0]
        shape = [1] if kind == "BYTES" else list(value.shape)
        entry: dict[str, Any] = {"name": name, "datatype": kind, "shape": shape}
        if name in binary:
            blob = len(value).to_bytes(4, "little") + value if kind == "BYTES" else value.tobytes()
            entry["parameters"] = {"binary_data_size": len(blob)}
            blobs.append(blob)
        else:
            entry["data"] = [value.decode()] if kind == "BYTES" else value.reshape(-1).tolist()
        outputs.append(entry)
    head: dict[str, Any] = {"model_name": model, "model_version": VERSION, "outputs": outputs}
    if key is not None:
        head["id"] = key
    text = json.dumps(head).encode()
    if not blobs:
        return Response(text, media_type="application/json")
    return Response(b"".join((text, *blobs)), media_type="application/octet-stream", headers={HEADER: str(len(text))})
