"""What a server is started with, who may use it, and how much."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import time
import tomllib
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from retouch.edit import InvalidOption, QueueFull, RetouchError
from retouch.engine.worker import Options
from retouch.prices import Price

MB = 1 << 20


class Unauthorized(RetouchError):
    """No key, or one that is not known here."""

    status = 401


class TooMuch(QueueFull):
    """A tenant asks for more than its limits allow."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who asks. `rate` is edits a minute, `concurrency` edits at once, `pixels` those of one picture; None: no limit.

    `key` is the API key or, with the prefix `sha256:`, its digest. An `operator` may read the metrics, which name tenants.
    """

    name: str
    key: str = ""
    rate: float | None = None
    concurrency: int | None = None
    pixels: int | None = None
    operator: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.operator, bool):
            raise InvalidOption(f"tenant {self.name!r}: operator is {self.operator!r}; give true or false.")
        for limit in ("rate", "concurrency", "pixels"):
            value = getattr(self, limit)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
                raise InvalidOption(f"tenant {self.name!r}: {limit} is {value!r}; give a number above 0, or leave it out.")

    def knows(self, key: str) -> bool:
        """Compared in constant time."""
        wanted = self.key.lower() if self.key.startswith("sha256:") else _digest(self.key)
        return hmac.compare_digest(_digest(key), wanted)


def _digest(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Recording:
    """A trace of what is asked, into `file`; with prompts, with `pictures` in a folder, or with hashes in their place."""

    file: Path
    prompts: bool = False
    pictures: Path | None = None


NOBODY = Tenant("")
"""Everybody, where the server has no keys."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one server. Sizes in bytes, times in seconds. `price` is dollars an hour of the device, else one of `prices` that fits
    it. `ledger` is the address of the books, None: none are kept. `bodies` and `pixels` are what may be held at once: bytes of
    bodies that are read, pixels of pictures of edits that are taken on. `request_seconds` is what an edit may take
    that somebody waits for, and that has no deadline of its own.
    """

    worker: Options = field(default_factory=Options)
    host: str = "127.0.0.1"
    port: int = 8000
    tenants: tuple[Tenant, ...] = ()
    price: float | None = None
    prices: tuple[Price, ...] = ()
    ledger: str | None = None
    body: int = 200 * MB
    file: int = 50 * MB
    body_seconds: float = 60.0
    request_seconds: float = 600.0
    drain_seconds: float = 60.0
    uploads: int = 1024 * MB
    finished: int = 512 * MB
    bodies: int = 1024 * MB
    pixels: int = 1_000_000_000
    record: Recording | None = None

    def __post_init__(self) -> None:
        if not self.tenants and not _is_loopback(self.host):
            raise InvalidOption(
                f"--host {self.host} is reached from elsewhere: give --keys FILE with API keys, or serve on 127.0.0.1."
            )
        if not 0 <= self.port < 65536:
            raise InvalidOption(f"port is {self.port}; give 0 (any free one) to 65535.")
        if self.price is not None and not 0 <= self.price < 1e6:
            raise InvalidOption(f"price is {self.price}; give dollars an hour, 0 or more.")
        if self.bodies < self.body:
            raise InvalidOption(f"--bodies is less than the {self.body // MB} MB that one body may have; give more.")
        if not 0 < self.request_seconds < 1e9:
            raise InvalidOption(f"--request-seconds is {self.request_seconds:g}; give more than 0.")
        if self.pixels < 1:
            raise InvalidOption(f"--pixels is {self.pixels / 1e6:g} million; give more.")

    def tenant(self, authorization: str | None) -> Tenant:
        """Whose key an `Authorization: Bearer` header holds. Raises Unauthorized."""
        if not self.tenants:
            return NOBODY
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthorized("this server wants an API key: send the header Authorization: Bearer KEY.")
        found = [tenant for tenant in self.tenants if tenant.knows(key.strip())]
        if not found:
            raise Unauthorized("the API key is not known here; check it, or ask who runs the server.")
        return found[0]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(path: Path) -> tuple[Tenant, ...]:
    """Tenants of a TOML file of `[[tenant]]` tables, with the fields of `Tenant`. Raises InvalidOption."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidOption(f"{path} cannot be read ({error}); give a TOML file of [[tenant]] tables.") from error
    rows = content.get("tenant")
    if set(content) != {"tenant"} or not isinstance(rows, list) or not rows:
        raise InvalidOption(f'{path} has to hold [[tenant]] tables, each with a name = "..." and a key = "...".')
    tenants = tuple(_tenant(path, row) for row in rows)
    if len({tenant.key for tenant in tenants}) < len(tenants):
        raise InvalidOption(f"{path} gives one key to two tenants; give each its own.")
    return tenants


def _tenant(path: Path, row: Any) -> Tenant:
    known = {f.name for f in fields(Tenant)}
    if not isinstance(row, dict) or set(row) - known:
        raise InvalidOption(f"{path}: {row!r} has unknown fields; known are {', '.join(sorted(known))}.")
    if not all(isinstance(row.get(name), str) and row[name] for name in ("name", "key")):
        raise InvalidOption(f"{path}: a tenant lacks its name or its key, both texts.")
    if row["key"].startswith("sha256:") and not re.fullmatch(r"sha256:[0-9a-fA-F]{64}", row["key"]):
        raise InvalidOption(f"{path}: the key of {row['name']!r} is no SHA-256 digest of 64 hexadecimal digits.")
    return Tenant(**row)


@dataclass(slots=True)
class Allowance:
    """What tenants have taken of their limits. `take` and `give_back` come from one thread."""

    tokens: dict[str, tuple[float, float]] = field(default_factory=dict)
    running: Counter[str] = field(default_factory=Counter)

    def take(self, tenant: Tenant, edits: int, pixels: int) -> None:
        """All or nothing. Raises TooMuch with the time after which it may work, InvalidOption where it never will."""
        if tenant.pixels is not None and pixels > tenant.pixels:
            raise InvalidOption(f"the picture has {pixels:,} pixels; this key allows {tenant.pixels:,}. Scale it down.")
        if tenant.concurrency is not None and edits > tenant.concurrency:
            raise InvalidOption(f"{edits} edits at once are more than the {tenant.concurrency} of this key; ask for fewer.")
        if tenant.concurrency is not None and self.running[tenant.name] + edits > tenant.concurrency:
            raise TooMuch(f"this key allows {tenant.concurrency} edits at once; wait for some to end.", retry_after=1.0)
        if tenant.rate is not None:
            self._take_rate(tenant.name, tenant.rate, edits)
        self.running[tenant.name] += edits

    def _take_rate(self, name: str, rate: float, edits: int) -> None:
        """A bucket that holds a minute's worth and fills at `rate` a minute."""
        now, size = time.monotonic(), max(1.0, rate)
        if edits > size:
            raise InvalidOption(f"{edits} edits at once are more than the {rate:g} a minute of this key; ask for fewer.")
        held, then = self.tokens.get(name, (size, now))
        held = min(size, held + (now - then) * rate / 60)
        if edits > held:
            wait = (edits - held) * 60 / rate
            raise TooMuch(f"this key allows {rate:g} edits a minute; try again in {wait:.0f} s.", retry_after=wait)
        self.tokens[name] = held - edits, now

    def give_back(self, tenant: Tenant, edits: int) -> None:
        self.running[tenant.name] -= edits
