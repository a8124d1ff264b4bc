"""`retouch demo`: a session of edits on the bundled photos, through plain diffusers and through a Retouch server.

The session is what people do: a few variations, a committed result, several edits of that, one photo after another. Every
path edits the same document: a committed result is Retouch's, for all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import retouch
from retouch import config, picture
from retouch.demo import sheet
from retouch.demo.client import Remote, served
from retouch.demo.session import MAX_SIDE, PATHS, SESSION, Editor, Result, Turn, about, edit_of, run, totals
from retouch.edit import Edit, InvalidOption, OutputFailed

if TYPE_CHECKING:
    from rich.console import Console

    from retouch.models.peer import Peer

PHOTOS = Path(__file__).resolve().parents[3] / "photos"
NARROW = 116
"""Below this many columns of a terminal the table leaves out what only the rows then have."""

STAGES = ("document", "prompt", "start", "step", "finish")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the session, write the sheet and the rows, print the table. Raises RetouchError for whatever it refuses."""
    args = _parser().parse_args(argv)
    if not 1 <= args.edits <= len(SESSION):
        raise InvalidOption(f"--edits is {args.edits}; the session has 1 to {len(SESSION)}.")
    if not 64 <= args.side <= MAX_SIDE:
        raise InvalidOption(f"--side is {args.side}; give 64 to {MAX_SIDE} pixels.")
    session = [(turn, edit_of(turn, Path(args.photos), args.side, args.steps)) for turn in SESSION[: args.edits]]
    out = Path(args.out)
    _make_folder(out.parent)
    picture.check_output(out, session[0][1].image)

    from rich.console import Console

    console = Console(stderr=True)
    # The peers' threads wait as the server's do: what torch is loaded with stays so.
    with console.status("loading the weights twice: for diffusers and for Retouch"), config.sharing():
        engine = retouch.load(args.model, dtype=args.dtype)
        from retouch.models import peer

        plain = peer.load(args.model, engine.model)
    if args.side > plain.model.family.max_side:
        raise InvalidOption(
            f"--side is {args.side}, but {args.model} works on {plain.model.family.max_side}; give that or less."
        )
    with console.status("starting a server"), ExitStack() as opened:
        server = opened.enter_context(served(args.model, args.dtype, args.port))
        stop = opened.pop_all()
    with stop:
        results = _with_progress(Remote(server.address), plain, session, console)
        setting = _setting(args.model, plain, results)
        picture.write(out, sheet.draw(results, setting))
        rows = out.with_suffix(".jsonl")
        _write_rows(rows, [{**_row(index, result), **setting} for index, result in enumerate(results, 1)])
        _report(results, setting)
        print(f"{out}\n{rows}", flush=True)
        if not args.exit:
            print(f"The studio is at {server.address} (Ctrl-C stops it).", flush=True)
            with suppress(KeyboardInterrupt):
                server.process.wait()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "retouch demo",
        allow_abbrev=False,
        description="Edit the bundled photos with diffusers' own pipelines and with a Retouch server, on the same weights.",
    )
    add = parser.add_argument
    add("--model", default="retouch-mini", help="a FLUX.2-klein-KV checkpoint: bundled name, directory or hub name")
    add("--dtype", default="auto", help="float32, bfloat16, or auto, which takes what is fastest on this machine")
    add("--steps", type=int, help="denoising steps (default: the model's own)")
    add("--side", type=int, default=384, help=f"longer side of the photos in pixels, at most {MAX_SIDE} (default 384)")
    add("--edits", type=int, default=len(SESSION), help="only the first so many edits of the session")
    add("--photos", default=str(PHOTOS), metavar="DIR", help="the folder of the bundled photos")
    add("--port", type=int, default=8000, help="of the server; where it is taken, a free one (default 8000)")
    add("--exit", action="store_true", help="stop the server at the end instead of leaving the studio open")
    add("--out", default="out/demo.png", metavar="FILE", help="the contact sheet; the rows go beside it as .jsonl")
    return parser


def _with_progress(engine: Editor, plain: Peer, session: Sequence[tuple[Turn, Edit]], console: Console) -> list[Result]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(PATHS) * (len(session) + 1), completed=-1)
        return run(engine, plain, session, lambda prompt: bar.update(task, advance=1, description=prompt))


def _setting(model: str, plain: Peer, results: Sequence[Result]) -> dict[str, Any]:
    """What all rows have in common."""
    import torch

    return {
        "model": Path(model).name,
        "dtype": str(plain.model.dtype).removeprefix("torch."),
        "device": str(plain.model.device),
        "threads": torch.get_num_threads(),
        "steps": results[0].edited.usage.steps,
    }


def _row(index: int, result: Result) -> dict[str, Any]:
    """One flat row of numbers."""
    turn, usage = result.turn, result.edited.usage
    return {
        "edit": index,
        "kind": turn.kind,
        "photo": turn.photo,
        "prompt": turn.prompt,
        "seed": turn.seed,
        "source": result.source,
        "width": result.mask.shape[1],
        "height": result.mask.shape[0],
        "mask_share": round(float(result.mask.mean()), 4),
        "document_cached": result.cached,
        "prompt_cached": "prompt" in usage.cache_hits,
        "tokens_computed": usage.tokens_computed,
        "tokens_whole": usage.tokens_whole,
        **{f"seconds_{stage}": usage.seconds.get(stage, 0.0) for stage in STAGES},
        "seconds": result.seconds["Retouch"],
        "seconds_inpaint": result.seconds["inpaint"],
        "seconds_kv": result.seconds["KV"],
        "speedup": result.speedup,
        "psnr_inpaint": result.agreement("Retouch", "inpaint"),
        "psnr_kv": result.agreement("Retouch", "KV"),
        "psnr_peers": result.agreement("inpaint", "KV"),
        "outside_identical": True,
    }


def _report(results: Sequence[Result], setting: dict[str, Any]) -> None:
    """The table, what its columns mean, and one plain sentence."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=NARROW + 20)
    table = Table(title=f"{about(setting)}; seconds", title_justify="left", box=box.SIMPLE_HEAD, show_footer=True)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    columns = _columns(results)
    for name, (footer, _) in columns.items():
        wraps = name == "edit"
        style = "bold" if name in ("Retouch", "speed-up") else ""
        table.add_column(name, footer, justify="left" if wraps else "right", no_wrap=not wraps, style=style)
    shown = [name for name in columns if console.width >= NARROW or name not in (*STAGES, "dB")]
    table.columns[:] = [column for column in table.columns if column.header in shown]
    for cells in zip(*(columns[name][1] for name in shown), strict=True):
        table.add_row(*cells)
    console.print(table)

    sums, speedup = totals(results)
    computed, whole = _tokens(results)
    hits = sum(result.cached for result in results)
    notes = [
        "inpaint and KV are Flux2KleinInpaintPipeline and Flux2KleinKVPipeline of diffusers, eager, on the same weights, seeds "
        "and steps; speed-up is against the faster of the two.",
        "Each path had one throwaway edit to warm up, then each edit ran once. Retouch is a server here: its time is what the "
        "openai client waits, with HTTP, PNG and pasting; the pipelines are called directly, and paste for free.",
    ]
    if "dB" in shown:
        notes += [
            "* the document was in the cache.",
            "dB: PSNR inside the mask of Retouch and inpaint, Retouch and KV, inpaint and KV.",
        ]
    notes += [
        f"Outside the mask all {len(PATHS) * len(results)} pictures are their document, bit for bit (checked).",
        f"In short: {len(results)} edits took Retouch {sums['Retouch']:.2f} s and the faster plain pipeline "
        f"{min(sums['inpaint'], sums['KV']):.2f} s, {speedup:.1f} times as fast; Retouch computed {computed / whole:.0%} of "
        f"the image tokens and had the document at hand in {hits} of {len(results)} edits.",
    ]
    for note in notes:
        console.print(note, highlight=False)


def _columns(results: Sequence[Result]) -> dict[str, tuple[str, list[str]]]:
    """Heading -> the total, and a cell for each edit."""
    sums, speedup = totals(results)
    computed, whole = _tokens(results)
    columns = {
        "": ("", [str(number) for number in range(1, len(results) + 1)]),
        "edit": ("total", [result.turn.prompt for result in results]),
    }
    for stage in STAGES:
        spent = [result.edited.usage.seconds.get(stage, 0.0) for result in results]
        marks = ["*" if stage == "document" and result.cached else "" for result in results]
        columns[stage] = (f"{sum(spent):.3f}", [f"{mark}{one:.3f}" for one, mark in zip(spent, marks, strict=True)])
    for path in ("Retouch", "inpaint", "KV"):
        columns[path] = (f"{sums[path]:.3f}", [f"{result.seconds[path]:.3f}" for result in results])
    columns["speed-up"] = (f"{speedup:.1f}x", [f"{result.speedup:.1f}x" for result in results])
    usages = [result.edited.usage for result in results]
    columns["tokens"] = (
        f"{computed:,} / {whole:,}",
        [f"{usage.tokens_computed:,} / {usage.tokens_whole:,}" for usage in usages],
    )
    pairs = (("Retouch", "inpaint"), ("Retouch", "KV"), ("inpaint", "KV"))
    columns["dB"] = ("", [" ".join(f"{result.agreement(*pair):.0f}" for pair in pairs) for result in results])
    return columns


def _tokens(results: Sequence[Result]) -> tuple[int, int]:
    """Image tokens over all edits and steps: those computed, and those of the whole pictures."""
    usages = [result.edited.usage for result in results]
    return sum(usage.tokens_computed for usage in usages), sum(usage.tokens_whole for usage in usages)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputFailed(f"the folder {folder} cannot be made ({error.strerror}); write elsewhere with --out.") from error


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSON lines, whole or not at all."""
    temporary = path.parent / f".retouch-{secrets.token_hex(8)}.tmp"
    try:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputFailed(f"{path} could not be written ({error.strerror}); free space, or write elsewhere.") from error
