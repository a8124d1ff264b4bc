"""Points in time, as options of `retouch cost` give them and as it says them; figures as its tables have them."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from retouch.edit import InvalidOption

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
