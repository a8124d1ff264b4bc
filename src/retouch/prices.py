"""What device time costs: a table of prices by the device's name, and the dollars of a Usage."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from retouch.edit import InvalidOption, Usage

HOUR = 3600.0
MOST = 1e6
"""Dollars an hour from which on a price is taken for a slip."""

SHIPPED = Path(__file__).with_name("prices.toml")
KINDS = ("per_hour", "per_vcpu_hour")
FIELDS = ("device", *KINDS, "source", "date")


@dataclass(frozen=True, slots=True)
class Price:
    """`per_hour` dollars, as `source` had it on `date`. Of each virtual CPU where `vcpu`, else of the whole device.

    `device` is a pattern for its name.
    """

    device: str
    per_hour: float
    source: str
    date: str = ""
    vcpu: bool = False

    @property
    def said(self) -> str:
        """Where it comes from, in a line."""
        return f"{self.source} ({self.date})" if self.date else self.source


def dollars(usage: Usage, per_hour: float | None) -> float | None:
    """Of one edit's device seconds at `per_hour` dollars; None where no price is known."""
    return None if per_hour is None else spent(sum(usage.seconds.values()), per_hour)


def spent(seconds: float, per_hour: float) -> float:
    """Dollars of a device for so long: busy cost, if it computed all that time; provisioned cost, if it was held."""
    return seconds * per_hour / HOUR


def find(table: Iterable[Price], device: str, vcpus: float | None = None) -> Price | None:
    """The first that fits the device's name, for all of the device. `vcpus` says that it is a processor, and how much of one.

    None where there is none, or the device has no name.
    """
    name = device.lower()
    for price in table:
        if name and (vcpus or not price.vcpu) and fnmatchcase(name, price.device.lower()):
            if vcpus is None or not price.vcpu:
                return price
            return replace(price, per_hour=vcpus * price.per_hour, source=f"{vcpus:g} vCPUs, {price.source}", vcpu=False)
    return None


def table(path: Path | None = None) -> tuple[Price, ...]:
    """The user's own prices, then the shipped ones. Raises InvalidOption."""
    return (*(() if path is None else read(path)), *read(SHIPPED))


def read(path: Path) -> tuple[Price, ...]:
    """The [[price]] tables of a TOML file. Raises InvalidOption, which names the file and what to mend."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidOption(f"{path} cannot be read ({error}); give a TOML file of [[price]] tables.") from error
    rows = content.get("price")
    if set(content) != {"price"} or not isinstance(rows, list):
        raise InvalidOption(f"{path} has to hold [[price]] tables, and nothing else; see docs/costs.md.")
    return tuple(_price(f"{path}, price {number}", row) for number, row in enumerate(rows, 1))


def _price(where: str, row: Any) -> Price:
    if not isinstance(row, dict):
        raise InvalidOption(f"{where} is {row!r}; give a [[price]] table with {', '.join(FIELDS)}.")
    if unknown := sorted(set(row) - set(FIELDS)):
        raise InvalidOption(f"{where} has the unknown field {unknown[0]!r}; known are {', '.join(FIELDS)}.")
    for name in ("device", "source"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise InvalidOption(f"{where} has no {name}; give it as text.")
    kinds = [name for name in KINDS if name in row]
    if len(kinds) != 1:
        raise InvalidOption(f"{where} has {' and '.join(kinds) or 'no price'}; give either per_hour or per_vcpu_hour.")
    amount = row[kinds[0]]
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not math.isfinite(amount) or not 0 <= amount < MOST:
        raise InvalidOption(f"{where}: {kinds[0]} is {amount!r}; give dollars, 0 or more and below {MOST:,.0f}.")
    return Price(row["device"], float(amount), row["source"], _day(where, row.get("date")), kinds[0] == "per_vcpu_hour")


def _day(where: str, value: Any) -> str:
    try:
        return (value if type(value) is date else date.fromisoformat(value)).isoformat()
    except (TypeError, ValueError) as error:
        raise InvalidOption(f"{where}: date is {value!r}; give the day you looked, such as 2026-05-07.") from error
