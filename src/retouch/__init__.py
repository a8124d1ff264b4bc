"""Retouch: image edits for a fraction of the cost.

`import retouch` is cheap: the engine, and torch with it, is imported when `retouch.load` is first asked for.
"""

from typing import TYPE_CHECKING, Any

from retouch.edit import Edit, Edited, RetouchError, Usage

if TYPE_CHECKING:
    from retouch.engine import load

__all__ = ["Edit", "Edited", "RetouchError", "Usage", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from retouch.engine import load

        return load
    raise AttributeError(f"module 'retouch' has no attribute {name!r}")
