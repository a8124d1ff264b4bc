"""`/v1/documents`: pictures that are sent once and named in every later edit."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from retouch.edit import ImageTooLarge, InvalidImage
from retouch.serve import schema
from retouch.serve.errors import BadRequest, WrongContentType, about
from retouch.serve.forms import multipart
from retouch.serve.images import asker
from retouch.serve.schema import FILE, NOT_KEPT, some
from retouch.serve.uploads import Upload

router = APIRouter(prefix="/v1/documents", tags=["documents"])

SOME = some(401, 404)
FORM = {"type": "object", "properties": {"file": FILE, "purpose": {"type": "string"}}, "required": ["file"]}
BODY = {
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {**FORM, "additionalProperties": False}}}}
}
TAKES = {**some(400, 401, 408, 413, 415, 429, 503), **NOT_KEPT}


@router.post("", status_code=201, response_model=schema.DocumentAnswer, openapi_extra=BODY, responses=TAKES)
async def create(request: Request) -> Response:
    """Upload a picture. The same file has the same id; it is kept as long as there is room."""
    service, tenant = asker(request)
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise WrongContentType("send multipart/form-data with the picture as file.")
    async with multipart(request, max_files=2, max_fields=4) as form:
        for name in form:
            if name not in ("file", "purpose"):
                raise BadRequest(f"{name} is not a field of this request; send file.", name)
        file = form.get("file")
        if not isinstance(file, UploadFile) or len(form.getlist("file")) > 1:
            raise BadRequest("file is missing, no file, or given twice; send one picture.", "file")
        if (file.size or 0) > service.settings.file:
            raise about("file", ImageTooLarge(f"the file has {(file.size or 0) / 1e6:.0f} MB; save it smaller."))
        data = await file.read()
    try:
        key, upload = await service.uploads.add(data, tenant)
    except InvalidImage as error:
        raise about("file", error) from error
    return JSONResponse(_described(key, upload), 201, {"Location": f"/v1/documents/{key}"})


@router.get("/{document}", response_model=schema.DocumentAnswer, responses=SOME)
async def read(request: Request, document: str) -> Response:
    """What is known of a document."""
    service, tenant = asker(request)
    return JSONResponse(_described(document, await service.uploads.find(document, tenant)))


@router.get(
    "/{document}/content", response_class=Response,
    responses={200: {"content": {"image/png": {"schema": FILE}}}, **some(400, 401, 404, 413, 429)},
)  # fmt: skip
async def content(request: Request, document: str) -> Response:
    """The picture, upright, as PNG."""
    service, tenant = asker(request)
    data = await service.uploads.content(document, tenant)
    return Response(data, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})


@router.delete("/{document}", response_model=schema.Deleted, responses=SOME)
async def delete(request: Request, document: str) -> Response:
    """Forget a document."""
    service, tenant = asker(request)
    await service.uploads.find(document, tenant)
    await run_in_threadpool(service.uploads.forget, document)
    return JSONResponse({"id": document, "object": "document", "deleted": True})


def _described(key: str, upload: Upload) -> dict[str, Any]:
    width, height = upload.size
    return {
        "id": key, "object": "document", "width": width, "height": height, "bytes": upload.bytes, "created_at": upload.created,
    }  # fmt: skip
