"""JSON objects read strictly: each field by its kind and range, none twice, none left over. Errors name file, line and mend."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from retouch.edit import RetouchError


class InvalidTrace(RetouchError):
    """A file is no trace, or does not hold together, or the pictures that it names are not there."""

    status = 400


@dataclass(slots=True)
class Fields:
    """One JSON object of a line, from which fields are taken until none is left."""

    where: str
    row: dict[str, Any]

    def wrong(self, text: str) -> NoReturn:
        raise InvalidTrace(f"{self.where}: {text}")

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """Raises where it is not there and there is no default."""
        value = self.row.pop(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.wrong(f"{name} is {short(value)}; give a whole number from {low:,} to {high:,}.")
        return value

    def number(self, name: str, above: float, default: float | None = None) -> float:
        value = self.row.pop(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not above <= value < 1e12:
            self.wrong(f"{name} is {short(value)}; give seconds, at least {above:g}.")
        return float(value)

    def text(self, name: str, longest: int, default: str | None = None) -> str:
        value = self.row.pop(name, default)
        if not isinstance(value, str) or len(value) > longest:
            self.wrong(f"{name} is {short(value)}; give text of at most {longest:,} characters.")
        return value

    def flag(self, name: str) -> bool:
        value = self.row.pop(name, False)
        if not isinstance(value, bool):
            self.wrong(f"{name} is {short(value)}; give true or false.")
        return value

    def numbers(self, name: str, count: int | None = None) -> tuple[int, ...]:
        """Whole numbers; none where it is not there."""
        value = self.row.pop(name, ())
        whole = isinstance(value, list | tuple) and all(type(x) is int and abs(x) < 2**40 for x in value)
        if not whole or (count is not None and value and len(value) != count):
            self.wrong(f"{name} is {short(value)}; give a list of {'' if count is None else f'{count} '}whole numbers.")
        return tuple(value)

    def part(self, name: str) -> Fields | None:
        value = self.row.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.wrong(f"{name} is {short(value)}; give an object.")
        return Fields(f"{self.where}, {name}", value)

    def no_more(self, version: int) -> None:
        if self.row:
            names = ", ".join(sorted(self.row))
            self.wrong(f"there is no field {names} in version {version}; take it out, or use the Retouch that wrote it.")


def parsed(path: Path, number: int, row: bytes, whole: bool) -> Fields:
    where = f"{path}, line {number}"
    try:
        value = json.loads(row.decode(), object_pairs_hook=_once, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        if not whole:
            raise InvalidTrace(f"{where} is cut off: the file was not written to its end. Remove that line.") from error
        raise InvalidTrace(f"{where} is no JSON ({error}); mend or remove it.") from error
    if not isinstance(value, dict):
        raise InvalidTrace(f"{where} is no JSON object; mend or remove it.")
    return Fields(where, value)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name is given twice")
    return made


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def short(value: Any) -> str:
    text = "missing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
