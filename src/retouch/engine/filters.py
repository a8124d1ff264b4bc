"""Filters as engines: one for the command line, or several beside the model that a server has."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from retouch.cache.memory import Memory
from retouch.cache.store import Store
from retouch.edit import InvalidOption
from retouch.engine.engine import Engine
from retouch.engine.scheduler import POLICIES
from retouch.models.filters import spec as specs
from retouch.models.filters.graph import open_graph
from retouch.models.filters.model import Filter

if TYPE_CHECKING:
    from retouch.engine.worker import Options


def open_filter(name: str) -> Filter:
    """A bundled filter, or that of a TOML.

    Raises UnknownCheckpoint where it, or its weights, are not here, CheckpointMismatch where they do not belong together,
    InvalidOption where a package lacks.
    """
    path = specs.find(name)
    spec = specs.read(path)
    weights = specs.weights_of(spec, path)
    graph = open_graph(spec, weights)
    return Filter(spec, graph, hashlib.blake2b(path.read_bytes() + weights.read_bytes(), digest_size=16).hexdigest())


def load_filter(name: str) -> Engine:
    """An engine that keeps nothing: whoever runs it on pictures has each of them once. Raises as `open_filter` does."""
    return _engine(open_filter(name), results=Store(Memory("host", 0)))


def load_filters(options: Options) -> dict[str, Engine]:
    """Those that a worker serves, by name. Raises as `open_filter` does, InvalidOption where two models have one name."""
    if options.threads:
        torch.set_num_threads(options.threads)
    engines: dict[str, Engine] = {}
    for name in options.filters:
        model = open_filter(name)
        if model.spec.name in (options.name, *engines):
            raise InvalidOption(f"two models would be called {model.spec.name!r}; give the filter's TOML another name.")
        engines[model.spec.name] = _engine(model, policy=POLICIES[options.policy](), queue=options.queue)
    return engines


def _engine(model: Filter, **more: Any) -> Engine:
    """Documents and prompts are not kept, as a filter's are empty."""
    return Engine(model, documents=Store(Memory("device", 0)), prompts=Store(Memory("device", 0)), **more)


def described(engines: dict[str, Engine]) -> dict[str, dict[str, Any]]:
    """What a server is told of them."""
    found = {}
    for name, engine in engines.items():
        spec = engine.model.spec  # type: ignore[attr-defined]
        found[name] = {"kind": spec.output.kind, "scale": spec.output.scale, "about": spec.about, "source": spec.source}
    return found
