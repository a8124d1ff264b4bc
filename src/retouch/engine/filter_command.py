"""`retouch filter`: one-shot filters from the command line, through the same engine as every edit."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from retouch import picture
from retouch.edit import Edit, InvalidOption, RetouchError
from retouch.engine.filters import load_filter
from retouch.models.filters import spec as specs

GROUP = 8
"""Pictures that are held together; what is written of one group stays, whatever becomes of the next."""


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    if args.list:
        _list()
        return 0
    if args.filter is None or not args.images or args.output is None:
        raise InvalidOption("give a filter, pictures and where to write: retouch filter upscale in.png -o out.png (or --list).")
    images = [Path(image) for image in args.images]
    pairs = list(zip(images, _outputs(images, Path(args.output)), strict=True))
    spec = specs.read(specs.find(args.filter))
    photos = _read(pairs[:GROUP], spec)
    engine = load_filter(args.filter)
    for first in range(0, len(pairs), GROUP):
        photos = photos if first == 0 else _read(pairs[first : first + GROUP], spec)
        edited = engine.edit([Edit(photo.pixels, spec.name, reuse=False) for photo, _ in photos])
        for (photo, path), one in zip(photos, edited, strict=True):
            picture.write(path, one.image, like=photo)
            height, width = one.image.shape[:2]
            print(f"{path}  {width} x {height}, {sum(one.usage.seconds.values()):.2f} s", flush=True)
    return 0


def _read(pairs: Sequence[tuple[Path, Path]], spec: specs.Spec) -> list[tuple[picture.Picture, Path]]:
    """Pictures with where each goes, which is checked before time is spent on any."""
    photos = [(picture.read(image), path) for image, path in pairs]
    for photo, path in photos:
        picture.check_output(path, _like(photo.pixels, spec))
    return photos


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidOption(f"{message}; see retouch filter --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "retouch filter", allow_abbrev=False,
        description="Run a one-shot filter on pictures. Filters are described by TOML files (docs/filters.md).",
    )  # fmt: skip
    add = parser.add_argument
    add("filter", nargs="?", help="a name of --list, or the path of a .toml")
    add("images", nargs="*", metavar="image", help="the pictures; several need a folder to write to")
    add("-o", "--output", metavar="FILE", help=".png, .webp (both exact) or .jpg; a folder for several pictures")
    add("--list", action="store_true", help="which filters there are, and which can run here")
    return parser


def _outputs(images: Sequence[Path], output: Path) -> list[Path]:
    """In a folder, a picture keeps its name and becomes a PNG."""
    if not output.is_dir():
        if len(images) > 1:
            raise InvalidOption(f"{len(images)} pictures need a folder to be written to; {output} is none. Make it first.")
        return [output]
    paths = [output / f"{image.stem}.png" for image in images]
    if len(set(paths)) < len(paths):
        raise InvalidOption("two of the pictures have the same name; write them to folders of their own.")
    if taken := [path for path, image in zip(paths, images, strict=True) if path.resolve() == image.resolve()]:
        raise InvalidOption(f"{taken[0]} would be written over; give another folder.")
    return paths


def _like(pixels: np.ndarray, spec: specs.Spec) -> np.ndarray:
    """What stands for the answer when its file's name is checked: its size, and its alpha where it has one."""
    channels = 4 if spec.output.kind == "mask" else pixels.shape[2]
    height, width = (side * spec.output.scale for side in pixels.shape[:2])
    return np.broadcast_to(np.uint8(0), (height, width, channels))


def _list() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("filter", "what it does", "here", box=None, pad_edge=False)
    for name, path in specs.bundled().items():
        spec = specs.read(path)
        table.add_row(name, spec.about, _standing(spec, path))
    Console().print(table)


def _standing(spec: specs.Spec, path: Path) -> str:
    """`yes`, or what is to be done for it."""
    try:
        weights = specs.weights_of(spec, path)
    except RetouchError:
        return spec.weights.install
    if weights.suffix == ".onnx" and importlib.util.find_spec("onnxruntime") is None:
        return "pip install 'retouch[filters]'"
    return "yes"
