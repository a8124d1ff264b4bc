"""`retouch train mini`: from packages to the bundled checkpoint, stage by stage, each resumable where it was killed."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinKVPipeline

from retouch.edit import InvalidOption
from retouch.models import checkpoint
from retouch.models.device import choose as choose_device
from retouch.train import autoencoder, distill, flow, kept, text
from retouch.train.card import model_card
from retouch.train.data import Source
from retouch.train.loop import Stage
from retouch.train.scenes import Scenes
from retouch.train.sheets import edit_sheet

log = logging.getLogger(__name__)

STATISTICS = 800
"""Pictures from which the encoder is solved."""

STAGES = ("decoder", "flow", "distill")


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of each stage. `scenes` counts those of 128 x 128; larger ones are fewer by their area."""

    decoder: int = 2000
    flow: int = 3000
    distill: int = 160
    scenes: int = 5000
    seed: int = 0


def main(argv: list[str]) -> int:
    plan = Plan()
    parser = argparse.ArgumentParser(prog="retouch train mini", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("work"), help="checkpoints, scenes, sheets of one run (%(default)s)")
    parser.add_argument("--data", type=Path, help="where the packages with the pictures are kept (WORK/data)")
    parser.add_argument("--out", type=Path, help="the checkpoint's folder (WORK/retouch-mini)")
    parser.add_argument("--start", help="go on from this checkpoint's weights: a bundled name or a directory (from nothing)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (%(default)s: a GPU where there is one)")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="stop after this stage, and write what is there")
    for name, value in asdict(plan).items():
        what = {"scenes": "scenes of 128 px", "seed": "of data, noise and weights"}.get(name, "steps")
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} (%(default)s)")
    args = parser.parse_args(argv)
    logging.getLogger("retouch").setLevel(logging.INFO)
    plan = Plan(**{name: getattr(args, name) for name in asdict(plan)})
    if min(asdict(plan).values()) < 0:
        raise InvalidOption("steps, scenes and seed cannot be negative.")
    run(
        plan,
        args.work,
        args.data or args.work / "data",
        args.out or args.work / "retouch-mini",
        args.device,
        args.until,
        args.start,
    )
    return 0


def run(plan: Plan, work: Path, data: Path, out: Path, device_name: str, until: str, start: str | None = None) -> None:
    """All stages up to `until`. After flow and after distillation the checkpoint is written, the teacher's as OUT-teacher.

    With `start`, every part begins as that checkpoint has it, and its encoder stays; a stage of no steps is left out. Raises
    InvalidOption where `work` holds what was made with other settings.
    """
    device, last = choose_device(device_name), STAGES.index(until)
    torch.manual_seed(plan.seed)
    begun = None if start is None else checkpoint.find(start)
    origin: kept.Settings = {"start": None if begun is None else f"{begun.name} ({kept.digest_of(begun)})"}
    source = Source(data)
    parts = _built(source, plan.seed, work) if start is None else _read(start)
    vae, tokenizer, encoder, transformer = (parts[name] for name in ("vae", "tokenizer", "text_encoder", "transformer"))
    stage = Stage("decoder", plan.decoder, lr=1e-3, muon=3e-3, samples=7, ema=0.998, after=origin)
    autoencoder.train_decoder(vae, source, stage, work, device, plan.seed)
    if last == 0:
        return
    scenes = Scenes(vae, source, scene_counts(plan.scenes), work, device, plan.seed, after=origin)

    def sheet(path: Path) -> None:
        edit_sheet(pipeline_of(parts), source, path)

    origin = {**origin, "scenes": plan.scenes}
    stage = Stage("flow", plan.flow, lr=1e-3, muon=2e-3, samples=64, warmup=100, ema=0.998, sheet_every=500, after=origin)
    first_share = flow.FIRST_SHARE if start is None else 0.0
    flow.train_flow(transformer, encoder, tokenizer, scenes, stage, work, device, sheet, plan.seed, first_share)
    trained = {name: getattr(plan, name) for name in STAGES[: last + 1]}
    taught = {name: trained[name] for name in STAGES[:2]}
    write(parts, out.with_name(out.name + "-teacher"), distill.TEACHER_STEPS, taught, device, start)
    if last >= 2:
        origin = {**origin, "flow": plan.flow}
        stage = Stage("distill", plan.distill, lr=2e-4, samples=48, warmup=50, ema=0.99, sheet_every=200, after=origin)
        distill.train_distilled(transformer, encoder, tokenizer, scenes, stage, work, device, sheet, plan.seed)
    write(parts, out, distill.STEPS, trained, device, start)


def _built(source: Source, seed: int, work: Path) -> dict[str, Any]:
    vae, tokenizer = autoencoder.build(), text.build_tokenizer()
    encoder, transformer = text.build_encoder(tokenizer), flow.build_transformer(4 * autoencoder.LATENT_CHANNELS)
    autoencoder.prepare_encoder(vae, source, work / "encoder.pt", seed, STATISTICS)
    return {"vae": vae, "tokenizer": tokenizer, "text_encoder": encoder, "transformer": transformer}


def _read(start: str) -> dict[str, Any]:
    pipeline, _ = checkpoint.read(checkpoint.find(start), torch.float32)
    return {name: pipeline.components[name] for name in ("vae", "tokenizer", "text_encoder", "transformer")}


def scene_counts(base: int) -> dict[tuple[int, int], int]:
    """How many scenes of each size: as many pixels for a share as at 128 x 128."""
    shares = flow.SIZES
    most = shares[128, 128]
    return {
        size: max(24, round(base * share / most * (128 * 128 / (size[0] * size[1])) ** 0.5)) for size, share in shares.items()
    }


def pipeline_of(parts: dict[str, Any]) -> Flux2KleinKVPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=flow.SHIFT)
    return Flux2KleinKVPipeline(scheduler=scheduler, **parts)


def write(
    parts: dict[str, Any], out: Path, steps: int, trained: dict[str, int], device: torch.device, start: str | None = None
) -> None:
    """The diffusers directory in bfloat16, and `retouch.json`, which says how it is run."""
    kept = {name: part.state_dict() for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    kept = {name: {k: v.detach().float().cpu().clone() for k, v in state.items()} for name, state in kept.items()}
    parts["tokenizer"].backend_tokenizer.no_truncation()  # sample sheets have left it cutting at their last prompt's length
    parts["tokenizer"].backend_tokenizer.no_padding()
    pipeline_of(parts).to("cpu", torch.bfloat16).save_pretrained(out)
    settings = {
        "steps": steps, "guidance": None, "out_layers": text.OUT_LAYERS, "max_sequence_length": text.MAX_LENGTH,
        "pad_prompts": False, "max_side": 512, "grey": True, "masked": True,
    }  # fmt: skip
    (out / "retouch.json").write_text(json.dumps(settings, indent=1) + "\n")
    parameters = {name: sum(p.numel() for p in parts[name].parameters()) for name in kept}
    (out / "README.md").write_text(model_card(steps, parameters, trained, device, start))
    for name, state in kept.items():  # saving has rounded the live weights: give them their precision back
        parts[name].float().load_state_dict(state)
    log.info("wrote %s", out)
