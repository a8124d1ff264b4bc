"""What an edit is spared against the plain pipeline. Each can be left off, to see its worth: `retouch serve --savings`."""

from __future__ import annotations

from retouch.edit import InvalidOption

SAVINGS = ("documents", "mask", "prompts", "packing")
"""Encoded pictures are kept; only the cells that the mask touches are computed, and only their region decoded; encoded prompts
are kept; edits share a step. With none of them every cell of every edit is computed and decoded, one edit a step.
"""


def parsed(text: str) -> tuple[str, ...]:
    """Of an option's value: names with commas between them, `all` or `none`. Raises InvalidOption."""
    names = {"all": SAVINGS, "none": ()}.get(text, tuple(part.strip() for part in text.split(",")))
    check(names)
    return names


def check(names: tuple[str, ...]) -> None:
    """Raises InvalidOption."""
    if unknown := [name for name in names if name not in SAVINGS]:
        raise InvalidOption(f"there is no saving {', '.join(map(repr, unknown))}; give all, none, or of {','.join(SAVINGS)}.")
