"""The README's tables of `retouch bench`, from rows alone.

python bench/readme_table.py results/bench.jsonl [--mix personal]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from retouch import record
from retouch.edit import InvalidOption, RetouchError
from retouch.measure import report, standing, table, tally

ROOT = Path(__file__).parent.parent


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="?", default=ROOT / "results" / "bench.jsonl", help="(%(default)s)")
    parser.add_argument("--mix", help="only this one")
    args = parser.parse_args(argv)
    try:
        found = [one for one in standing.standings(tally.latest(record.read(args.rows))) if args.mix in (None, one.mix)]
        if not found:
            raise InvalidOption(f"{args.rows} has no rows of retouch bench" + (f" on {args.mix}." if args.mix else "."))
    except RetouchError as error:
        print(f"readme_table: {error}", file=sys.stderr)
        return 2
    for one in found:
        print(f"**{one.mix.capitalize()}**: {one.extra['requests']} requests\n")
        print(report.markdown_table(one))
        below = [*map(table.said, one.claims()), *table.of_fall(one), *table.drift(one)]
        print("\n".join(f"- {line}" for line in below) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
