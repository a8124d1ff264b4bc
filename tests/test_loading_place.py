"""Where weights lie: parts that take turns on the device, layers over several devices, and pages that processes share."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import retouch
import tiny
from retouch.cli import main
from retouch.edit import Edit, InvalidOption
from retouch.engine.engine import Engine
from retouch.engine.process import load_engine
from retouch.engine.worker import Options as Asked
from retouch.models import lora, mapped
from retouch.models.options import Options
from retouch.passes import offload
from retouch.passes.offload import Stages, offloaded, parts_of
from retouch.passes.spread import devices_of, shares, spread
from retouch.serve import _parser, _settings
from test_lora import linears, weights

CPU = torch.device("cpu")
EXACT = Options(halo=None, feather=0)
FAMILIES = [
    ("Flux2KleinKVPipeline", {}), ("Flux2Pipeline", {}),
    ("FluxFillPipeline", {}), ("FluxKontextPipeline", {}), ("QwenImageEditPipeline", {"guidance": 4.0}),
    ("QwenImageEditPlusPipeline", {"zero_cond_t": True}), ("StableDiffusionXLInpaintPipeline", {}),
]  # fmt: skip


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Parts that are not on the device are on another one, where nothing can be computed: what touches them fails, as it would
    between a GPU and the host. Holds which parts were brought in, in their order.
    """
    brought: list[str] = []
    init, bring = Stages.__init__, Stages.bring

    def beginning(self: Stages, *args: Any) -> None:
        init(self, *args)
        for part in self.slots:
            leave(self, part)

    def leave(self: Stages, part: str) -> None:
        offload._fill(self.slots[part], offload._each(self.hosts[part], lambda host: torch.empty_like(host, device="meta")))

    def bringing(self: Stages, part: str) -> None:
        before = self.here
        bring(self, part)
        if part != before:
            brought.append(part)
            if before:
                leave(self, before)

    monkeypatch.setattr(Stages, "__init__", beginning)
    monkeypatch.setattr(Stages, "bring", bringing)
    return brought


def edits(steps: int = 3) -> list[Edit]:
    photo, mask = tiny.photo(64, 64, 1), np.zeros((64, 64), bool)
    mask[10:40, 20:50] = True
    return [Edit(photo, "a red apple", mask, seed=1, steps=steps), Edit(photo, "a cat", mask, seed=2, steps=steps)]


@pytest.mark.parametrize(("name", "settings"), FAMILIES)
def test_parts_in_turn_give_the_same_answers(name: str, settings: dict[str, Any], elsewhere: list[str]) -> None:
    plain = Engine(tiny.of_family(name, EXACT, **settings)).edit(edits())
    model = offloaded(tiny.of_family(name, EXACT, **settings), CPU)
    modules = [module for part in parts_of(model).values() for module in part]
    assert all(tensor.device.type == "meta" for module in modules for tensor in module.parameters())
    turned = Engine(model).edit(edits())
    assert all(np.array_equal(a.image, b.image) for a, b in zip(plain, turned, strict=True))
    job = Engine(model).admit(edits()[0])
    model.step([job])
    model.preview(job)


def test_steps_that_follow_each_other_move_nothing(elsewhere: list[str]) -> None:
    engine = Engine(offloaded(tiny.model("Flux2KleinPipeline"), CPU))
    engine.edit(edits(steps=2)[:1])
    assert elsewhere == ["autoencoder", "text", "denoiser", "autoencoder"]
    elsewhere.clear()
    engine.edit(edits(steps=9)[1:])
    assert elsewhere == ["text", "denoiser", "autoencoder"], "the document is known"


def test_edits_may_wear_adapters(elsewhere: list[str], tmp_path: Path) -> None:
    name = "Flux2KleinKVPipeline"
    answers = []
    for place in (lambda model: model, lambda model: offloaded(model, CPU)):
        model = tiny.of_family(name, EXACT)
        if not (tmp_path / "ink.safetensors").exists():
            save_file(weights(linears(model.denoiser), 2, 1), tmp_path / "ink.safetensors")
        made = place(lora.adapted(model, getattr(diffusers, name), tmp_path))
        worn = Edit(tiny.photo(64, 64), "a cat", seed=1, steps=2, adapters=(("ink", 1.0),))
        answers.append(Engine(made).edit([worn, edits()[0]]))
    assert all(np.array_equal(a.image, b.image) for a, b in zip(*answers, strict=True))


def test_threads_beside_the_loop_take_turns(elsewhere: list[str]) -> None:
    # One edit a step: which ones share it would be a matter of time, and so would rounding.
    asked = [Edit(tiny.photo(64, 64, i), f"apple {i}", seed=i, steps=3) for i in range(6)]
    plain = Engine(tiny.of_family("Flux2KleinKVPipeline", EXACT), tokens=1).edit(asked)
    turned = Engine(offloaded(tiny.of_family("Flux2KleinKVPipeline", EXACT), CPU), tokens=1, beside=3).edit(asked)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(plain, turned, strict=True))


def test_turns_are_taken_in_the_order_of_coming_and_given_back_after_an_error() -> None:
    stages, order, started = Stages({}, CPU), list[int](), threading.Event()

    def first() -> None:
        started.set()
        while len(stages._turns) < 4:
            time.sleep(0.001)
        stages.run(lambda: None, order.append, -1)  # one within another
        raise RuntimeError("it broke")

    def broken() -> None:
        with pytest.raises(RuntimeError, match="it broke"):
            stages.run(lambda: None, first)

    threads = [threading.Thread(target=broken)]
    threads += [threading.Thread(target=stages.run, args=(lambda: None, order.append, index)) for index in range(3)]
    for count, thread in enumerate(threads, 1):
        thread.start()
        started.wait()
        while len(stages._turns) < count:
            time.sleep(0.001)
            if not threads[0].is_alive():
                break
    for thread in threads:
        thread.join(10)
    assert order == [-1, 0, 1, 2]
    assert not stages._turns


def test_on_a_device_stages_end_with_their_work_done() -> None:
    done: list[str] = []
    Stages({}, CPU).run(lambda: done.append("synchronized"), done.append, "computed")
    assert done == ["computed", "synchronized"]


@pytest.mark.parametrize(("name", "settings"), FAMILIES)
def test_layers_on_several_devices_give_the_same_answers(name: str, settings: dict[str, Any]) -> None:
    """Two names of the one device that there is: that activations go there and back shows by the hooks."""
    plain = Engine(tiny.of_family(name, EXACT, **settings)).edit(edits())
    model = spread(tiny.of_family(name, EXACT, **settings), [CPU, torch.device("cpu", 0)])
    layers = [layer for layer in model.denoiser.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    away = sum(layer.weight.nbytes for layer in layers if hasattr(layer, "_hf_hook"))
    assert 0.35 < away / sum(layer.weight.nbytes for layer in layers) < 0.65
    assert all(np.array_equal(a.image, b.image) for a, b in zip(plain, Engine(model).edit(edits()), strict=True))


def test_shares_are_of_about_equal_size() -> None:
    assert shares([1, 1, 1, 1], 2) == [0, 0, 1, 1]
    assert shares([6, 1, 1, 1, 1, 1, 1], 2) == [0, 1, 1, 1, 1, 1, 1]
    assert shares([5] * 9, 3) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert shares([0, 0], 2) == [0, 0]
    assert shares([], 4) == []


def test_a_device_map_wants_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidOption, match="give balanced or auto"):
        devices_of("sequential", CPU)
    with pytest.raises(InvalidOption, match="several GPUs, and none are"):
        retouch.load(device="cpu", device_map="balanced")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InvalidOption, match="several GPUs, and one is"):
        devices_of("auto", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices_of("auto", torch.device("cuda")) == [torch.device("cuda", i) for i in (0, 1, 2)]
    assert devices_of("balanced", torch.device("cuda", 1)) == [torch.device("cuda", i) for i in (1, 0, 2)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"offload": "disk"}, "give stages"), ({"offload": "stages", "compile": True}, "do not go together"),
        ({"offload": "stages", "device_map": "auto"}, "do not go together"),
    ],
)  # fmt: skip
def test_what_does_not_go_is_refused_before_anything_is_read(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidOption, match=said):
        retouch.load("no-such-model", device="cpu", **options)


def test_the_options_come_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--ledger", "none", "--model", "a.safetensors", "--base", "b", "--offload", "stages", "--device-map", "auto"]
    worker = _settings(_parser().parse_args(asked)).worker
    assert (worker.model, worker.base, worker.offload, worker.device_map) == ("a.safetensors", "b", "stages", "auto")
    assert hasattr(load_engine(Asked(dtype="float32", offload="stages", device="cpu"))[0].model.step, "args"), "it is wrapped"
    photo = "photos/" + sorted(p.name for p in Path("photos").glob("*.jpg"))[0]
    command = ["edit", photo, "-p", "a red apple", "--box", "10,10,40,40", "--dtype", "float32", "--steps", "1"]
    answers = []
    for extra in ([], ["--offload", "stages"]):
        assert main([*command, *extra, "-o", str(tmp_path / "out.png")]) == 0
        answers.append((tmp_path / "out.png").read_bytes())
    assert answers[0] == answers[1]
    assert main([*command, "--device-map", "auto", "-o", str(tmp_path / "out.png")]) == 2
    assert "several GPUs" in capsys.readouterr().err


PRIVATE = """
import numpy as np, re, retouch
engine = retouch.load(dtype="bfloat16", device="cpu")
engine.edit([retouch.Edit(np.zeros((64, 64, 3), np.uint8), "a red apple", steps=1)])
file = None
for line in open("/proc/self/smaps"):
    if re.match("[0-9a-f]+-", line):
        file = line.split("/")[-2] if line.rstrip().endswith(".safetensors") else None
    elif file and line.split(":")[0] in ("Rss", "Shared_Clean", "Private_Dirty"):
        print(file, line.split(":")[0], line.split()[1])
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell")
def test_processes_share_the_pages_of_weights() -> None:
    """This one and another, each having edited: it has no page of its own of what both compute with."""
    engine = retouch.load(dtype="bfloat16", device="cpu")
    engine.edit([Edit(np.zeros((64, 64, 3), np.uint8), "a red apple", steps=1)])
    told = subprocess.run([sys.executable, "-c", PRIVATE], capture_output=True, text=True, check=True).stdout
    found = {(file, kind): int(size) for file, kind, size in (line.split() for line in told.splitlines())}
    assert found["transformer", "Rss"] > 8_000, "kB"
    for part in ("transformer", "text_encoder"):
        assert found[part, "Private_Dirty"] == 0
        assert found[part, "Shared_Clean"] > 0.9 * found[part, "Rss"]


def test_weights_are_mapped_where_the_dtype_is_the_files(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "retouch"):
        model = retouch.load(dtype="bfloat16", device="cpu").model
    told = mapped.counted({name: modules[0] for name, modules in parts_of(model).items()})  # type: ignore[arg-type]
    assert told["denoiser"][0] > 9e6
    assert told["denoiser"][1] == 0
    assert told["text"][1] < 1_000 < told["text"][0], "all but rotary frequencies, which are in no file"
    assert told["autoencoder"][1] > 3e6, "its convolutions are run with channels last"
    assert re.search(r"transformer 9\.\d MB mapped, 0\.0 MB copied", caplog.text)
    model = retouch.load(dtype="float32", device="cpu").model
    told = mapped.counted({name: modules[0] for name, modules in parts_of(model).items()})  # type: ignore[arg-type]
    assert told["denoiser"][0] == 0


def test_where_the_system_does_not_tell_all_counts_as_copied(tmp_path: Path) -> None:
    assert mapped.regions(tmp_path / "nothing") == []
