"""What device time costs."""

from __future__ import annotations

from retouch.edit import Usage

HOUR = 3600.0


def dollars(usage: Usage, per_hour: float | None) -> float:
    """Of one edit's device seconds at `per_hour` dollars; 0 where no price is known."""
    return sum(usage.seconds.values()) * (per_hour or 0.0) / HOUR
