"""LitServe around a pipeline: its worker collects up to `--batch` requests, and those of one shape share a call."""

# No `from __future__ import annotations`: LitServe reads the annotations themselves.
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import litserve
import numpy as np
import torch
from fastapi import Depends

import front
from protocol import Ask, Refused, answer
from stock import Stock, batching_sides, examples


class Edits(litserve.LitAPI):
    """Requests are read at the server's end, made and encoded in the worker's process."""

    def __init__(self, model: Path, pipeline: str, dtype: str, crop: str, threads: int, batch: int, wait: float) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=wait, api_path="/v1/images/edits")
        self.settings, self.threads = (model, pipeline, dtype, crop, batching_sides(pipeline, crop)), threads

    def setup(self, device: str) -> None:
        torch.set_num_threads(self.threads)
        self.stock = Stock(*self.settings)
        for ask in examples():
            self.stock.edit(ask)

    def decode_request(self, request: Annotated[Ask, Depends(front.asked)]) -> Ask:
        return request

    def batch(self, inputs: Sequence[Ask]) -> Sequence[Ask]:
        return inputs

    def predict(self, inputs: Any) -> list[list[np.ndarray]]:
        return self.stock.edit_all(inputs) if self.max_batch_size > 1 else self.stock.edit(inputs)

    def unbatch(self, output: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
        return output

    def encode_response(self, output: list[np.ndarray]) -> dict[str, Any]:
        return answer(output)


def main() -> None:
    parser = front.arguments(__doc__)
    parser.add_argument("--batch", type=int, default=4, help="requests that LitServe collects (%(default)s)")
    parser.add_argument("--wait", type=float, default=0.05, metavar="SECONDS", help="for more of them (%(default)s)")
    args = parser.parse_args()
    api = Edits(args.model, args.pipeline, args.dtype, args.crop, args.threads, args.batch, args.wait)
    server = litserve.LitServer(api, accelerator="cpu", devices=1, timeout=False, healthcheck_path="/healthz")
    server.app.add_exception_handler(Refused, front.refusal)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # LitServe ends its processes at Ctrl-C only
    server.run("127.0.0.1", args.port, num_api_servers=1, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    front.run(main)
