"""Ray Serve around a pipeline: one replica, whose `@serve.batch` collects requests; those of one shape share a call."""

from __future__ import annotations

import argparse
import asyncio
import signal
import threading
from typing import Any

import numpy as np
import ray
import torch
from fastapi.responses import JSONResponse, PlainTextResponse
from ray import serve
from starlette.requests import Request

import front
from protocol import Ask, Refused, answer
from stock import Stock, batching_sides, examples


def deployment(args: argparse.Namespace) -> Any:
    """The application. What takes time runs in threads, so that the replica goes on collecting."""

    @serve.deployment(num_replicas=1, max_ongoing_requests=4 * args.batch, ray_actor_options={"num_cpus": args.threads})
    class Edits:
        def __init__(self) -> None:
            torch.set_num_threads(args.threads)
            self.stock = Stock(args.model, args.pipeline, args.dtype, args.crop, batching_sides(args.pipeline, args.crop))
            for ask in examples():
                self.stock.edit(ask)

        @serve.batch(max_batch_size=args.batch, batch_wait_timeout_s=args.wait)
        async def edit(self, asks: list[Ask]) -> list[list[np.ndarray]]:
            return await asyncio.to_thread(self.stock.edit_all, asks)

        async def __call__(self, request: Request) -> Any:
            if request.url.path == "/healthz":
                return PlainTextResponse("ready")
            try:
                ask = await front.asked(request)
            except Refused as error:
                return JSONResponse(error.body(), error.status)
            return JSONResponse(await asyncio.to_thread(answer, await self.edit(ask)))

    return Edits.bind()


def main() -> None:
    parser = front.arguments(__doc__)
    parser.add_argument("--batch", type=int, default=4, help="requests that Ray Serve collects (%(default)s)")
    parser.add_argument("--wait", type=float, default=0.05, metavar="SECONDS", help="for more of them (%(default)s)")
    args = parser.parse_args()
    args.model = args.model.resolve()
    ray.init(num_cpus=args.threads + 1, include_dashboard=False, configure_logging=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": args.port})
        serve.run(deployment(args), route_prefix="/")
        stopped = threading.Event()
        for name in (signal.SIGTERM, signal.SIGINT):  # after Ray has set its own, which abort
            signal.signal(name, lambda *_: stopped.set())
        stopped.wait()
        serve.shutdown()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    front.run(main)
