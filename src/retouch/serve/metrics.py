"""The server's figures for Prometheus. What the worker counts is read at the time of a scrape."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from retouch.serve.errors import body_of

if TYPE_CHECKING:
    from retouch.serve.runs import Run
    from retouch.serve.service import Service

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts of answers; `totals` are the same figures for people."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.edits = Counter("retouch_edits", "Edits that came to an end.", ["status"], registry=self.registry)
        self.rejected = Counter("retouch_rejected", "Requests refused, by the error's code.", ["code"], registry=self.registry)
        self.latency = Histogram(
            "retouch_request_seconds", "From a request's arrival to its last picture.", registry=self.registry, buckets=SECONDS
        )
        self.stages = Histogram(
            "retouch_stage_seconds", "Device seconds of an edit, by stage.", ["stage"], registry=self.registry, buckets=SECONDS
        )
        self.tokens = Counter("retouch_tokens", "Image tokens: computed, and saved.", ["kind"], registry=self.registry)
        self.dollars = Counter("retouch_dollars", "Device time at the configured price.", ["tenant"], registry=self.registry)
        self.filtered = Counter(
            "retouch_filtered", "What filters were given and is done.", ["model", "status"], registry=self.registry
        )
        self.filter_seconds = Counter("retouch_filter_seconds", "Device time of filters.", ["model"], registry=self.registry)
        self.filter_dollars = Counter(
            "retouch_filter_dollars", "The part of the dollars that went to filters.", ["model"], registry=self.registry
        )
        self.totals: dict[str, Any] = {
            "edits": {"succeeded": 0, "failed": 0, "cancelled": 0, "rejected": 0},
            "seconds": Tally(), "tokens": {"computed": 0, "whole": 0}, "filters": {},
        }  # fmt: skip

    def watch(self, service: Service) -> None:
        self.registry.register(_OfService(service))

    def reject(self, code: str) -> None:
        self.rejected.labels(code).inc()
        self.totals["edits"]["rejected"] += 1

    def count(self, run: Run) -> None:
        """A run that has ended: pictures that were made count as succeeded, though others of it were not.

        One that the worker refused counts as a request that was refused.
        """
        made, status = len(run.usages), "cancelled" if run.status == "cancelled" else "failed"
        if run.refused and run.error is not None:
            self.reject(body_of(run.error)["error"]["code"])
        ended = (("succeeded", made), (status, 0 if run.refused else run.n - made))
        for usage in run.usages:
            self.dollars.labels(run.tenant.name).inc(usage.dollars or 0.0)
        if run.filter:
            self._count_filter(run, ended)
            return
        for name, count in ended:
            self.edits.labels(name).inc(count)
            self.totals["edits"][name] += count
        if run.status == "succeeded":
            self.latency.observe(run.seconds)
        for usage in run.usages:
            for stage, seconds in usage.seconds.items():
                self.stages.labels(stage).observe(seconds)
                self.totals["seconds"][stage] += seconds
            self.tokens.labels("computed").inc(usage.tokens_computed)
            self.tokens.labels("saved").inc(max(0, usage.tokens_saved))
            self.totals["tokens"]["computed"] += usage.tokens_computed
            self.totals["tokens"]["whole"] += usage.tokens_whole

    def _count_filter(self, run: Run, ended: Iterable[tuple[str, int]]) -> None:
        """Under its own name: what a filter takes says nothing of what an edit does."""
        nothing = {"succeeded": 0, "failed": 0, "cancelled": 0, "seconds": 0.0, "dollars": 0.0}
        totals = self.totals["filters"].setdefault(run.filter, nothing)
        for name, count in ended:
            self.filtered.labels(run.filter, name).inc(count)
            totals[name] += count
        seconds = sum(sum(usage.seconds.values()) for usage in run.usages)
        dollars = sum(usage.dollars or 0.0 for usage in run.usages)
        for name, counter, spent in (("seconds", self.filter_seconds, seconds), ("dollars", self.filter_dollars, dollars)):
            counter.labels(run.filter).inc(spent)
            totals[name] += spent

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _OfService:
    """What is so at the time it is asked."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterable[Metric]:
        stats = self.service.stats()
        queue, step = stats["queue"], stats["step"]
        yield GaugeMetricFamily("retouch_queue_waiting", "Edits without an answer that do not run.", queue["waiting"])
        yield GaugeMetricFamily("retouch_queue_running", "Edits that the worker has begun, as it said last.", queue["running"])
        yield GaugeMetricFamily("retouch_queue_limit", "Edits that may wait.", queue["limit"])
        yield GaugeMetricFamily("retouch_ready", "Whether the model's process is up.", int(stats["ready"]))
        yield CounterMetricFamily("retouch_worker_restarts", "Processes that died and were replaced.", stats["restarts"])
        service = self.service
        for name, budget in (("body_bytes", service.bodies), ("pixels", service.pixels)):
            yield GaugeMetricFamily(f"retouch_{name}_held", f"Of open requests: {budget.what}.", budget.used)
            yield GaugeMetricFamily(f"retouch_{name}_budget", f"As many {budget.what} may be held.", budget.limit)
        recorded = CounterMetricFamily("retouch_recorded", "Requests for the trace that is recorded.", labels=["kind"])
        for kind, count in (service.recorder.counts if service.recorder is not None else {}).items():
            recorded.add_metric([kind], count)
        yield recorded
        ledger = service.books.counts
        rows = CounterMetricFamily("retouch_ledger_rows", "Rows that were written, and dropped.", labels=["kind"])
        rows.add_metric(["written"], ledger["written"])
        rows.add_metric(["dropped"], ledger["dropped"])
        yield from (rows, GaugeMetricFamily("retouch_ledger_waiting", "Rows not written yet.", ledger["waiting"]))
        if step["seconds"] is not None:
            yield GaugeMetricFamily("retouch_step_seconds", "Mean of the recent packed steps.", step["seconds"])
            yield GaugeMetricFamily("retouch_step_tokens", "Image tokens a step, mean of the recent ones.", step["tokens"])
            yield GaugeMetricFamily("retouch_step_edits", "Edits a step, mean of the recent ones.", step["edits"])
            share = step["tokens"] / step["budget"]
            yield GaugeMetricFamily("retouch_step_occupancy", "Tokens a step over its budget.", share)
        yield from _of_caches(stats["caches"])


def _of_caches(caches: dict[str, Any]) -> Iterable[Metric]:
    by_tier: dict[str, CounterMetricFamily | GaugeMetricFamily] = {
        "hits": CounterMetricFamily("retouch_cache_hits", "Values that were there.", labels=["cache", "tier"]),
        "evicted": CounterMetricFamily("retouch_cache_evicted", "Values that had to go.", labels=["cache", "tier"]),
        "bytes": GaugeMetricFamily("retouch_cache_bytes", "Bytes held.", labels=["cache", "tier"]),
        "budget": GaugeMetricFamily("retouch_cache_budget_bytes", "Bytes that may be held.", labels=["cache", "tier"]),
    }
    plain = {
        "misses": CounterMetricFamily("retouch_cache_misses", "Values that had to be made.", labels=["cache"]),
        "joined": CounterMetricFamily("retouch_cache_joined", "Askers who waited for another's making.", labels=["cache"]),
        "lost": CounterMetricFamily("retouch_cache_lost", "Values that were damaged.", labels=["cache"]),
        "saved_seconds": CounterMetricFamily("retouch_cache_saved_seconds", "Making that was spared.", labels=["cache"]),
    }
    for cache, counters in caches.items():
        for name, family in by_tier.items():
            for tier, value in counters[name].items():
                family.add_metric([cache, tier], value)
        for name, family in plain.items():
            family.add_metric([cache], counters[name])
    yield from (*by_tier.values(), *plain.values())
