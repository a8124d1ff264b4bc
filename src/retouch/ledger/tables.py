"""What stands in the ledger. Times, device seconds and dollars are whole numbers, so that sums are the same in any order."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import BigInteger, Boolean, Column, Double, Index, Integer, MetaData, SmallInteger, String, Table, Text

from retouch.record import Record

VERSION = 1
"""Of the tables. Whoever changes them counts up here and says in `store` how the older ones are brought up to it."""

STAGES = ("document", "prompt", "start", "step", "preview", "finish")
"""Those with a column each; what a model spends on others is in the column `other_us`."""

HITS = ("document", "prompt", "result")
LARGEST = 2**63 - 1

_types: dict[str, Any] = {
    "str": Text, "float": Double, "float | None": Double, "int": BigInteger, "bool": Boolean,
    "Mapping[str, Scalar]": Text,
}  # fmt: skip

metadata = MetaData()

about = Table("retouch_ledger", metadata, Column("version", Integer, primary_key=True))

edits = Table(
    "retouch_edits", metadata,
    Column("run", String(64), primary_key=True), Column("part", Integer, primary_key=True),
    Column("time", BigInteger, nullable=False, comment="when it ended, milliseconds since 1970 in UTC"),
    *(Column(name, Text, nullable=False) for name in ("tenant", "model", "device", "status", "error")),
    Column("latency_us", BigInteger, nullable=False), Column("steps", Integer, nullable=False),
    *(Column(f"{stage}_us", BigInteger, nullable=False) for stage in (*STAGES, "other")),
    Column("busy_us", BigInteger, nullable=False, comment="device time, the sum of the stages"),
    Column("tokens_computed", BigInteger, nullable=False), Column("tokens_whole", BigInteger, nullable=False),
    *(Column(f"{name}_hit", SmallInteger, nullable=False) for name in HITS),
    Column("approximate", Text, nullable=False, comment="what makes it differ from the plain model's answer"),
    Column("price", Double, comment="dollars an hour of the device; null: not known"),
    Column("nanodollars", BigInteger, comment="busy_us at that price"),
    *(Column(name, Text, nullable=False) for name in ("version", "commit_hash")),
    Column("lease", String(64), nullable=False),
    Index("retouch_edits_time", "time"),
)  # fmt: skip

leases = Table(
    "retouch_leases", metadata, Column("lease", String(64), primary_key=True),
    Column("started", BigInteger, nullable=False, comment="milliseconds since 1970 in UTC, as is seen"),
    Column("seen", BigInteger, nullable=False), Column("price", Double),
    *(Column(name, Text, nullable=False) for name in ("source", "host", "model", "device", "version", "commit_hash")),
)  # fmt: skip

records = Table(
    "retouch_records", metadata, Column("record", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    *(Column("commit_hash" if f.name == "commit" else f.name, _types[str(f.type)]) for f in fields(Record)),
)  # fmt: skip

EDIT_COLUMNS = tuple(column.name for column in edits.columns)
LEASE_COLUMNS = tuple(column.name for column in leases.columns)
RECORD_COLUMNS = tuple(column.name for column in records.columns if column.name != "record")


@dataclass(frozen=True, slots=True)
class Entry:
    """A served edit, part `part` of the request `run`, as it ended at `time` (seconds since 1970). Neither prompt nor picture.

    `seconds` is device time by stage, as in Usage; of an edit that has no answer it is not known, and empty. `latency` is from
    the request's arrival. `price` is dollars an hour, None where it is not known; `dollars` is what the answer said.
    """

    run: str
    part: int
    time: float
    tenant: str = ""
    model: str = ""
    device: str = ""
    status: str = "succeeded"
    error: str = ""
    latency: float = 0.0
    steps: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    tokens_computed: int = 0
    tokens_whole: int = 0
    cache_hits: tuple[str, ...] = ()
    approximate: tuple[str, ...] = ()
    price: float | None = None
    dollars: float | None = None
    version: str = ""
    commit: str = ""
    lease: str = ""

    def row(self) -> tuple[Any, ...]:
        """In the order of EDIT_COLUMNS."""
        spent = [_micro(self.seconds.get(stage, 0.0)) for stage in STAGES]
        spent.append(sum(_micro(seconds) for stage, seconds in self.seconds.items() if stage not in STAGES))
        texts = map(_plain, (self.tenant, self.model, self.device, self.status, self.error))
        return (
            _plain(self.run)[:64], self.part, _whole(self.time * 1e3), *texts, _micro(self.latency), self.steps, *spent,
            sum(spent), _whole(self.tokens_computed), _whole(self.tokens_whole),
            *(int(name in self.cache_hits) for name in HITS), _plain(",".join(self.approximate)), self.price,
            None if self.dollars is None else _whole(self.dollars * 1e9), self.version, self.commit, self.lease,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Lease:
    """A device that is held, from `started` (seconds since 1970) until it is last seen. `source` says whose price it is."""

    device: str = ""
    model: str = ""
    price: float | None = None
    source: str = ""
    host: str = ""
    version: str = ""
    commit: str = ""
    started: float = field(default_factory=time.time)
    id: str = field(default_factory=lambda: secrets.token_hex(12))

    def row(self, seen: float) -> tuple[Any, ...]:
        """In the order of LEASE_COLUMNS."""
        texts = map(_plain, (self.source, self.host, self.model, self.device, self.version, self.commit))
        return self.id, _whole(self.started * 1e3), _whole(seen * 1e3), self.price, *texts


def row_of(record: Record) -> tuple[Any, ...]:
    """In the order of RECORD_COLUMNS, with the values that a database gives back."""
    values = (_kept(str(f.type), getattr(record, f.name)) for f in fields(Record) if f.name != "extra")
    return *values, _plain(json.dumps(dict(record.extra), ensure_ascii=False))


def _kept(kind: str, value: Any) -> Any:
    """Text without what some refuse; a whole number in a column of fractions as a fraction."""
    if isinstance(value, str):
        return _plain(value)
    return float(value) if isinstance(value, int) and "float" in kind else value


def record_of(row: tuple[Any, ...]) -> Record:
    *values, extra = row
    names = [f.name for f in fields(Record) if f.name != "extra"]
    return Record(**dict(zip(names, values, strict=True)), extra=json.loads(extra))


def known_as(record: Record) -> str:
    """The same for a Record that was just read from a file and for the one that came of it in the books."""
    return json.dumps(record_of(row_of(record)).flat(), sort_keys=True)


def moment_of(date: str) -> float | None:
    """Of a Record's date, seconds since 1970; of UTC unless it says otherwise. None where it is no date."""
    try:
        found = datetime.fromisoformat(date)
    except ValueError:
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _micro(seconds: float) -> int:
    return _whole(seconds * 1e6) if seconds else 0


def _whole(value: float) -> int:
    """The nearest whole number that a column holds."""
    whole = round(value)
    return whole if -LARGEST <= whole <= LARGEST else LARGEST if whole > 0 else -LARGEST


def _plain(text: str) -> str:
    """As every database takes it: without the NULs and halves of characters that some refuse."""
    return text if text.isascii() and text.isprintable() else text.replace("\0", "").encode("utf-8", "replace").decode()
