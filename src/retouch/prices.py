"""What device time costs."""

from __future__ import annotations

from retouch.edit import Usage

HOUR = 3600.0


def dollars(usage: Usage, per_hour: float | None) -> float | None:
    """Of one edit's device seconds at `per_hour` dollars; None where no price is known."""
    return None if per_hour is None else sum(usage.seconds.values()) * per_hour / HOUR
