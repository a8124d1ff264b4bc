"""Documents and Prompts as bytes, for the disk tier: safetensors, since what is read back may have been damaged."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load, save
from torch import Tensor

from retouch.models.base import Document, Prompt
from retouch.models.compact import Compact


def moved(document: Document, device: torch.device) -> Document:
    """The same on another device."""
    keys = tuple((k.to(device), v.to(device)) for k, v in document.keys)
    tensors = (t.to(device) for t in (document.tokens, document.reference, document.positions))
    tokens, reference, positions = tensors
    return Document(document.key, tokens, keys, reference, positions, tuple(t.to(device) for t in document.prefix))


def dump_document(document: Document) -> bytes:
    tensors = {"tokens": document.tokens, "reference": document.reference, "positions": document.positions}
    tensors |= {f"prefix.{index}": part for index, part in enumerate(document.prefix)}
    for layer, pair in enumerate(document.keys):
        for name, part in zip(("keys", "values"), pair, strict=True):
            if isinstance(part, Compact):
                tensors |= {f"{name}.{layer}": part.values, f"scale.{name}.{layer}": part.scale}
            else:
                tensors[f"{name}.{layer}"] = part
    return _dump(document.key, tensors)


def load_document(data: bytes, device: torch.device) -> Document:
    """Raises SafetensorError or KeyError where `data` is not what `dump_document` made."""
    key, tensors = _load(data, device)
    layers = sum(name.startswith("keys.") for name in tensors)

    def part(name: str) -> Tensor | Compact:
        scale = tensors.get(f"scale.{name}")
        return tensors[name] if scale is None else Compact(tensors[name], scale)

    pairs = tuple((part(f"keys.{layer}"), part(f"values.{layer}")) for layer in range(layers))
    prefix = tuple(tensors[f"prefix.{index}"] for index in range(sum(name.startswith("prefix.") for name in tensors)))
    return Document(key, tensors["tokens"], pairs, tensors["reference"], tensors["positions"], prefix)


def dump_prompt(prompt: Prompt) -> bytes:
    pooled = {} if prompt.pooled is None else {"pooled": prompt.pooled}
    return _dump(prompt.key, {"embedded": prompt.embedded, **pooled})


def load_prompt(data: bytes, device: torch.device) -> Prompt:
    key, tensors = _load(data, device)
    return Prompt(key, tensors["embedded"], tensors.get("pooled"))


def _dump(key: str, tensors: dict[str, Tensor]) -> bytes:
    kept = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    name = json.dumps(key).encode()
    return len(name).to_bytes(4, "little") + name + save(kept)


def _load(data: bytes, device: torch.device) -> tuple[str, dict[str, Tensor]]:
    """Raises MemoryError where the device has no room, which is not the data's fault."""
    start = 4 + int.from_bytes(data[:4], "little")
    try:
        return json.loads(data[4:start]), {name: tensor.to(device) for name, tensor in load(data[start:]).items()}
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error
