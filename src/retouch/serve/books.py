"""The server's books: what its device costs, and a row of the ledger for each edit that ended."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from retouch import prices, record
from retouch.ledger import Entry, Lease, Writer
from retouch.prices import Price
from retouch.serve.errors import body_of
from retouch.serve.runs import Run
from retouch.serve.settings import Settings

log = logging.getLogger(__name__)


class Books:
    """`info` is what the worker says of itself. Nothing here waits or fails, whatever becomes of the ledger."""

    def __init__(self, settings: Settings, info: dict[str, Any], model: str) -> None:
        kind = str(info.get("device", ""))
        name = record.device_name(kind)
        self.device, self.model = name or kind, model
        self.price = _price(settings, name, kind)
        self.lease: Lease | None = None
        self.writer: Writer | None = None
        if settings.ledger is not None:
            self.lease = self._lease()
            self.writer = Writer(settings.ledger, self.lease)

    @property
    def per_hour(self) -> float | None:
        return None if self.price is None else self.price.per_hour

    @property
    def counts(self) -> dict[str, int]:
        """Rows of the ledger."""
        return {name: getattr(self.writer, name, 0) for name in ("written", "dropped", "waiting")}

    def write(self, run: Run) -> None:
        """A run that has ended."""
        if self.writer is not None:
            for entry in self._entries(run):
                self.writer.add(entry)

    def close(self) -> None:
        """Write what is left. To be called once no run is left."""
        if self.writer is not None:
            self.writer.close()

    def _lease(self) -> Lease:
        code = record.environment()
        commit = code["commit"] + ("-dirty" if code["dirty"] else "")
        source = "" if self.price is None else self.price.said
        return Lease(self.device, self.model, self.per_hour, source, platform.node(), version("retouch"), commit)

    def _entries(self, run: Run) -> Iterator[Entry]:
        """What was answered says what it cost, in the same words as to the client; the others ended as the run did."""
        assert self.lease is not None
        now, error = time.time(), "" if run.error is None else body_of(run.error)["error"]["code"]
        common: dict[str, Any] = {
            "run": run.id, "time": now, "tenant": run.tenant.name, "model": run.filter or self.model, "device": self.device,
            "price": self.per_hour, "version": self.lease.version, "commit": self.lease.commit, "lease": self.lease.id,
        }  # fmt: skip
        for part, answer in enumerate(run.answers):
            if answer is None:
                status = "cancelled" if run.status == "cancelled" else "failed"
                yield Entry(part=part, status=status, error=error, latency=run.seconds, **common)
                continue
            told = answer["usage"]["retouch"]
            yield Entry(
                part=part, latency=told["latency_seconds"], steps=told["steps"], seconds=told["seconds"],
                tokens_computed=told["tokens_computed"], tokens_whole=told["tokens_whole"],
                cache_hits=tuple(told["cache_hits"]), approximate=tuple(told["approximate"]), dollars=told["dollars"], **common,
            )  # fmt: skip


def _price(settings: Settings, name: str, kind: str) -> Price | None:
    if settings.price is not None:
        return Price("*", settings.price, "--price")
    price = prices.find(settings.prices, name, None if kind.startswith("cuda") else record.vcpus())
    if price is not None:
        log.info("dollars are counted at $%g an hour: %s", price.per_hour, price.said)
    elif settings.prices:
        log.warning(
            "no price is known for %s; dollars are left out. Give --price or --prices.", name or f"this device ({kind})"
        )
    return price
