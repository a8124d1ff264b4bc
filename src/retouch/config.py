"""Where things are kept, and how threads wait; the only reader of the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SPINS = "3000"
"""How often a thread of OpenMP looks for its next work before it sleeps. With libgomp's own 300,000 it holds its core at each
barrier, also where another thread of the same edit waits for that core: measured by bench/spins.py (docs/serving.md).
"""


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


def of_threads() -> dict[str, str]:
    """Variables for a process that computes while others do: none where the user has chosen how threads wait.

    https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
    """
    return {} if os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} else {"GOMP_SPINCOUNT": SPINS}


@contextmanager
def sharing() -> Iterator[None]:
    """What is begun in here has the variables of `of_threads`."""
    variables = of_threads()
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)


def _folder(own: str, shared: str, usual: str) -> Path:
    """What the variable `own` says, else `retouch` in what `shared` says, else in `usual` of the user's home."""
    if chosen := os.environ.get(own):
        return Path(chosen)
    return Path(os.environ.get(shared) or Path.home() / usual) / "retouch"
