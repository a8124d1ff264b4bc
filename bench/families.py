"""What a step takes in every family: `python bench/families.py`.

Random weights at a small common shape: one edit of a 512 x 512 picture, width 256, a few blocks. Side by side on the same
modules, in turn: one call of diffusers' own transformer or UNet on the tokens of this edit; a step of Retouch that computes
every cell (packing, schedule and re-noising included); the same with a partial step (`Options.refresh`) and with the masked
cells alone (`Options.whole=False`), where the family has those, over a mask of 11 %. In float32 the first two are compared:
`difference` is relative. Guidance by a second pass is off. Text encoders and autoencoders are the tiny ones of the tests, and
are not timed. Rows are added to results/families.jsonl; a family that cannot be built is an ERROR row.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

from retouch import record
from retouch.edit import Edit
from retouch.engine.engine import Engine
from retouch.models.adapter import Adapter
from retouch.models.base import Job
from retouch.models.checkpoint import FAMILIES
from retouch.models.options import Options
from retouch.models.packing import Packed, Segment
from retouch.record import Record
from timing import Clock, Spread
from variants import box_mask

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

SUITE = "families"
LARGER: dict[str, dict[str, Any]] = {
    "flux1": {"num_layers": 2, "num_single_layers": 4, "axes_dims_rope": (16, 24, 24)},
    "flux2": {"num_layers": 2, "num_single_layers": 4, "axes_dims_rope": (16, 16, 16, 16)},
    "qwen": {"num_layers": 4, "axes_dims_rope": (16, 24, 24)},
    "sdxl": {"block_out_channels": (64, 128), "norm_num_groups": 8, "attention_head_dim": (4, 8)},
}
"""Family -> what its tests' tiny denoiser is enlarged by; transformers get 4 heads of 64."""

WIDTH = {"attention_head_dim": 64, "num_attention_heads": 4}
MODES = {"whole": Options(), "partial": Options(refresh="1,100"), "masked alone": Options(whole=False)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--families", nargs="+", default=list(FAMILIES), help="pipeline classes (all)")
    add("--side", type=int, default=512, help="of the picture (%(default)s)")
    add("--rounds", type=int, default=15, help="(%(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="(%(default)s)")
    add("--out", type=Path, default=ROOT / "results" / f"{SUITE}.jsonl", help="rows are added (%(default)s)")
    args = parser.parse_args(argv)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = record.environment("", args.dtype, torch.get_num_threads())
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(
        "pipeline", "tokens", "stock ms", "whole", "partial", "masked alone", "difference", box=None, title_justify="left"
    )
    for name in args.families:
        try:
            rows = measured(name, args.side, args.rounds, getattr(torch, args.dtype), device, where)
        except Exception as error:  # one that fails does not take the others with it
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            rows = [Record(SUITE, "step", None, "s", error=reason, **where, extra={"pipeline": name})]
        record.append(args.out, rows)
        table.add_row(name, *cells(rows))
    console.print(table)
    console.print(f"Beside each step the stock time over its own. Rows in {args.out}")
    return 0


def measured(
    name: str, side: int, rounds: int, dtype: torch.dtype, device: torch.device, where: dict[str, Any]
) -> list[Record]:
    models = {mode: built(name, options, dtype, device) for mode, options in modes(name).items()}
    jobs = {mode: begun(model, side) for mode, model in models.items()}
    whole, job = models["whole"], jobs["whole"]
    call = STOCK[FAMILIES[name].adapter](whole, job)
    runs: dict[str, Callable[[], object]] = {"stock": torch.inference_mode()(call)}
    runs |= {mode: lambda mode=mode: models[mode].step([jobs[mode]]) for mode in models}  # type: ignore[misc]
    off = difference(whole, job, call) if FAMILIES[name].adapter != "sdxl" and dtype == torch.float32 else None
    clock, seconds = Clock(device), {mode: [] for mode in runs}
    for turn in range(rounds + 2):
        for mode, go in runs.items():
            started = clock()
            go()
            if turn >= 2:
                seconds[mode].append(clock() - started)
    tokens = {mode: len(jobs[mode].fresh) if mode == "partial" else len(jobs[mode].cells) for mode in models}
    extra = {"pipeline": name, "family": FAMILIES[name].adapter, "side": side, "text": len(job.prompt.embedded)}
    rows = []
    for mode, values in seconds.items():
        s = Spread.of(values)
        said = extra | {"mode": mode, "tokens": tokens.get(mode, len(job.cells))}
        rows.append(Record(SUITE, "step", s.median, "s", s.low, s.high, s.n, **where, extra=said))
        if mode != "stock":
            ratio = Spread.of([stock / own for stock, own in zip(seconds["stock"], values, strict=True)])
            rows.append(Record(SUITE, "speedup", ratio.median, "x", ratio.low, ratio.high, ratio.n, **where, extra=said))
    if off is not None:
        rows.append(Record(SUITE, "difference", off, "relative", **where, extra=extra | {"mode": "whole"}))
    return rows


def modes(name: str) -> dict[str, Options]:
    family = FAMILIES[name]
    return {"whole": MODES["whole"]} if family.adapter == "sdxl" else MODES


def built(name: str, options: Options, dtype: torch.dtype, device: torch.device) -> Adapter:
    """As the family's tests make it, with a larger denoiser of the same weights each time."""
    family = FAMILIES[name]
    tests = importlib.import_module("tiny" if family.adapter == "flux2" else f"test_{family.adapter}")
    unet = (9 if "Inpaint" in name else 4, "epsilon", "XL" in name)
    given = {"flux1": (name == "FluxFillPipeline",), "flux2": (name == "Flux2Pipeline",), "sdxl": unet}.get(family.adapter, ())
    parts = tests.parts(*given)
    denoiser = "unet" if family.adapter == "sdxl" else "transformer"
    kind, config = type(parts[denoiser]), dict(parts[denoiser].config)
    torch.manual_seed(0)
    larger = config | LARGER[family.adapter] | ({} if denoiser == "unet" else WIDTH)
    parts[denoiser] = kind.from_config(larger).to(device, dtype).eval()
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.to(device, dtype)
    if family.adapter == "flux2":
        guided = {"embeds_guidance": True, "guidance": 4.0, "max_sequence_length": 128} if name == "Flux2Pipeline" else {}
        return tests.model(name, {"masked": False, **guided}, options)
    return tests.model(*unet, name=name, options=options) if family.adapter == "sdxl" else tests.model(name, options)


def begun(model: Adapter, side: int) -> Job:
    """A masked edit after its first step, which is a full one. It has as many steps as the bench may want."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    guidance = None if model.family.guidance is None or model.family.embeds_guidance else 1.0
    job = Engine(model).admit(Edit(image, "a red apple", box_mask(side, 0.11, rng), steps=100, guidance=guidance))
    model.step([job])
    return job


def difference(model: Adapter, job: Job, call: Callable[[], Tensor]) -> float:
    """Of our velocities to the stock ones, relative."""
    with torch.inference_mode():
        ours, theirs = model._denoise(Packed([Segment(job, job.prompt)])), call()[0]
        count = len(job.cells)
        return float((ours[:count] - theirs[:count]).norm() / theirs[:count].norm())


def flux2(model: Adapter, job: Job) -> Callable[[], Tensor]:
    segment, text = Segment(job, job.prompt), job.prompt.embedded[None]
    pack = Packed([segment])
    ids, words = pack.positions(), text.shape[1]
    common = {
        "encoder_hidden_states": text.to(model.dtype), "timestep": pack.sigmas().to(model.dtype), "txt_ids": ids[None, :words],
        "guidance": torch.full((1,), job.guidance, device=model.device) if model.family.embeds_guidance else None,
        "return_dict": False,
    }  # fmt: skip
    image = {"hidden_states": pack.image(model.dtype)[None], "img_ids": ids[None, words:]}
    if not model.family.cached:
        return lambda: model.denoiser(**common, **image)[0]
    document, place = job.document.tokens.flatten(0, 1)[None].to(model.dtype), ids[None, words:].clone()
    place[..., 0] = 10
    with torch.inference_mode():
        _, cache = model.denoiser(
            **common, hidden_states=torch.cat([document, image["hidden_states"]], 1), kv_cache_mode="extract",
            img_ids=torch.cat([place, image["img_ids"]], 1), num_ref_tokens=document.shape[1],
        )  # fmt: skip
    return lambda: model.denoiser(**common, **image, kv_cache=cache, kv_cache_mode="cached")[0]


def flux1(model: Adapter, job: Job) -> Callable[[], Tensor]:
    pack, words = Packed([Segment(job, job.prompt)]), len(job.prompt.embedded)
    ids = pack.positions()[:, :3]
    pooled: Any = job.prompt.pooled
    given = {
        "hidden_states": pack.image(model.dtype)[None], "encoder_hidden_states": pack.text(model.dtype)[None],
        "pooled_projections": pooled[None].to(model.dtype), "timestep": pack.sigmas().to(model.dtype),
        "guidance": torch.full((1,), job.guidance, device=model.device), "txt_ids": ids[:words], "img_ids": ids[words:],
    }  # fmt: skip
    return lambda: model.denoiser(**given, return_dict=False)[0]


def qwen(model: Adapter, job: Job) -> Callable[[], Tensor]:
    pack, (rows, columns) = Packed([Segment(job, job.prompt)]), job.document.tokens.shape[:2]
    pictures = 1 + len(job.document.reference) // (rows * columns)
    given = {
        "hidden_states": pack.image(model.dtype)[None], "encoder_hidden_states": pack.text(model.dtype)[None],
        "timestep": pack.sigmas().to(model.dtype), "img_shapes": [[(1, rows, columns)] * pictures],
    }  # fmt: skip
    return lambda: model.denoiser(**given, return_dict=False)[0]


def sdxl(model: Adapter, job: Job) -> Callable[[], Tensor]:
    size = (job.document.tokens.shape[0], job.document.tokens.shape[1])
    segment: Any = Segment(job, job.prompt)
    image = segment.noisy.T.unflatten(1, size)[None].to(model.dtype)
    served: Any = model
    given = {
        "encoder_hidden_states": job.prompt.embedded[None].to(model.dtype),
        "added_cond_kwargs": served._added([segment], size), "return_dict": False,
    }  # fmt: skip
    return lambda: model.denoiser(image, torch.full((1,), 500.0), **given)[0]


STOCK = {"flux1": flux1, "flux2": flux2, "qwen": qwen, "sdxl": sdxl}
"""Family -> a call of its diffusers denoiser, as its pipeline makes it, on the tokens of a job."""


def cells(rows: Sequence[Record]) -> list[str]:
    if rows[0].error:
        return ["", f"ERROR {rows[0].error}"[:60], "", "", "", ""]
    at = {(row.name, row.extra.get("mode")): row for row in rows}
    shown = [str(at["step", "whole"].extra["tokens"]), f"{1e3 * (at['step', 'stock'].value or 0):.1f}"]
    for mode in MODES:
        row, ratio = at.get(("step", mode)), at.get(("speedup", mode))
        shown.append("" if row is None or ratio is None else f"{1e3 * (row.value or 0):.1f}  {ratio.value or 0:.2f} x")
    off = at.get(("difference", "whole"))
    return [*shown, "" if off is None else f"{off.value or 0:.0e}"]


if __name__ == "__main__":
    sys.exit(main())
