"""What an answer says that it cost: tokens as OpenAI's clients count them, and the rest under `retouch`."""

from __future__ import annotations

from typing import Any

from retouch.edit import Usage


def told(usages: list[Usage], latency: float) -> dict[str, Any]:
    """`usage` of an answer, of all its edits; `latency` is the seconds that were waited for it."""
    image = sum(usage.tokens_whole // max(1, usage.steps) for usage in usages)
    text = sum(usage.tokens_text for usage in usages)
    computed = sum(usage.tokens_computed for usage in usages)
    return {
        "input_tokens": image + text, "output_tokens": computed, "total_tokens": image + text + computed,
        "input_tokens_details": {"image_tokens": image, "text_tokens": text}, "retouch": _retouch(usages, latency),
    }  # fmt: skip


def _retouch(usages: list[Usage], latency: float) -> dict[str, Any]:
    """Device seconds by stage, tokens, hits and dollars of all edits, and the seconds waited."""
    seconds: dict[str, float] = {}
    for usage in usages:
        for stage, spent in usage.seconds.items():
            seconds[stage] = round(seconds.get(stage, 0.0) + spent, 6)
    sums = {name: sum(getattr(usage, name) for usage in usages) for name in ("tokens_computed", "tokens_whole", "steps")}
    priced = [usage.dollars for usage in usages if usage.dollars is not None]
    saved = sums["tokens_whole"] - sums["tokens_computed"]
    hits = [hit for usage in usages for hit in usage.cache_hits]
    lossy = sorted({name for usage in usages for name in usage.approximate})
    return {
        "seconds": seconds,
        **sums,
        "tokens_saved": saved,
        "cache_hits": hits,
        "approximate": lossy,
        "dollars": sum(priced) if priced else None,
        "latency_seconds": round(latency, 6),
    }
