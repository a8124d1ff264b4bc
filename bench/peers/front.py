"""The command line and the HTTP end that peers have in common."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse

from protocol import Ask, Refused, answer, read

PIPELINES = ("klein", "kv", "inpaint")
CROPS = ("none", "cut", "pipeline")


def arguments(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of a FLUX.2 klein checkpoint")
    parser.add_argument("--port", type=int, required=True, help="to listen at, on 127.0.0.1")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of weights (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (%(default)s)")
    parser.add_argument("--pipeline", default="inpaint", choices=PIPELINES, help="%(default)s")
    parser.add_argument(
        "--crop", default="none", choices=CROPS, help="around the mask, cut here or by the pipeline (%(default)s)"
    )
    return parser


def app(edit: Callable[[Ask], Awaitable[list[np.ndarray]]]) -> FastAPI:
    """The two endpoints around a coroutine that answers one request."""
    made = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    made.add_exception_handler(Refused, refusal)

    @made.get("/healthz")
    async def healthz() -> PlainTextResponse:
        return PlainTextResponse("ready")

    @made.post("/v1/images/edits")
    async def edits(request: Request) -> JSONResponse:
        ask = await asked(request)
        return JSONResponse(await asyncio.to_thread(answer, await edit(ask)))

    return made


async def asked(request: Request) -> Ask:
    async with request.form() as form:
        return await read(form)


async def refusal(_: Request, error: Any) -> JSONResponse:
    return JSONResponse(error.body(), error.status)


def serve(made: FastAPI, port: int) -> None:
    """Until SIGTERM, which uvicorn hands on after it has stopped: an exit then lets what is around it clean up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.run(made, host="127.0.0.1", port=port, log_level="warning", access_log=False)


def run(main: Callable[[], None]) -> None:
    """A script's end: whatever stops it from starting is its last line, and an exit status of 1."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
    try:
        main()
    except Exception as error:  # the reason is a row of the comparison
        traceback.print_exc()
        print(f"{Path(sys.argv[0]).name}: {type(error).__name__}: {' '.join(str(error).split())[:500]}", file=sys.stderr)
        sys.exit(1)
