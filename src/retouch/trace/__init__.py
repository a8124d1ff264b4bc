"""Traces of edits, on file: who asks for which edit when. Servers record them, `measure/` makes and replays them."""

from retouch.trace.fields import InvalidTrace
from retouch.trace.format import MAX_VARIATIONS, Request, Result, Trace, View, hash_of, header, line, lines, read, write
from retouch.trace.shape import Shape

__all__ = [
    "MAX_VARIATIONS", "InvalidTrace", "Request", "Result", "Shape", "Trace", "View", "hash_of", "header", "line", "lines",
    "read", "write",
]  # fmt: skip
