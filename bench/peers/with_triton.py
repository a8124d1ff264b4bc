"""Triton Inference Server (its dynamic batcher, through nvidia-pytriton) around a pipeline, behind a small facade.

The facade speaks HTTP, cuts the crop and pastes; what goes to Triton is one row a picture: the crop, its mask, prompt, seed and
steps. Triton puts requests of equal shapes into one batch, and calls back into this process.
"""

from __future__ import annotations

import os
import socket
import sysconfig
from typing import Any

import numpy as np
import torch
from pytriton.client import AsyncioModelClient
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

import front
from protocol import MAX_N, Ask, crop_box
from stock import Stock, batching_sides, examples

INPUTS = (
    Tensor(name="image", dtype=np.uint8, shape=(-1, -1, 3)),
    Tensor(name="mask", dtype=np.bool_, shape=(-1, -1)),
    Tensor(name="prompt", dtype=np.bytes_, shape=(1,)),
    Tensor(name="seed", dtype=np.int64, shape=(1,)),
    Tensor(name="steps", dtype=np.int32, shape=(1,)),
)
OUTPUTS = (Tensor(name="picture", dtype=np.uint8, shape=(-1, -1, 3)),)


def inference(stock: Stock) -> Any:
    """What Triton calls with the requests of a batch: each is one Ask, its rows are the variations."""

    def infer(requests: list[Any]) -> list[dict[str, np.ndarray]]:
        asks = [
            Ask(one["image"][0], one["mask"][0], one["prompt"][0, 0].decode(), len(one["seed"]), int(one["seed"][0, 0]),
                int(one["steps"][0, 0]) or None)
            for one in requests
        ]  # fmt: skip
        return [{"picture": np.stack(pictures)} for pictures in stock.edit_all(asks)]

    return infer


def rows_of(ask: Ask, box: tuple[int, int, int, int]) -> dict[str, np.ndarray]:
    x0, y0, x1, y1 = box
    rows = {
        "image": ask.image[y0:y1, x0:x1],
        "mask": ask.mask[y0:y1, x0:x1],
        "prompt": np.array([ask.prompt.encode()], np.bytes_),
        "steps": np.array([ask.steps or 0], np.int32),
    }
    repeated = {name: np.repeat(value[None], ask.n, axis=0) for name, value in rows.items()}
    return {**repeated, "seed": ask.seed + np.arange(ask.n, dtype=np.int64)[:, None]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    parser = front.arguments(__doc__)
    parser.add_argument("--wait", type=float, default=0.05, metavar="SECONDS", help="for more of one shape (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # Triton's Python stub is linked to libpython3.x of the system; with this interpreter's own library it starts.
    os.environ["LD_LIBRARY_PATH"] = sysconfig.get_config_var("LIBDIR")
    sides = batching_sides(args.pipeline, args.crop)
    stock = Stock(args.model, args.pipeline, args.dtype)
    stock.most = 1 if args.crop == "none" else stock.MOST
    for ask in examples():
        stock.edit(ask)
    ports = {"http_port": free_port(), "grpc_port": free_port(), "metrics_port": free_port()}
    with Triton(
        config=TritonConfig(http_address="127.0.0.1", allow_grpc=False, allow_metrics=False, exit_timeout_secs=1, **ports)
    ) as triton:
        batcher = DynamicBatcher(max_queue_delay_microseconds=round(args.wait * 1e6))
        config = ModelConfig(max_batch_size=MAX_N, batcher=batcher)
        triton.bind("edits", inference(stock), INPUTS, OUTPUTS, config=config)
        triton.run()
        clients: list[AsyncioModelClient] = []  # one, made in the loop that uses it

        async def edit(ask: Ask) -> list[np.ndarray]:
            if not clients:
                clients.append(AsyncioModelClient(f"http://127.0.0.1:{ports['http_port']}", "edits", inference_timeout_s=600))
            height, width = ask.mask.shape
            box = crop_box(ask.mask, sides=sides) if args.crop == "cut" else (0, 0, width, height)
            made = await clients[0].infer_batch(**rows_of(ask, box))
            pictures = [ask.image.copy() for _ in range(ask.n)]
            for picture, crop in zip(pictures, made["picture"], strict=True):
                picture[box[1] : box[3], box[0] : box[2]] = crop
            return pictures

        try:
            front.serve(front.app(edit), args.port)
        except SystemExit:
            triton.stop()
            os._exit(0)  # nvidia-pytriton's sockets hold up the interpreter's end for ever


if __name__ == "__main__":
    front.run(main)
