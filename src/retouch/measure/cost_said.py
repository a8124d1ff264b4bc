"""How `retouch cost` reads points in time, and how all that it prints is said: JSON, CSV, tables and their figures."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from retouch.edit import InvalidOption

if TYPE_CHECKING:
    from rich.console import Console

MILLION = 1e6
COLUMNS = {
    "edits": "edits", "device_seconds": "device s", "dollars": "$", "dollars_per_million": "$/M", "held_dollars": "held $",
    "held_dollars_per_million": "held $/M", "share": "of all", "tokens_saved": "tokens saved", "document_hits": "documents",
    "prompt_hits": "prompts", "result_hits": "results", "failed": "failed", "cancelled": "cancelled",
}  # fmt: skip
"""Of the printed tables: the name in CSV and JSON -> its heading."""

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def moment(option: str, text: str, now: float) -> float:
    """In seconds since 1970: a duration before `now`, or an ISO date, of UTC unless it says otherwise. Raises InvalidOption."""
    if match := re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhdw])", text.strip()):
        ago = float(match[1]) * UNITS[match[2]]
        if 0 < ago <= now:
            return now - ago
    else:
        try:
            found = datetime.fromisoformat(text.strip())
            return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            pass
    raise InvalidOption(f"{option} is {text!r}; give a time ago such as 7d, 12h or 30m, or a date such as 2026-11-01.")


def said(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M UTC")


def iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")


def shown(name: str, value: float | None) -> str:
    """A column's value: shares in per cent, dollars with as many digits as they have."""
    if value is None:
        return "-"
    if name.endswith(("_hits", "_saved", "share")):
        return f"{value:.0%}"
    if "dollars" in name:
        return f"{value:,.2f}" if value >= 1 or not value else f"{value:.3g}"
    return f"{value:,.1f}" if name == "device_seconds" else f"{value:,}"


def nothing(only: Mapping[str, str], since: float, until: float, where: str) -> str:
    """Where no edit is in that time."""
    which = "".join(f" of {name} {value!r}" for name, value in only.items())
    return f"no edits{which} from {said(since)} to {said(until)} in {where}"


def unpriced(count: int, edits: int) -> str:
    return f"{count:,} of {edits:,} edits have no price and are not in the dollars: serve with --prices."


def console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)


def put_json(told: Mapping[str, Any]) -> None:
    print(json.dumps(told, ensure_ascii=False, indent=2))


def put_csv(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    writer = csv.DictWriter(sys.stdout, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
