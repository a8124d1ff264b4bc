"""`/v1/jobs`: edits that are asked for now and fetched later."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from retouch.serve import schema
from retouch.serve.images import asker, edit_order, told
from retouch.serve.schema import ERRORS, some

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

SOME = some(401, 404)


@router.post("", status_code=202, response_model=schema.Job, openapi_extra=schema.edit_body(), responses=ERRORS)
async def create(request: Request) -> Response:
    """Ask for an edit or a filter, with the fields of `/v1/images/edits`. Its previews are in the events."""
    service, tenant = asker(request)
    order = await edit_order(request, service, tenant, stream=True)
    run = service.begin(order, tenant, request.scope["retouch.arrived"], job=True)
    service.keep(run)
    return JSONResponse(run.described(), 202, {"Location": f"/v1/jobs/{run.id}"})


@router.get("", response_model=schema.Jobs, responses={401: ERRORS[401]})
async def listed(request: Request) -> Response:
    """Jobs that are kept, newest first, without their pictures."""
    service, tenant = asker(request)
    own = [run.described(whole=False) for run in reversed(service.jobs.values()) if run.tenant.name == tenant.name]
    return JSONResponse({"object": "list", "data": own})


@router.get("/{job}", response_model=schema.Job, responses=SOME)
async def read(request: Request, job: str) -> Response:
    """A job, with its pictures when it has succeeded."""
    service, tenant = asker(request)
    return JSONResponse(service.job(job, tenant).described())


@router.delete("/{job}", response_model=schema.Job, responses=SOME)
async def cancel(request: Request, job: str) -> Response:
    """Cancel a job at its next step; one that has ended is forgotten."""
    service, tenant = asker(request)
    run = service.job(job, tenant)
    if run.ended:
        del service.jobs[job]
    run.cancel()
    return JSONResponse(run.described(whole=False))


@router.get("/{job}/events", response_class=StreamingResponse, responses={200: schema.STREAM, **SOME})
async def events(request: Request, job: str) -> Response:
    """All that happened to a job and what is going to, as server-sent events, until it has ended."""
    service, tenant = asker(request)
    run = service.job(job, tenant)
    return StreamingResponse(told(run, jobs=True), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
