"""Where things are kept; the only reader of the environment."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """What may be measured or made again: `RETOUCH_CACHE`, else `retouch` in the user's cache folder."""
    return _folder("RETOUCH_CACHE", "XDG_CACHE_HOME", ".cache")


def data_folder() -> Path:
    """What may not be lost, such as the ledger: `RETOUCH_DATA`, else `retouch` in the user's data folder."""
    return _folder("RETOUCH_DATA", "XDG_DATA_HOME", ".local/share")


def ledger_file() -> Path:
    """Where the books are kept unless another address is given."""
    return data_folder() / "ledger.sqlite"


def prices_file() -> Path | None:
    """The user's own prices: `RETOUCH_PRICES`, else `retouch/prices.toml` in the user's configuration where it is there."""
    if chosen := os.environ.get("RETOUCH_PRICES"):
        return Path(chosen)
    found = _folder("", "XDG_CONFIG_HOME", ".config") / "prices.toml"
    return found if found.is_file() else None


def _folder(own: str, shared: str, usual: str) -> Path:
    """What the variable `own` says, else `retouch` in what `shared` says, else in `usual` of the user's home."""
    if chosen := os.environ.get(own):
        return Path(chosen)
    return Path(os.environ.get(shared) or Path.home() / usual) / "retouch"
