"""`/v2`: the Open Inference Protocol with Triton's binary tensors, as `tritonclient` speaks it.

Sources: https://github.com/kserve/open-inference-protocol (required API), and Triton Inference Server's
docs/protocol/extension_parameters.md and extension_schedule_policy.md; tensors.py for the tensors.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version as version_of
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from retouch.picture import Picture
from retouch.serve import schema, tensors
from retouch.serve.budget import Claim
from retouch.serve.errors import BadRequest, NotFound, WrongContentType, of_validation
from retouch.serve.filters import Served, filter_order
from retouch.serve.forms import SMALL, EditFields, parsed
from retouch.serve.images import asker, while_connected
from retouch.serve.orders import Order, order_of
from retouch.serve.runs import Run
from retouch.serve.service import Service, seed_of
from retouch.serve.settings import Tenant
from retouch.serve.tensors import Tensor
from retouch.serve.uploads import check_pixels

router = APIRouter(prefix="/v2", tags=["open inference protocol"])

MOST_NUMBERS = 1 << 22
"""Of an output image in JSON: 1,024 px a side with alpha. As bytes it may have any number."""

VERSION = "1"
"""Of the one model; a server with other weights is another server."""


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
    _filter_of(request, service, model)
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
    filter = _filter_of(request, service, model)
    inputs = tensors.INPUTS if filter is None else {name: tensors.INPUTS[name] for name in tensors.OF_FILTERS}
    told = [
        [{"name": name, "datatype": kind, "shape": shape} for name, (kind, shape) in table.items()]
        for table in (inputs, tensors.OUTPUTS)
    ]
    return JSONResponse({"name": model, "versions": [VERSION], "platform": "retouch", "inputs": told[0], "outputs": told[1]})


@router.post(
    "/models/{model}/infer", response_model=schema.Inferred, openapi_extra=schema.infer_body(),
    responses={200: {"content": {"application/octet-stream": {"schema": schema.FILE}}}, **schema.protocol()},
)  # fmt: skip
@router.post("/models/{model}/versions/{version}/infer", include_in_schema=False)
async def infer(request: Request, model: str) -> Response:
    """One request of n edits, or of a picture to a filter. `parameters`: `priority` (1 is highest, 0 the default) and
    `timeout` in microseconds.
    """
    service, tenant = asker(request)
    filter = _filter_of(request, service, model)
    head, inputs = await _read(request)
    wanted, binary = tensors.wanted(head)
    claim = service.pixels.claim()
    try:
        order = await run_in_threadpool(_order, service, tenant, head, inputs, claim, filter)
        numbers = _numbers(order, filter) if "image" in {*wanted} - binary else 0
        if numbers > MOST_NUMBERS:
            raise BadRequest(
                f"the image has {numbers:,} numbers, more than the {MOST_NUMBERS:,} that are answered as JSON; "
                "ask for it as bytes: parameters with binary_data_output true, or the output's binary_data.", "outputs"
            )  # fmt: skip
    except BaseException:
        claim.release()
        raise
    request.scope["retouch.body"].release()
    answers = claim.part(order.pixels)
    try:
        run = service.begin(order, tenant, request.scope["retouch.arrived"], raw=True)
        key = head.get("id")
        del order, head, inputs  # of which the run lets go at its end
        await while_connected(request, run)
        async with service.parsing if numbers > SMALL else nullcontext():
            return await run_in_threadpool(_response, model, key, run, wanted, binary)
    finally:
        answers.release()


def _numbers(order: Order, filter: Served | None) -> int:
    """Of the output image. What cuts out, answers with alpha whatever it was given."""
    cut = filter is not None and filter.kind == "mask"
    return order.pixels * (4 if cut else order.photo.pixels.shape[2])


def _readiness(service: Service) -> Response:
    up = service.worker.ready and not service.draining
    return JSONResponse({"ready": up}, 200 if up else 503)


def _filter_of(request: Request, service: Service, name: str) -> Served | None:
    """None where it is the model. Raises NotFound."""
    filter = service.filter_of(name)
    if request.path_params.get("version", VERSION) != VERSION:
        raise NotFound(f"{name} has no version {request.path_params['version']}; it has version {VERSION}.")
    return filter


async def _read(request: Request) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON, and the input tensors by name."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise WrongContentType("compressed bodies are not read; send it as it is.")
    return await parsed(request, partial(tensors.read, text=request.headers.get(tensors.HEADER)))


def _order(
    service: Service, tenant: Tenant, head: dict[str, Any], inputs: dict[str, Tensor], claim: Claim, filter: Served | None
) -> Order:
    for name in ("image", "prompt") if filter is None else ("image",):
        if name not in inputs:
            raise BadRequest(f"the input {name} is missing; give it.", name)
    fields: dict[str, Any] = _schedule(head)
    for name in ("prompt", "negative_prompt"):
        if name in inputs:
            fields[name] = inputs[name].one(name)
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
    if filter is not None:
        filter.check(asked, 1, mask is not None)
    held = 1 if filter is not None else 1 + asked.n  # the model's answers are pixels too
    claim.take(check_pixels((photo.shape[1], photo.shape[0]), tenant) * held)
    picture = Picture(photo.copy())  # binary tensors are views of the body, all of which they would keep
    if filter is not None:
        return filter_order(asked, picture, mask, tenant, filter, claim)
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
    images = [image for image in run.images if image is not None]
    image = images[0][None] if len(images) == 1 else np.stack(images)
    seeds = np.array([answer["seed"] for answer in run.answers if answer is not None], np.int64)
    usage = json.dumps(run.response()["usage"]).encode()
    arrays: dict[str, Any] = {"image": image, "seed": seeds, "usage": usage}
    outputs, blobs = tensors.written(arrays, wanted, binary)
    head: dict[str, Any] = {"model_name": model, "model_version": VERSION, "outputs": outputs}
    if key is not None:
        head["id"] = key
    text = json.dumps(head).encode()
    if not blobs:
        return Response(text, media_type="application/json")
    return Response(b"".join((text, *blobs)), media_type="application/octet-stream", headers={tensors.HEADER: str(len(text))})
