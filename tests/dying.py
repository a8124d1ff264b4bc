"""A worker's process around the counting model of test_engine, which does in a stage what the prompt says.

"die in step", "die once in finish", "fail in encode" (with an error that no pipe can carry), "lose once in step" (the device),
"jam" (with an answer no pipe can carry), and "slow" steps. Stages are take, encode, preview, step and finish. What has been
done once is remembered by files in the folder `options.cache`; while there is one named `hold` in it, no step is done. Of
`options.model`, "broken" is never loaded, "mortal" once only, and "slow" not while there is that file.

`python tests/dying.py MODEL FOLDER END` is a server that prints its worker's process id and then ends: by its own `return`,
by an `error`, or when it is killed (`wait`).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from retouch.edit import Edit
from retouch.engine import process, worker
from retouch.engine.worker import Options, Worker
from retouch.models.base import Frame
from test_engine import Model

INFO = {"steps": 4, "max_side": 512, "cell": 16, "dtype": "float32", "device": "cpu", "guidance": None, "threads": 1}


class Unreadable(Exception):
    """Holds what cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Dying(Model):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def frame(self, edit: Edit) -> Frame:
        self.at("take", edit)
        return super().frame(edit)

    def start(self, edit: Edit, *others: Any) -> Any:
        self.at("encode", edit)
        return super().start(edit, *others)

    def step(self, jobs: list[Any]) -> None:
        while (self.folder / "hold").exists():
            time.sleep(0.002)
        for job in jobs:
            self.at("step", job.edit)
        super().step(jobs)

    def preview(self, job: Any) -> Any:
        self.at("preview", job.edit)
        return super().preview(job)

    def finish(self, job: Any) -> Any:
        self.at("finish", job.edit)
        if job.edit.prompt == "jam":
            job.usage.approximate = (threading.Lock(),)
        return super().finish(job)

    def at(self, stage: str, edit: Edit) -> None:
        words = edit.prompt.split()
        if words == ["slow"] and stage == "step":
            time.sleep(0.01)
        if words[-1] != stage or ("once" in words and not first(self.folder / f"{stage}.{edit.seed}")):
            return
        if words[0] == "fail":
            raise Unreadable(stage)
        if words[0] == "lose":
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        os.kill(os.getpid(), signal.SIGKILL)


def first(mark: Path) -> bool:
    """Whether this has not happened yet."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def load(options: Options) -> tuple[Any, dict[str, Any]]:
    from retouch.engine.engine import Engine

    assert options.cache is not None
    while options.model == "slow" and (options.cache / "hold").exists():
        time.sleep(0.002)
    if options.model == "broken" or (options.model == "mortal" and not first(options.cache / "loaded")):
        os.kill(os.getpid(), signal.SIGKILL)
    model: Any = Dying(options.cache)
    return Engine(model, tokens=options.tokens, queue=options.queue, beside=options.beside or 0), INFO


def serve(connection: Connection, options: Options) -> None:
    process.load_engine = load
    process.serve(connection, options)


def main(model: str, folder: str, end: str) -> None:
    if model != "retouch-mini":
        worker.serve = serve
    kept = Worker(Options(model, cache=Path(folder), beside=0))
    if end == "load":
        spawned = kept._spawn

        def spawn() -> Connection:
            connection = spawned()
            print(kept.pid, flush=True)
            return connection

        kept._spawn = spawn  # type: ignore[method-assign]
    kept.start()
    print(kept.pid, flush=True)
    sys.modules["kept"] = SimpleNamespace(worker=kept)  # type: ignore[assignment]
    if end == "wait":
        threading.Event().wait()
    if end == "error":
        raise ValueError("as was asked for")


if __name__ == "__main__":
    main(*sys.argv[1:])
