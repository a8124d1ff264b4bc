"""`retouch models`: which families are served, what each has of the fast path, and what a checkpoint is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open

from retouch.edit import CheckpointMismatch
from retouch.models import checkpoint, single_file
from retouch.models.checkpoint import FAMILIES, Family
from retouch.models.families import adapter_of
from retouch.models.options import Options
from retouch.models.weights import files_of

COLUMNS = {
    "pipeline": "pipeline", "steps": "steps", "packing": "packing", "masked": "masked cells", "document": "kept of a document",
    "prompt": "kept prompt", "decode": "crop decode", "outside": "outside", "guidance": "guidance", "references": "references",
    "refresh": "refresh", "adapters": "LoRA",
}  # fmt: skip
"""Name in JSON -> heading."""

WIDTH = 200
"""Columns of the table where no terminal says how many there are."""

LEGEND = (
    "masked cells: computing the mask alone; exact where the checkpoint was trained so, else lossy and off by default.\n"
    "refresh: partial steps between full ones, lossy and off by default. references: further pictures beside the document.\n"
    f"crop decode: decoding the mask's bounds and {Options().halo} px around them alone, on by default.\n"
    "kept prompt: what an encoded one serves again. outside: pixels outside the mask; exact: the picture's own, bit for bit."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Raises UnknownCheckpoint, CheckpointMismatch."""
    parser = argparse.ArgumentParser("retouch models", "retouch models [options]", __doc__, allow_abbrev=False)
    parser.add_argument("--model", metavar="X", help="what this one is: a bundled name, a directory, a file or a hub name")
    parser.add_argument("--base", metavar="DIR", help="where such a file's configs are: a pipeline directory or a hub name")
    parser.add_argument("--json", action="store_true", help="the same, for programs")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()  # of parts that no family here uses
    found = rows() if args.model is None else described(args.model, args.base)
    if args.json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
    elif isinstance(found, list):
        show(found)
    else:
        _show_one(found)
    return 0


def rows() -> list[dict[str, Any]]:
    """Of every pipeline class, and of the checkpoints that come along."""
    bundled = {path.parent.name: checkpoint.family_of(path.parent)[1] for path in checkpoint.BUNDLED.glob("*/model_index.json")}
    return [row(name, family) for name, family in (bundled | FAMILIES).items()]


def row(name: str, family: Family) -> dict[str, Any]:
    """Of one pipeline class or checkpoint, by the names of COLUMNS."""
    adapter = adapter_of(family)
    traits = asdict(adapter.traits(family))
    left = not (family.cached and family.masked)
    said = {
        "pipeline": name, "steps": family.steps, **traits, "refresh": adapter.refreshes and left, "adapters": adapter.adapts,
    }  # fmt: skip
    return {column: said[column] for column in COLUMNS}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(*COLUMNS.values(), box=None, pad_edge=False)
    for one in rows:
        table.add_row(*(_said(one[name]) for name in COLUMNS))
    console = Console(width=None if Console().is_terminal else WIDTH)
    console.print(table)
    console.print(LEGEND, highlight=False)


def described(name: str, base: str | None = None) -> dict[str, Any]:
    """A checkpoint: its row, how it is run, and the weights of its parts by the heads of their files, which are not loaded.

    Of a hub name, as model or base, only what says how it is run is fetched; of its weights is known what lies in the hub's
    cache. Raises UnknownCheckpoint, CheckpointMismatch, InvalidOption.
    """
    path = checkpoint.find(name, weights=False)
    folder = checkpoint.base_of(path, base, weights=False)
    pipeline, family, index = checkpoint.family_of(folder)
    parts = [part for part, value in index.items() if isinstance(value, list)]
    files = {part: _files(folder / part, index[part][0]) for part in parts}
    if path != folder:
        held = single_file.parts_of(single_file.names_of(path), parts)
        files = {path.name: [path]} | {part: files[part] for part in parts if part not in held}
    weights = {part: counted for part, found in files.items() if (counted := _weights(found))["parameters"]}
    return {"model": name, "family": family.adapter, **row(pipeline, family), "run": asdict(family), "weights": weights}


def _files(folder: Path, library: str | None) -> list[Path]:
    """Those that are read of a part; none where it has none, as a tokenizer."""
    try:
        return files_of(folder, library or "")
    except CheckpointMismatch:
        return []


def _weights(files: list[Path]) -> dict[str, Any]:
    """Numbers and dtypes in .safetensors files, a damaged one left out: loading says what is wrong with it."""
    count, kinds = 0, set()
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                parts = [tensors.get_slice(key) for key in tensors.keys()]  # noqa: SIM118  no mapping
                count += sum(prod(part.get_shape()) for part in parts)
                kinds |= {part.get_dtype() for part in parts}
        except (OSError, SafetensorError):
            continue
    return {"parameters": count, "dtype": ", ".join(sorted(kinds))}


def _show_one(found: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("model", f"{found['model']}, a {found['pipeline']} ({found['family']}.py)")
    for name in list(COLUMNS)[1:]:
        table.add_row(COLUMNS[name], _said(found[name]))
    for name in ("max_side", "max_sequence_length"):
        table.add_row(name.replace("_", " "), f"{found['run'][name]:,}")
    for part, counted in found["weights"].items():
        table.add_row(part, f"{counted['parameters'] / 1e6:,.1f} M numbers, {counted['dtype']}")
    Console(width=None if Console().is_terminal else WIDTH).print(table, highlight=False)


def _said(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
