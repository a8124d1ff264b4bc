"""What the documents say of the server is what the server has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from retouch.serve import _parser
from retouch.serve.app import create
from retouch.serve.settings import Settings
from serving import Painter

DOCS = Path(__file__).parent.parent / "docs"
SUFFIXES = ("_total", "_bucket", "_sum", "_count")


@pytest.fixture
def app():
    worker = Painter()
    app = create(Settings(worker.options), worker)
    counters = {"hits": {"device": 1}, "evicted": {"device": 0}, "bytes": {"device": 1}, "budget": {"device": 2}}
    counters |= {"misses": 0, "joined": 0, "lost": 0, "saved_seconds": 0.0}
    worker.stats = {
        "queue": {"waiting": 0, "running": 0, "limit": 1},
        "step": {"seconds": 0.1, "tokens": 1.0, "edits": 1.0, "budget": 2},
        "caches": {"documents": counters},
    }
    return app


def names_of(app) -> set[str]:
    text = app.state.service.metrics.text().decode()
    return set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE))


def base(name: str) -> str:
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


def test_the_dashboard_asks_for_metrics_that_are_there(app) -> None:
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    asked = {name for panel in dashboard["panels"] for t in panel["targets"] for name in re.findall(r"retouch_\w+", t["expr"])}
    known = {base(name) for name in names_of(app)}
    assert asked
    assert {base(name) for name in asked} <= known
    boxes = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(box["x"] + box["w"] <= 24 for box in boxes)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(boxes)


def test_the_dashboard_takes_filters_off_the_price_of_an_edit() -> None:
    """Their dollars are among all others, and what they made is not among the edits; on a server without any they are none."""
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    (panel,) = [panel for panel in dashboard["panels"] if panel["title"] == "Dollars per million edits"]
    (target,) = panel["targets"]
    over, under = target["expr"].split(" / ")
    of = r'\{instance=~"\$instance"\}\[\$__rate_interval\]\)\)'
    spent = rf"sum\(rate\(retouch_dollars_total{of}"
    filters = rf"\(sum\(rate\(retouch_filter_dollars_total{of} or vector\(0\)\)"
    assert re.fullmatch(rf"1e6 \* \({spent} - {filters}\)", over)
    assert "retouch_edits_total" in under


def test_the_page_on_serving_names_every_metric_option_and_endpoint(app) -> None:
    text = (DOCS / "serving.md").read_text()
    table = text.partition("## Metrics")[2]
    stems = re.findall(r"`(\w+?)(?:\{[\w,]+\})?`", table)
    said, family = set(), ""
    for stem in stems:
        if stem.startswith("retouch_"):
            said.add(base(stem))
            family = stem.rsplit("_", 1)[0] if not stem.endswith("_total") else stem.removesuffix("_total").rsplit("_", 1)[0]
        elif stem.startswith("_"):
            said.add(base(family + stem))
    assert {base(name) for name in names_of(app) if not name.endswith("_created")} == said
    options = {option for action in _parser()._actions for option in action.option_strings if option.startswith("--")}
    mentioned = set(re.findall(r"--[a-z][a-z-]+", text))
    assert mentioned <= options
    assert options - mentioned <= {"--help", "--port", "--dtype", "--device", "--verbose"}
    for path in app.openapi()["paths"]:
        stem = re.sub(r"\{\w+(:path)?\}", "", path).rstrip("/").removesuffix("/content").removesuffix("/events")
        assert stem in text or stem.startswith("/v2"), path
    assert "/v2/models/{model}/versions/1" in text
    for cache in app.state.service.stats()["caches"]:
        assert cache in table, cache


def test_help_fits_a_screen(capsys) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["--help"])
    assert len(capsys.readouterr().out.splitlines()) <= 36
