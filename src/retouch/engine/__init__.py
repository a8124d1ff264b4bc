"""The engine, `load`, the way to one, and the worker that runs one in a process of its own.

What needs torch is imported when it is asked for: a server beside its worker has no use for it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retouch.engine.build import load
    from retouch.engine.engine import Engine

__all__ = ["Engine", "load"]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from retouch.engine.engine import Engine

        return Engine
    if name == "load":
        from retouch.engine.build import load

        return load
    raise AttributeError(f"module 'retouch.engine' has no attribute {name!r}")
