"""Where things are kept; the only reader of the environment."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """What may be measured or made again: `RETOUCH_CACHE`, else `retouch` in the user's cache folder."""
    if chosen := os.environ.get("RETOUCH_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retouch"
