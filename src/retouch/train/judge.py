"""`retouch train judge`: a checkpoint on things that no training has seen. A table, the card's section, a sample sheet."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from retouch import picture
from retouch.edit import InvalidOption
from retouch.models import checkpoint
from retouch.train import figures as measured
from retouch.train.card import JUDGED
from retouch.train.cases import KINDS, REMOVALS, Case, cases, source_of
from retouch.train.classifier import STEPS as CLASSIFIER_STEPS
from retouch.train.classifier import Classifier, train_classifier
from retouch.train.data import Source
from retouch.train.distill import STEPS, TEACHER_STEPS
from retouch.train.figures import Editor, decibels, edited, psnr, round_trip
from retouch.train.scenes import CELL

log = logging.getLogger(__name__)

PHOTOS = Path(__file__).parents[3] / "photos"
TILE, GAP, LINE = 128, 4, 18
SHEET = {"insert": 6, "replace": 6, "recolour": 6, "remove on photos": 3, "remove on flat": 3}
"""How many edits of each kind the sample sheet shows; three in a row."""

Load = Callable[..., Editor]
"""`retouch.load`: (name, dtype, device) -> an engine. It is handed in, as the engine's room lies above this one."""


def main(argv: list[str], load: Load) -> int:
    args = _parser().parse_args(argv)
    logging.getLogger("retouch").setLevel(logging.INFO)
    if args.n < 1 or args.seed < 0 or args.classifier_steps < 1:
        raise InvalidOption("n and the classifier's steps are at least 1, the seed at least 0.")
    photos = held_out_photos(args.photos)
    card = checkpoint.find(args.checkpoint) / "README.md"
    if args.card:
        with_section(_read_card(card), "")
    if args.sheet:
        picture.check_output(args.sheet, np.zeros((1, 1, 3), np.uint8))
    data = args.data or args.work / "data"
    engine = load(args.checkpoint, dtype=args.dtype, device=args.device)
    teacher = load(args.teacher, dtype=args.dtype, device=args.device) if args.teacher else None
    place = engine.model.device
    classifier = train_classifier(lambda: Source(data), args.work, place, args.classifier_steps)
    rows = judge(engine, source_of(data, photos), classifier, args.n, args.seed, teacher, args.sheet)
    show(rows)
    if args.card:
        how = f"`--n {args.n} --seed {args.seed}`, {str(engine.model.dtype).removeprefix('torch.')} on {place.type}"
        card.write_text(with_section(_read_card(card), markdown(rows, how)))
        log.info("wrote %s", card)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="retouch train judge", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", nargs="?", default="retouch-mini", help="a bundled name or a directory (%(default)s)")
    add("--teacher", help="a directory to take the 28 steps (the checkpoint itself)")
    add("--n", type=int, default=64, help="edits a figure (%(default)s)")
    add("--seed", type=int, default=0, help="of scenes and noise (%(default)s)")
    add("--sheet", type=Path, help="a PNG of 24 of the edits: before, mask, after, truth")
    add("--card", action="store_true", help=f"rewrite what stands between the two {JUDGED} in the checkpoint's README.md")
    add("--work", type=Path, default=Path("work"), help="where the classifier is kept (%(default)s)")
    add("--data", type=Path, help="where the packages with the pictures are kept (WORK/data)")
    add("--photos", type=Path, default=PHOTOS, help="the held-out photos (those of the repository)")
    add("--classifier-steps", type=int, default=CLASSIFIER_STEPS, help="steps it trains for, once (%(default)s)")
    add("--dtype", default="auto", help="auto, float32 or bfloat16 (%(default)s)")
    add("--device", default="auto", help="(%(default)s)")
    return parser


def held_out_photos(folder: Path) -> list[np.ndarray]:
    """Every photo of `folder`, (H, W, 3) uint8, cut to whole cells."""
    paths = sorted(folder.glob("*.jpg"))
    if not paths:
        raise InvalidOption(f"there are no .jpg photos in {folder}; give the folder of the held-out photos with --photos.")
    photos = [picture.read(path).pixels[..., :3] for path in paths]
    return [photo[: photo.shape[0] // CELL * CELL, : photo.shape[1] // CELL * CELL] for photo in photos]


def judge(
    engine: Editor, source: Source, classifier: Classifier, n: int = 64, seed: int = 0, teacher: Editor | None = None,
    sheet: Path | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """All figures as flat rows; `source` has the held-out photos as its own (`cases.source_of`).

    `teacher` takes its own 28 steps over the same edits with the same noise; without one, `engine` itself does.
    """
    model = engine.model
    log.info("autoencoder")
    figures = [decibels("autoencoder, photos", [psnr(round_trip(model, p), p) for p in source.photos], target=30)]
    asked = {kind: cases(source, kind, n, seed) for kind in KINDS}
    stickers = [case.edit.image for kind in REMOVALS for case in asked[kind]]
    figures.append(decibels("autoencoder, held-out stickers", [psnr(round_trip(model, p), p) for p in stickers]))
    log.info("crop decode")
    figures += measured.crop_figures(model, source.photos, seed)
    answers = {}
    for kind in KINDS:
        log.info("%s: %d edits of %d steps", kind, n, STEPS)
        answers[kind] = edited(engine, asked[kind], STEPS)
    for kind, target in zip(REMOVALS, (22, 30), strict=True):
        figures += measured.removal_figures(kind, model, asked[kind], answers[kind], target)
    figures += measured.insertion_figures(model, classifier, asked["insert"], answers["insert"])
    figures += measured.change_figures(classifier, asked, answers)
    figures += measured.classifier_figures(classifier, source, seed)
    log.info("%d steps", TEACHER_STEPS)
    figures += measured.teacher_figures(teacher or engine, classifier, asked, answers, "teacher" if teacher else "itself")
    if sheet:
        picture.write(sheet, judged_sheet(asked, answers))
    return [asdict(figure) for figure in figures]


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table("figure", "value", "target", "n", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        colour = "" if row["target"] is None else "green" if row["value"] >= row["target"] else "red"
        table.add_row(*_cells(row), style=colour)
    Console().print(table)


def _cells(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Name, value with spread and unit, target and whether it is met, n."""
    whole = row["unit"] == "levels"
    value = f"{row['value']:.0f}" if whole else f"{row['value']:.1f} ± {row['spread']:.1f}"
    target = "" if row["target"] is None else f"{row['target']:g}, {'met' if row['value'] >= row['target'] else 'missed'}"
    return row["name"], f"{value} {row['unit']}", target, str(row["n"])


def markdown(rows: Sequence[Mapping[str, Any]], how: str) -> str:
    """The rows as the card's table. `how` says with which options they were made."""
    lines = [f"Judged by `retouch train judge` ({how}). The ± is half of the mean's 95 % interval.", ""]
    lines += ["| figure | value | target | n |", "|---|---:|---:|---:|"]
    return "\n".join([*lines, *(f"| {' | '.join(_cells(row))} |" for row in rows)])


def _read_card(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidOption(f"{path} cannot be read ({error.strerror}); write the model card before its table.") from error


def with_section(card: str, section: str) -> str:
    """`card` with `section` between its two marks. Raises InvalidOption where it has no two."""
    parts = card.split(JUDGED)
    if len(parts) != 3:
        raise InvalidOption(f"the model card has {len(parts) - 1} lines `{JUDGED}`; put two where the table shall stand.")
    return f"{parts[0]}{JUDGED}\n{section}\n{JUDGED}{parts[2]}"


def judged_sheet(asked: Mapping[str, Sequence[Case]], answers: Mapping[str, Sequence[np.ndarray]]) -> np.ndarray:
    """(H, W, 3) uint8: three edits a row, each as before, mask, after, truth under its prompt."""
    chosen = [(kind, i) for kind, count in SHEET.items() for i in range(min(count, len(asked[kind])))]
    wide, high = 4 * (TILE + GAP) + 3 * GAP, LINE + TILE + 2 * GAP
    page = Image.new("RGB", (3 * wide + GAP, LINE + -(-len(chosen) // 3) * high), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for place, (kind, index) in enumerate(chosen):
        x, y = GAP + place % 3 * wide, LINE + place // 3 * high
        if place < 3:
            for column, title in enumerate(("before", "mask", "after", "truth")):
                draw.text((x + column * (TILE + GAP), 2), title, "grey", font)
        case = asked[kind][index]
        draw.text((x, y + 2), f"{kind.split()[0]}: {case.edit.prompt}", "black", font)
        mask = np.repeat(measured.mask_of(case)[..., None] * np.uint8(255), 3, axis=2)
        for column, one in enumerate((case.edit.image, mask, answers[kind][index], case.truth)):
            page.paste(_fitted(one), (x + column * (TILE + GAP), y + LINE))
    return np.asarray(page)


def _fitted(image: np.ndarray) -> Image.Image:
    """(H, W, 3) uint8 in the middle of a grey tile, its shape kept."""
    scale = TILE / max(image.shape[:2])
    size = [max(1, round(length * scale)) for length in image.shape[1::-1]]
    tile = Image.new("RGB", (TILE, TILE), "lightgrey")
    tile.paste(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC), ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    return tile
