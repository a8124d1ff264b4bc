"""Edits over HTTP, as an application sends them: a server of one's own, and the stock `openai` client in front of it."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from retouch import picture
from retouch.edit import Edit, Edited, Usage, WorkerLost

READY = "Retouch serves "
"""How the line begins in which `retouch serve` says its address."""


@dataclass(frozen=True, slots=True)
class Server:
    """A `retouch serve` that runs beside this process."""

    address: str
    process: subprocess.Popen[str]


@contextmanager
def served(model: str, dtype: str, port: int) -> Iterator[Server]:
    """One on `port`, or on a free one where that is taken. Raises WorkerLost where none comes up."""
    server = _start(model, dtype, port) or _start(model, dtype, 0)
    if server is None:
        raise WorkerLost("the demo's server did not start; run `retouch serve` to see why.")
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.wait()


def _start(model: str, dtype: str, port: int) -> Server | None:
    command = [sys.executable, "-m", "retouch.cli", "serve", "--model", model, "--dtype", dtype, "--port", str(port)]
    command += ["--ledger", "none"]  # its edits are nobody's traffic
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE if port else None, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if line.startswith(READY):
        return Server(line.removeprefix(READY).strip(), process)
    process.wait()
    return None


class Remote:
    """Has the engine's `edit`, for masked edits, and takes what the client and the network take."""

    def __init__(self, address: str) -> None:
        from openai import OpenAI

        self.client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)

    def edit(self, edits: Sequence[Edit]) -> list[Edited]:
        return [self._edit(edit) for edit in edits]

    def _edit(self, edit: Edit) -> Edited:
        assert edit.mask is not None
        alpha = np.where(edit.mask, 0, 255).astype(np.uint8)[..., None]
        mask = np.concatenate([np.zeros((*edit.mask.shape, 3), np.uint8), alpha], 2)
        more = {"seed": edit.seed} | ({} if edit.steps is None else {"num_inference_steps": edit.steps})
        answer = self.client.images.edit(
            image=("document.png", picture.encode(edit.image, "PNG"), "image/png"),
            mask=("mask.png", picture.encode(mask, "PNG"), "image/png"),
            prompt=edit.prompt,
            extra_body=more,
        )
        made = (answer.data or [])[0]
        image = picture.read(base64.b64decode(made.b64_json or "")).pixels
        return Edited(image, edit.seed, _usage((answer.usage.model_extra or {})["retouch"] if answer.usage else {}))


def _usage(told: dict[str, Any]) -> Usage:
    return Usage(
        seconds=dict(told["seconds"]), tokens_computed=told["tokens_computed"], tokens_whole=told["tokens_whole"],
        steps=told["steps"], cache_hits=tuple(told["cache_hits"]), dollars=told["dollars"],
    )  # fmt: skip
