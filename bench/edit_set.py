"""Makes the frozen edit set, once: `python bench/edit_set.py --data DIR`, where DIR has the packages of `retouch train`.

Cases are those of the checkpoint's judge (`train/cases.py`): removals of stickers of held-out concepts, and inserts,
replacements and recolourings of seen ones, on photos that no training has seen and on flat grounds. Only photos without a
share-alike licence are used, each in its turn. The seed is not that of `retouch train judge`.

The set is small enough to be shipped: nearly all of its documents have 128 to 192 pixels a side. With `--large` documents are
as large as those that cost is measured on, 512 pixels, so that what lies far from a mask can matter; such a set is for a folder
of one's own.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retouch import picture
from retouch.edit import Edit
from retouch.measure import cases as measured
from retouch.measure.cases import BUNDLED, Case
from retouch.train import cases as made
from retouch.train.cases import source_of
from retouch.train.data import Source

ROOT = Path(__file__).parent.parent
COUNTS = {"remove on photos": 12, "remove on flat": 12, "recolour": 16, "insert": 16, "replace": 8}
SEED = 20261124
LARGEST, FEW = 256, 1
"""Pixels of the longest side, and how many cases of a kind may be of that many by as many: they are half of the set's bytes."""

LARGE = ((336, 512), (384, 512), (512, 336), (512, 512))
"""(height, width) of documents with --large, in turn: the photos' own."""

GROUND = "flat or graded colour"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the training data's packages")
    parser.add_argument("--out", type=Path, default=BUNDLED, help="(%(default)s)")
    parser.add_argument("--large", action="store_true", help="documents of 512 pixels")
    parser.add_argument("--times", type=int, default=1, help="so many times as many cases, for a closer verdict (%(default)s)")
    args = parser.parse_args(argv)
    if args.large and args.out == BUNDLED:
        parser.error("--large is for a folder of your own; give --out.")
    sizes = LARGE if args.large else made.SIZES
    photos = free_photos()
    source = source_of(args.data, [])
    found = [case for kind, count in COUNTS.items() for case in _of(kind, count * args.times, source, photos, sizes)]
    measured.write(args.out, found, f"bench/edit_set.py, seed {SEED}" + (", large" if args.large else ""))
    files = list(args.out.glob("*.webp"))
    print(f"{len(found)} cases in {args.out}, {sum(file.stat().st_size for file in files) / 1e6:.2f} MB")
    return 0


def free_photos() -> dict[str, np.ndarray]:
    """Those of the repository that are in the public domain, CC0 or CC BY."""
    rows = (ROOT / "photos" / "ATTRIBUTION.md").read_text(encoding="utf-8").splitlines()
    names = [found[1] for row in rows if (found := re.match(r"\| `([\w-]+\.jpg)`", row)) and "CC BY-SA" not in row]
    return {name: picture.read(ROOT / "photos" / name).pixels[..., :3] for name in sorted(names)}


def _of(
    kind: str, count: int, source: Source, photos: dict[str, np.ndarray], sizes: Sequence[tuple[int, int]]
) -> list[Case]:  # fmt: skip
    """Case i is cut from photo i, counting round; where it lies on no photo, that changes nothing."""
    by_photo = []
    for photo in photos.values():
        source.photos = [photo]
        by_photo.append(made.cases(source, kind, 2 * count, SEED, sizes))
    found: list[Case] = []
    names, large = list(photos), 0
    for index in range(2 * count):
        one = by_photo[index % len(names)][index]
        other = by_photo[(index + 1) % len(names)][index]
        large += (is_large := min(one.truth.shape[:2]) == LARGEST)
        if len(found) == count or (is_large and large > FEW * count / COUNTS[kind]):
            continue
        flat = np.array_equal(one.edit.image, other.edit.image)
        assert one.truth.shape[:2] in sizes
        assert one.edit.mask is not None
        edit = Edit(one.edit.image, one.edit.prompt, one.edit.mask, seed=one.edit.seed, reuse=False)
        after = one.after
        found.append(
            Case(
                edit, one.truth, kind, f"{kind.replace(' ', '-')}-{len(found) + 1:02d}",
                after.concept if after else "", after.colour if after else "", GROUND if flat else names[index % len(names)],
            )
        )  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main())
